"""Self-Forcing of Wan2.1 1.3B: a causal student rolls out through its cache while it is trained.

    python -m train --config=configs/train/wan_self_forcing.py --config.teacher=FOLDER --config.student=FOLDER \
        --config.data.prompts=prompts.txt

Student: the export of configs/train/wan_causal_ode_init.py. Teacher: a bidirectional base model, 1.3B or 14B. The
settings are the published recipe (its guidance_scale 3 is real_guidance_scale 4 here).
"""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = dmd_config("runs/wan_self_forcing", guidance_scale=4.0)
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "sliding"})
    config.log_every, config.eval_every, config.save_every = 5, 50, 50
    config.phases = (
        phase(
            "self-forcing",
            steps=600,
            batch_size=64,
            learning_rate=2e-6,
            generator={"every": 5},
            critic={"learning_rate": 4e-7},
        ),
    )
    return config
