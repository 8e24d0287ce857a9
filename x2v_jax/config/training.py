"""What every training config has in common."""

from ml_collections import ConfigDict


def training_config(task: str, run_dir: str) -> ConfigDict:
    return ConfigDict(
        {
            "task": task,
            "run_dir": run_dir,
            "resume_any": False,  # go on although the directory was made with another config
            "seed": 0,
            "optimizer": "adam",
            "clip_norm": 1.0,
            "max_grad_norm": float("inf"),  # an update with a larger gradient is left out
            "ema_decay": 0.995,
            "ema_start": 0,  # step from which the average is an average
            "accumulate": 1,  # parts of a batch, one after the other, whose gradients are accumulated
            "devices": 0,  # 0 for all
            "read_ahead": 2,  # steps whose batches are made while the device works
            "log_every": 50,
            "eval_every": 500,
            "save_every": 250,
        }
    )


def phase(name: str, *, steps: int, learning_rate: float, batch_size: int, **settings: object) -> ConfigDict:
    """A stretch of training with an optimizer of its own: linear warm-up, plateau, linear decay."""
    defaults = {"warmup": 0, "decay_share": 0.0, "final_scale": 1.0}
    return ConfigDict(
        {"name": name, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, **defaults, **settings}
    )
