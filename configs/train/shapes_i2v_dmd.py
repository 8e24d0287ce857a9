"""Step distillation of the tiny world's image-to-video model: 4 steps without guidance for 50 with."""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config, on_shapes
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = on_shapes(dmd_config("runs/shapes_i2v_dmd"), teacher="assets/shapes_i2v", generator_every=3)
    config.data.count = 2048
    config.dmd.update({"real_guidance_scale": 2.0, "timestep_shift": 3.0})
    config.log_every, config.eval_every, config.save_every = 30, 150, 150
    config.phases = (
        phase(
            "distribution matching",
            steps=900,
            batch_size=16,
            learning_rate=1e-4,
            warmup=10,
            decay_share=0.3,
            final_scale=0.1,
            generator={"every": 3},
            critic={"learning_rate": 2e-4},
        ),
    )
    return config
