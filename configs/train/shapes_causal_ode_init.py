"""The start of the tiny world's causal student: regression to the ends of the teacher's trajectories."""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import distillation_config, on_shapes
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = on_shapes(distillation_config("ode_regression", "runs/shapes_causal_ode_init"))
    config.pairs = "runs/shapes_ode_pairs/trajectories"
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "sliding"})
    config.optimizer = "muon"
    config.adam.update({"b1": 0.9, "b2": 0.99, "weight_decay": 0.0})
    config.clip_norm = 1.0
    config.log_every, config.eval_every, config.save_every = 50, 500, 250
    config.phases = (
        phase(
            "trajectory ends",
            steps=1500,
            batch_size=16,
            learning_rate=1e-3,
            warmup=50,
            decay_share=0.5,
            final_scale=0.05,
        ),
    )
    return config
