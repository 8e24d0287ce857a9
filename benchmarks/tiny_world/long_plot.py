"""Pictures of `shapes_long`: accuracy and drift by horizon, and frames of a few videos."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from x2v_jax.media.video import write_png


def plot(path: pathlib.Path, modes: Mapping[str, Mapping[str, Any]]) -> None:
    """Three panels side by side, a line a mode."""
    from matplotlib.figure import Figure

    panels = {
        "prompt accuracy, %": ("accuracy", 100.0),
        "background drift, grey levels": ("background_drift", 1.0),
        "colour drift, grey levels": ("colour_drift", 1.0),
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, (name, scale)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for mode, values in modes.items():
            axes.plot(np.arange(1, 1 + len(values[name])), scale * np.array(values[name]), marker="o", label=mode)
        axes.set(title=title, xlabel="horizon (33 frames each)")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=110)


def sheet(path: pathlib.Path, shown: Mapping[str, np.ndarray]) -> None:
    """Rows of frames: the first videos of every mode, one mode below the other."""
    most = max(frames.shape[1] for frames in shown.values())
    rows = []
    for frames in shown.values():
        padded = np.zeros((len(frames), most, *frames.shape[2:]), np.uint8)
        padded[:, : frames.shape[1]] = frames
        rows += [np.concatenate(list(video), axis=1) for video in padded]
    image = Image.fromarray(np.concatenate(rows))
    write_png(path, np.asarray(image.resize((image.width // 2, image.height // 2))))
