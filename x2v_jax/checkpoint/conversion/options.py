"""What a conversion can be asked to do."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """What a conversion is to do.

    Attributes:
        variant: base, distill, causvid or self_forcing; None for the only one there.
        components: which networks; empty for all there are.
        dtype: "keep", float32, bfloat16 or float16; of weights that are not 8-bit.
        quantize: "keep" (8-bit weights stay so, others stay floats), "none" (they are dequantized), or "int8" or
            "fp8" (the matrices of the blocks of `quantize_components` become 8-bit).
        quantize_components: which networks "int8" and "fp8" mean; empty for the transformer alone.
        smooth: a file of recorded activations (see `checkpoint.calibration`) by which the transformer is smoothed
            before it becomes 8-bit.
        smooth_alpha: how much of the unevenness goes from activations to weights, 0 to 1; None for the usual.
        loras: (file, strength), merged into the transformer.
        allow_partial: merge what fits of a LoRA.
        schedule: a published name, JSON, or a JSON file that replaces fields of the variant's schedule.
        reuse: a native checkpoint that lends its encoders, VAE and tokenizer.
        overwrite: replace a native checkpoint at the destination.
        allow_nonfinite: keep NaN and infinity.
        settings: component -> sizes that neither tensors nor config.json tell.
        command: recorded in the provenance.
    """

    variant: str | None = None
    components: tuple[str, ...] = ()
    dtype: str = "keep"
    quantize: str = "keep"
    quantize_components: tuple[str, ...] = ()
    smooth: str | None = None
    smooth_alpha: float | None = None
    loras: tuple[tuple[str, float], ...] = ()
    allow_partial: bool = False
    schedule: str | None = None
    reuse: str | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    command: str | None = None
