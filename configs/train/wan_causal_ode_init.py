"""The start of a causal Wan2.1 student: regression to the ends of the teacher's trajectories.

    python -m train --config=configs/train/wan_causal_ode_init.py --config.teacher=FOLDER --config.pairs=FOLDER

Pairs: of configs/train/wan_ode_pairs.py with the same student_schedule, or imported by `python -m train.prepare lmdb`.
"""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import distillation_config
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = distillation_config("ode_regression", "runs/wan_causal_ode_init")
    config.pairs = "runs/wan_ode_pairs/trajectories"
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "sliding"})
    config.adam.update({"b1": 0.9})
    config.ema_start = 0
    config.log_every, config.eval_every, config.save_every = 10, 500, 500
    config.phases = (phase("trajectory ends", steps=3000, batch_size=128, learning_rate=2e-6),)
    return config
