"""After a conversion: the command that makes a video with its result."""

import os
import shlex
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.models.config import Schedule

# Task and variant -> shipped configs that such a checkpoint may be meant for. The first that agrees with it is taken.
_CONFIGS = {
    ("t2v", "base"): ("base/wan_t2v_1_3b", "base/wan_t2v_14b"),
    ("i2v", "base"): ("base/wan_i2v_480p", "base/wan_i2v_720p"),
    ("t2v", "distill"): ("distill/wan_t2v_4step",),
    ("i2v", "distill"): ("distill/wan_i2v_4step",),
    ("t2v", "causvid"): ("causvid/wan_t2v_causvid",),
    ("t2v", "self_forcing"): ("self_forcing/wan_t2v_self_forcing",),
}
_PROMPT = "a fox runs through snow at dusk"


def next_command(destination: str | os.PathLike[str]) -> str | None:
    """The `infer` line for a checkpoint that was just converted; None where a network is missing that it would need.

    Raises:
        UserError: the checkpoint is damaged.
    """
    checkpoint = open_checkpoint(destination)
    needed = ("transformer", "vae", "text_encoder", "tokenizer", *(("image_encoder",) if _takes(checkpoint) else ()))
    if not all(checkpoint.has(component) for component in needed):
        return None
    config = _config_for(checkpoint)
    arguments = [
        *([] if config is None else [f"--config={config}"]),
        f"--config.checkpoint={shlex.quote(os.fspath(destination))}",
        *(["--config.image=FILE"] if _takes(checkpoint) else []),
        f'--config.prompt="{_PROMPT}"',
    ]
    return shipped.command(" ".join(["infer", *arguments]))


def _takes(checkpoint: NativeCheckpoint) -> bool:
    """Whether its videos begin with an image."""
    return checkpoint.task == "i2v"


def _config_for(checkpoint: NativeCheckpoint) -> str | None:
    """The shipped config whose settings are those of the checkpoint; None where none is: its schedule alone decides."""
    from x2v_jax.config.load import load_config  # not before the work: it imports more than the library does

    for name in _CONFIGS.get((checkpoint.task or "", checkpoint.variant), ()):
        path = f"configs/{name}.py"
        if _agrees(load_config(path, typed=False), checkpoint.schedule):
            return path
    return None


def _agrees(config: Any, schedule: Schedule) -> bool:
    """Whether nothing that a config sets contradicts a schedule."""
    values = schedule.to_dict() | {"denoising_step_list": schedule.denoising_step_list}
    return all(config[name] in (None, value) for name, value in values.items() if name in config)
