"""Step distillation of Wan2.1's text-to-video model (1.3B or 14B): 4 steps without guidance for 40 or 50 with.

    python -m train --config=configs/train/wan_t2v_dmd.py --config.teacher=FOLDER --config.data.prompts=prompts.txt

Teacher: a native checkpoint of the base model (`python -m convert wan`).
Data: config.data.prompts, a text file of one prompt a line, or the cache that `python -m train.prepare
prompts` made of it.
The settings are Self-Forcing-Plus's recipe; its guidance_scale 5 is real_guidance_scale 6.0 here.
The global batch is 64 on any number of devices that divides it; `--config.accumulate` computes it in parts.
`--dry_run` tells the memory.
"""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = dmd_config("runs/wan_t2v_dmd", guidance_scale=6.0)
    config.log_every, config.eval_every, config.save_every = 5, 200, 200
    config.phases = (
        phase(
            "distribution matching",
            steps=3000,
            batch_size=64,
            learning_rate=2e-6,
            generator={"every": 5},
            critic={"learning_rate": 4e-7},
        ),
    )
    return config
