"""Videos of the tiny world in low precision: how far from those in float32, and how often what the prompt says."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.errors.record import smoothed_params
from benchmarks.tiny_world.sampling import ShapesModel
from x2v_jax.checkpoint.quantize.calibration import Calibration
from x2v_jax.models.functional import Params, flatten, unflatten
from x2v_jax.models.networks import abstract_network
from x2v_jax.ops.choice import OpChoice
from x2v_jax.ops.linear_8bit import quantize_weight

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the transformer computes. dtype: of what is not in 8 bits. smoothed: before its matrices became 8-bit."""

    dtype: str = "bfloat16"
    quantization: str | None = None
    smoothed: bool = False
    ops: OpChoice = dataclasses.field(default_factory=OpChoice)


TRUTH, BASE = "float32", "bfloat16"
VARIANTS: dict[str, Variant] = {
    TRUTH: Variant("float32"),
    BASE: Variant(),
    "int8, W8A8": Variant(quantization="int8"),
    "fp8, W8A8": Variant(quantization="float8_e4m3fn"),
    "int8, W8A8, smoothed": Variant(quantization="int8", smoothed=True),
    "fp8, W8A8, smoothed": Variant(quantization="float8_e4m3fn", smoothed=True),
    "int8, weights only": Variant(quantization="int8", ops=OpChoice(linear_activations="16bit")),
    "attention int8": Variant(ops=OpChoice(attention_precision="int8")),
    "attention e4m3": Variant(ops=OpChoice(attention_precision="e4m3")),
    "attention int8_e4m3": Variant(ops=OpChoice(attention_precision="int8_e4m3")),
    "attention e4m3_all": Variant(ops=OpChoice(attention_precision="e4m3_all")),
    "int8, W8A8, attention int8": Variant(quantization="int8", ops=OpChoice(attention_precision="int8")),
    "fp8, W8A8, attention e4m3_all": Variant(
        quantization="float8_e4m3fn", ops=OpChoice(attention_precision="e4m3_all")
    ),
}


class LowPrecisionModel(ShapesModel):
    """A checkpoint whose transformer computes as a variant says; text and pictures are as in float32 for all.

    Args:
        calibration: needed where the variant is smoothed.
    """

    def __init__(self, checkpoint: Any, variant: Variant, calibration: Calibration | None = None):
        super().__init__(checkpoint, "float32")
        config: Any = self.config("transformer")
        self._graphs["transformer"], shapes = abstract_network(
            config,
            dtype=np.dtype(variant.dtype) if variant.dtype == "float32" else variant.dtype,
            quantization=variant.quantization,
            smoothed=variant.smoothed,
            ops=variant.ops,
        )
        if variant.smoothed:
            assert variant.quantization is not None and calibration is not None
            self._params["transformer"] = smoothed_params(checkpoint, variant.quantization, calibration)
        else:
            self._params["transformer"] = fill(shapes, checkpoint.load("transformer", "float32"))


def fill(shapes: Params, params: Params) -> Params:
    """Float parameters as a network of these shapes takes them: matrices that it has in 8 bits are quantized."""
    flat, filled = flatten(params), {}
    for name, leaf in flatten(shapes).items():
        owner, _, last = name.rpartition(".")
        kernel = flat.get(f"{owner}.kernel")
        if name in flat and not (last == "scale" and kernel is not None):
            filled[name] = flat[name]
        elif last == "weight" and kernel is not None:
            filled[name], filled[f"{owner}.scale"] = quantize_weight(kernel.swapaxes(-1, -2), leaf.dtype)
    return unflatten(filled)


def video_rows(
    checkpoint: Any,
    count: int,
    seed: int,
    batch: int,
    variants: Sequence[str] = tuple(VARIANTS),
    calibration: Calibration | None = None,
) -> Iterator[Row]:
    """One row a variant: accuracy on `count` prompts whose wording is new, and decibels against float32.

    Videos of all variants have the same noise. Decibels: of each video over all its pixels; their median and the worst.
    """
    from benchmarks.tiny_world.examine import examine
    from train.shapes.judge import label_names
    from train.shapes.world import heldout_prompts
    from x2v_jax.request import Request
    from x2v_jax.request.resolve import resolve

    prompts = heldout_prompts(count, seed)
    wanted, texts = label_names(prompts), [prompt.text for prompt in prompts]
    request = resolve(Request(prompt="-", seed=seed), checkpoint)
    truth: Sequence[np.ndarray] = ()
    for name in (TRUTH, *(name for name in variants if name != TRUTH)):
        model = LowPrecisionModel(checkpoint, VARIANTS[name], calibration)
        seen = examine(model.generate(texts, request, batch), wanted, name=name, progress=False, keep=True)
        truth = truth or seen.videos
        summary = seen.summary()
        row: Row = {"variant": name, **{key: summary[key] for key in ("n", "all", "all_low", "all_high")}}
        if name != TRUTH:
            decibels = [psnr(a, b) for a, b in zip(seen.videos, truth, strict=True)]
            row |= {"psnr": float(np.median(decibels)), "psnr_worst": min(decibels)}
        yield row


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Decibels between two uint8 videos, at most 99."""
    error = np.mean(np.square(video.astype(np.float64) - truth))
    return float(min(99.0, 10 * np.log10(255.0**2 / max(error, 1e-9))))
