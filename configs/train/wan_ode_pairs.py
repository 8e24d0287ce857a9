"""Trajectories of Wan2.1's teacher from noise to video, which a causal student begins with.

    python -m train --config=configs/train/wan_ode_pairs.py --config.teacher=FOLDER --config.data.prompts=prompts.txt

Goes on where it was interrupted; of several processes each makes its own shards. Shift and steps of the solver follow
from config.student_schedule, so that the states lie where the student is trained.
"""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import distillation_config


def get_config() -> ConfigDict:
    config = distillation_config("ode_pairs", "runs/wan_ode_pairs")
    config.output = "runs/wan_ode_pairs/trajectories"
    config.num_steps = 48
    config.guidance_scale = 6.0
    config.batch_size = 4  # videos made together, and kept in one file
    return config
