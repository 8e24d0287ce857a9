"""CausVid's recipe on the tiny world: nine steps a block, DMD on real videos with noise."""

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config, on_shapes
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = on_shapes(dmd_config("runs/shapes_causvid"), generator_every=3, share_batches=True)
    config.task = "causvid"
    config.student = "runs/shapes_causal_ode_init/export"
    config.student_schedule.update(
        {"denoising_step_list": (999, 934, 862, 756, 603, 410, 250, 140, 74), "warp_denoising_step": False}
    )
    config.data.count = 4096
    config.dmd.update({"real_guidance_scale": 2.0, "timestep_shift": 3.0})
    config.causal = ConfigDict({"block": 3, "context_timestep": 0.0, "mode": "fragments"})
    config.log_every, config.eval_every, config.save_every = 30, 75, 75
    config.phases = (
        phase(
            "distribution matching",
            # Longer is worse: noised real videos never show the student what it meets behind frames of its own.
            steps=300,
            batch_size=16,
            learning_rate=1e-4,
            warmup=10,
            decay_share=0.5,
            final_scale=0.1,
            generator={"every": 3},
            critic={"learning_rate": 2e-4},
        ),
    )
    return config
