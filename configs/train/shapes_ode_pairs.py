"""Trajectories of the tiny world's teacher, for the start of a causal student."""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import distillation_config, on_shapes


def get_config() -> ConfigDict:
    config = on_shapes(distillation_config("ode_pairs", "runs/shapes_ode_pairs"))
    config.output = "runs/shapes_ode_pairs/trajectories"
    config.num_steps = 32
    config.guidance_scale = 2.0
    config.batch_size = 16
    config.data.count = 1024
    return config
