"""Recordings that no network made, for the tests of smoothing."""

import json
import pathlib
from typing import Any

import numpy as np

from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.checkpoint.quantize.calibration import Calibration, write_calibration


def recording(
    path: pathlib.Path,
    config: Any,
    *,
    variant: str = "base",
    prompts: int | None = 3,
    changes: dict[str, Any] | None = None,
):
    """Written to `path`: channels of which a few are large. changes: arrays by input to replace."""
    rng = np.random.default_rng(5)
    maxima = {}
    for name in GROUPS:
        values = np.exp(rng.standard_normal((config.num_layers, config.dim))).astype(np.float32)
        values[:, :2] *= 40
        values[:, 5] = 0
        maxima[name] = values
    about = {"config": json.dumps(config.to_dict()), "variant": variant}
    about |= {"prompts": str(prompts)} if prompts is not None else {}
    calibration = Calibration(maxima | (changes or {}), about, path)
    write_calibration(calibration)
    return calibration
