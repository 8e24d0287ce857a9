"""CausVid's recipe for Wan2.1: a causal student of nine steps, distilled on real videos with noise.

    python -m train --config=configs/train/wan_causvid.py --config.teacher=FOLDER --config.student=FOLDER \
        --config.data.latents=FOLDER

Latents: the cache that `python -m train.prepare videos` (or `lmdb`) made. CausVid's guidance 3.5 is 4.5 here.
"""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = dmd_config("runs/wan_causvid", guidance_scale=4.5)
    config.task = "causvid"
    config.share_batches = True
    config.student_schedule.update(
        {
            "denoising_step_list": (999, 934, 862, 756, 603, 410, 250, 140, 74),
            "shift": 8.0,
            "warp_denoising_step": False,
        }
    )
    config.dmd.timestep_shift = 8.0
    config.adam.update({"b1": 0.9})
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "fragments"})
    config.log_every, config.eval_every, config.save_every = 5, 200, 200
    config.phases = (
        phase(
            "distribution matching",
            steps=1000,
            batch_size=64,
            learning_rate=2e-6,
            generator={"every": 5},
        ),
    )
    return config
