"""Self-Forcing on the tiny world: the causal student rolls out through its cache while it is trained."""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config, on_shapes
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = on_shapes(dmd_config("runs/shapes_self_forcing"), generator_every=3)
    config.student = "runs/shapes_causal_ode_init/export"
    config.dmd.update({"real_guidance_scale": 2.0, "timestep_shift": 3.0})
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "sliding"})
    config.log_every, config.eval_every, config.save_every = 30, 150, 150
    config.continuation.pairs = "runs/shapes_ode_pairs/trajectories"
    settings = {"batch_size": 16, "generator": {"every": 3}, "critic": {"learning_rate": 2e-4}}
    config.phases = (
        phase("self-forcing", steps=456, learning_rate=1e-4, warmup=10, **settings),
        # The student goes on from given blocks, so that it holds out when its window slides, ...
        phase(
            "continuation",
            steps=600,
            learning_rate=1e-4,
            warmup=10,
            decay_share=0.4,
            final_scale=0.1,
            continuation_share=0.6,
            **settings,
        ),
        # ... and from what it made itself.
        phase(
            "own continuation",
            steps=400,
            learning_rate=1e-4,
            warmup=10,
            decay_share=0.5,
            final_scale=0.1,
            continuation_share=0.75,
            own_share=0.8,
            **settings,
        ),
        # ... again and again, so that small errors of one video do not add up over the next.
        phase(
            "long continuation",
            steps=240,
            learning_rate=1e-4,
            warmup=10,
            decay_share=0.6,
            final_scale=0.1,
            continuation_share=0.9,
            own_share=0.9,
            own_most=5,
            **settings,
        ),
    )
    return config
