"""What every distillation config has in common. The values are Self-Forcing-Plus's recipe for step distillation."""

from ml_collections import ConfigDict

from x2v_jax.config.training import training_config


def distillation_config(task: str, run_dir: str) -> ConfigDict:
    """A student of four steps from a teacher with guidance. Guidance scales are in the usual form, as everywhere."""
    config = training_config(task, run_dir)
    config.update(
        {
            "teacher": "",  # native checkpoint with guidance and many steps
            "student": "",  # native checkpoint that the student starts from; empty for the teacher
            "dtype": "bfloat16",  # of the matmuls of student and critic, whose weights are float32
            "teacher_dtype": "bfloat16",  # of the teacher's weights and matmuls
            "remat": "block",  # what gradients keep of a block: none (all of it), attention or block (its input)
            "export_dtype": "bfloat16",
            "clip_norm": 10.0,
            "ema_decay": 0.99,
            "ema_start": 200,
            "adam": {"b1": 0.0, "b2": 0.999, "weight_decay": 0.01},
            "student_schedule": {
                "denoising_step_list": (1000, 750, 500, 250),
                "shift": 5.0,
                "warp_denoising_step": True,
            },
            "lora": {},  # rank, alpha, targets: train pairs beside the student's frozen weights; empty for all weights
            "causal": {},  # block, context_timestep, mode; empty for a student that makes whole videos
            "data": {"prompts": "", "images": "", "latents": "", "count": 0, "seed": 0},
            "size": {"height": 480, "width": 832, "num_frames": 81},
            "evaluation": {"prompts": 8},
        }
    )
    return config


def dmd_config(run_dir: str, *, guidance_scale: float = 6.0) -> ConfigDict:
    """A generator and a critic that is updated five times as often."""
    config = distillation_config("dmd", run_dir)
    config.dmd = ConfigDict(
        {
            "real_guidance_scale": guidance_scale,
            "fake_guidance_scale": 1.0,
            "timestep_shift": 5.0,
            "min_timestep": 20.0,
            "max_timestep": 980.0,
        }
    )
    config.generator_every = 5
    # In a phase with a continuation_share a causal student also goes on from the ends of trajectories of ode_pairs.
    config.continuation = ConfigDict({"max_blocks": 2, "pairs": ""})
    config.share_batches = False  # whether critic and generator learn from the same rows, as CausVid has it
    return config


def on_shapes(config: ConfigDict, **changes: object) -> ConfigDict:
    """The same on the tiny world: its sizes, its captions, float32, and an evaluation that counts what is right."""
    config.update(
        {
            "teacher": "assets/shapes",
            "dtype": "float32",
            "teacher_dtype": "float32",
            "remat": "none",
            "ema_decay": 0.98,
            "ema_start": 100,
            "data": {"prompts": "shapes", "count": 8192},
            "size": {"height": 64, "width": 64, "num_frames": 33},
            "student_schedule": {"shift": 3.0},
            "evaluation": {"prompts": 96},
            **changes,
        }
    )
    return config
