"""Smoothing for the error table: recorded on prompts that no row is measured on, applied as the converter does."""

import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.errors.record import Recording
from convert.calibrate import about, record
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.quantize.calibration import Calibration, write_calibration
from x2v_jax.checkpoint.quantize.smoothing import ALPHA, smoothing_factors
from x2v_jax.models.functional import Params
from x2v_jax.request import Request
from x2v_jax.request.options import RunOptions
from x2v_jax.request.resolve import resolve

PROMPTS = 16
_WORDS = {"int8": "int8", "float8_e4m3fn": "fp8"}
# Of the matrices that are smoothed: name in a recording -> the group's name. Matrices of a group have its factors.
_GROUPS = {
    "self q": "self_attn.q",
    "self k": "self_attn.q",
    "self v": "self_attn.q",
    "self o": "self_attn.o",
    "cross q": "cross_attn.q",
    "cross o": "cross_attn.o",
    "ffn 1": "ffn.linear_1",
}


def calibrated(checkpoint: Any, seed: int, avoid: Sequence[str] = ()) -> Calibration:
    """Activations of a tiny-world checkpoint on `PROMPTS` prompts, none of them in `avoid`. Its path is not used."""
    from train.shapes.world import heldout_prompts

    texts = [prompt.text for prompt in heldout_prompts(len(avoid) + 4 * PROMPTS, seed)]
    texts = [text for text in texts if text not in avoid][:PROMPTS]
    requests = [resolve(Request(text, seed=seed + i), checkpoint) for i, text in enumerate(texts)]
    maxima = record(checkpoint, requests, RunOptions(dtype="float32"))
    return Calibration(maxima, about(checkpoint, requests), pathlib.Path("calibration.safetensors"))


def smoothed_params(checkpoint: Any, quantization: str, calibration: Calibration) -> Params:
    """The transformer's parameters after `convert wan --quantize --smooth`."""
    with tempfile.TemporaryDirectory() as folder:
        written = Calibration(calibration.maxima, calibration.about, pathlib.Path(folder) / "c.safetensors")
        write_calibration(written)
        options = ConversionOptions(
            components=("transformer",), quantize=_WORDS[quantization], smooth=str(written.path)
        )
        convert(checkpoint.path, pathlib.Path(folder) / "made", options)
        return open_checkpoint(pathlib.Path(folder) / "made").load("transformer", "float32", quantized=True)


def smoothed_cases(recording: Recording, calibration: Calibration) -> Iterator[tuple[Any, ...]]:
    """The recorded matrices as (x / s, s * kernel, bias); those that are never smoothed as they are."""
    layers = len(calibration.maxima["self_attn.q"])
    for name, cases in recording.matrices.items():
        group = _GROUPS.get(name)
        together = [other for other, own in _GROUPS.items() if own == group]
        for i, (x, kernel, bias) in enumerate(cases):
            if group is None:
                yield x, kernel, bias
                continue
            largest = np.max([np.abs(recording.matrices[other][i][1]).max(1) for other in together], axis=0)
            yield smoothed_case(x, kernel, bias, calibration.maxima[group][i % layers], largest)


def smoothed_case(x: Any, kernel: Any, bias: Any, activations: Any, weights: Any) -> tuple[Any, ...]:
    """(x / s, s * kernel, bias). activations, weights: largest magnitudes of the channels [in]."""
    s = smoothing_factors(np.asarray(activations), np.asarray(weights), ALPHA)
    return x / s, kernel * s[:, None], bias


def kept_rows(report: Mapping[str, Any], measured: Sequence[str], prompts: int) -> list[Mapping[str, Any]]:
    """Rows of an earlier report that a measurement of some variants leaves as they are; each says when it was made."""
    rows = [row for row in report["videos"] if row["variant"] not in measured and row["n"] == prompts]
    return [{"measured": report["date"]} | row for row in rows]
