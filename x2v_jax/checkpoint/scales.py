"""8-bit weights of published files with their scales, read as float32.

LightX2V stores KEY.weight in int8 or fp8 beside KEY.weight_scale, one a row; DeepGEMM's files have one a 128x128 block,
ComfyUI's a single KEY.scale_weight.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from x2v_jax.checkpoint.tensors import LazyTensor

_BLOCK = 128
_EIGHT_BIT = frozenset(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors without their scales.

    tensors: key -> tensor, of 8-bit ones the product with the scale, in float32. own: key -> the keys it was made of.
    quantized: keys that were 8-bit. problems: sentences about those that cannot be used.
    """

    tensors: Mapping[str, LazyTensor]
    own: Mapping[str, tuple[str, ...]]
    quantized: frozenset[str]
    problems: tuple[str, ...]


def join_scales(raw: Mapping[str, LazyTensor]) -> Weights:
    """Multiplies 8-bit weights out with their scales, when they are read. Scales are never rounded."""
    scale_of = {weight: key for key in raw if (weight := _weight_of(key)) in raw}
    scales = set(scale_of.values())
    tensors: dict[str, LazyTensor] = {}
    quantized: set[str] = set()
    problems: list[str] = []
    for key in raw.keys() - scales:
        tensors[key] = weight = raw[key]
        scale = raw[scale_of[key]] if key in scale_of else None
        if scale is None and weight.dtype.name not in _EIGHT_BIT:
            continue
        if scale is None and weight.dtype.name == "int8":
            problems.append(f"{key} is int8 and {key}_scale is missing; its values mean nothing without it")
        elif scale is not None and not _fits(weight.shape, scale.shape):
            problems.append(
                f"{key} has shape {list(weight.shape)} and its scale {list(scale.shape)}; it must be one a tensor, row "
                f"or {_BLOCK}x{_BLOCK} block"
            )
        tensors[key] = _multiplied(weight, scale)
        quantized.add(key)
    ordered = [key for key in raw if key in tensors]
    own = {key: (key, scale_of[key]) if key in scale_of else (key,) for key in ordered}
    return Weights({key: tensors[key] for key in ordered}, own, frozenset(quantized), tuple(sorted(problems)))


def _weight_of(key: str) -> str | None:
    if key.endswith("weight_scale"):
        return key.removesuffix("_scale")
    return key.removesuffix("scale_weight") + "weight" if key.endswith(".scale_weight") else None


def _fits(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return math.prod(scale) == 1 or _is_by_row(shape, scale) or scale == tuple(-(-n // _BLOCK) for n in shape)


def _is_by_row(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return bool(shape) and scale in ((shape[0],), (shape[0], 1))


def _multiplied(weight: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    def load() -> np.ndarray:
        values = weight.read().astype(np.float32)
        if scale is None:
            return values
        factors = scale.read().astype(np.float32)
        if factors.size == 1:
            factors = factors.reshape(())
        elif _is_by_row(values.shape, factors.shape):
            factors = factors.reshape(-1, *[1] * (values.ndim - 1))
        else:
            factors = factors.repeat(_BLOCK, 0)[: values.shape[0]].repeat(_BLOCK, 1)[:, : values.shape[1]]
        values *= factors
        return values

    return LazyTensor(weight.shape, np.dtype(np.float32), load)
