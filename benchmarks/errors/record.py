"""What the matrices and attentions of a trained network are given while it makes videos, for errors on real numbers.

As it is, and smoothed: by a recording of prompts that no row is measured on, applied as the converter does.
"""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from convert.calibrate import about, record
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.quantize.calibration import Calibration, write_calibration
from x2v_jax.checkpoint.quantize.smoothing import ALPHA, smoothing_factors
from x2v_jax.models import layers, wan_blocks
from x2v_jax.models.functional import Params
from x2v_jax.request import Request
from x2v_jax.request.options import RunOptions
from x2v_jax.request.resolve import resolve

# The matrices of a block in the order in which it calls them.
MATRICES = (
    "self q", "self k", "self v", "cross k", "cross v", "self o", "cross q", "cross o", "ffn 1", "ffn 2"
)  # fmt: skip
ATTENTIONS = ("self", "cross")
# Of the recording that smooths.
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


@dataclasses.dataclass
class Recording:
    """matrices: (input [B, L, in], kernel [in, out], bias [out]) by the matrix' name, of every block and step in turn.

    attentions: (q, k, v), each [B, L, H, D], likewise.
    """

    matrices: dict[str, list[tuple[np.ndarray, ...]]]
    attentions: dict[str, list[tuple[np.ndarray, ...]]]


@contextlib.contextmanager
def listening() -> Iterator[Recording]:
    """What blocks of networks that are traced and run within are given. They must compute in float32."""
    heard = Recording(collections.defaultdict(list), collections.defaultdict(list))
    block, linear, attention = wan_blocks.Block.__call__, layers.Linear.__call__, wan_blocks.attention
    # What the block that is being traced has called so far; None outside of blocks.
    calls: list[list[str] | None] = [None]

    def record(store: dict[str, list[Any]], name: str, *arrays: jax.Array) -> None:
        def keep(*values: Any) -> None:
            store[name].append(tuple(np.asarray(value, np.float32) for value in values))

        jax.debug.callback(keep, *arrays, ordered=True)

    def block_call(self: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] = []
        try:
            return block(self, *arguments, **options)
        finally:
            calls[0] = None

    def linear_call(self: Any, x: Any) -> Any:
        if calls[0] is not None:
            name = MATRICES[sum(call in MATRICES for call in calls[0])]
            calls[0].append(name)
            record(heard.matrices, name, x, self.kernel[...], self.bias[...])
        return linear(self, x)

    def attention_call(q: Any, k: Any, v: Any, **options: Any) -> Any:
        if calls[0] is not None:
            name = ATTENTIONS[sum(call in ATTENTIONS for call in calls[0])]
            calls[0].append(name)
            record(heard.attentions, name, q, k, v)
        return attention(q, k, v, **options)

    with (
        mock.patch.object(wan_blocks.Block, "__call__", block_call),
        mock.patch.object(layers.Linear, "__call__", linear_call),
        mock.patch.object(wan_blocks, "attention", attention_call),
    ):
        yield heard
        jax.effects_barrier()


def record_sampling(checkpoint: Any, prompts: Sequence[str], seed: int = 0) -> Recording:
    """A step-distilled text-to-video checkpoint's numbers while it samples the prompts, together, in float32."""
    from benchmarks.tiny_world.sampling import ShapesModel, make_sampler
    from train.data.sources import Conditions
    from x2v_jax.request import Request
    from x2v_jax.request.resolve import WholePlan, resolve

    model = ShapesModel(checkpoint, "float32", ("transformer", "text_encoder"))
    request = resolve(Request(prompt="-", seed=seed), checkpoint)
    assert isinstance(request.plan, WholePlan)
    texts = model.encode_text([*prompts, request.negative_prompt])
    keys = jax.vmap(jax.random.key)(jnp.arange(seed, seed + len(prompts), dtype=jnp.uint32))
    with listening() as heard:
        sample = jax.jit(make_sampler(model.graph("transformer"), request, request.plan))
        jax.block_until_ready(sample(model.params("transformer"), keys, Conditions(texts[:-1]), texts[-1]))
    return heard


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
