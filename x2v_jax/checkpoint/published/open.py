"""One network of a published or a native checkpoint, opened: its sizes, and its tensors under official names."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from x2v_jax.checkpoint.files.arrays import contiguous
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.names.smoothing import GROUP_OF_COLUMNS, GROUP_OF_ROWS, module_of
from x2v_jax.checkpoint.names.wan import Row, table
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.checkpoint.native.writer import MODEL_FILE
from x2v_jax.checkpoint.published.infer_config import infer_config
from x2v_jax.checkpoint.published.key_check import differences
from x2v_jax.checkpoint.published.layouts import NetworkFiles, declared
from x2v_jax.checkpoint.published.read import KeyConvention, OfficialTensors, RawTensors, to_official
from x2v_jax.checkpoint.published.relatives import OtherModel, check_vae
from x2v_jax.checkpoint.quantize.eight_bit import EightBit, Factors
from x2v_jax.models.config import ClipConfig


@dataclasses.dataclass(frozen=True)
class PublishedNetwork:
    """One network: where it comes from, its sizes, its tensors under official names."""

    source: NetworkFiles
    config: Any
    found: OfficialTensors


def open_source(
    source: NetworkFiles, settings: Mapping[str, object] | None = None
) -> tuple[PublishedNetwork, list[str]]:
    """Reads the headers of a source, finds its sizes, and lists what is wrong with its tensors.

    Raises:
        OtherModel: it is another model than Wan2.1's.
        UserError: its sizes cannot be told.
    """
    if source.other is not None:
        raise OtherModel(str(source.files[0]), *source.other)
    found = to_official(source.read(), source.convention)
    if source.component == "vae":
        check_vae(found.shapes, found.unknown, declared(source))
    config = infer_config(source.component, found.shapes, declared(source) | dict(settings or {}))
    if isinstance(config, ClipConfig) and source.naming == "diffusers" and "visual.head" not in found.tensors:
        found = _with_empty_head(found, config)
    return PublishedNetwork(source, config, found), differences(source.component, config, found)


def _with_empty_head(found: OfficialTensors, config: ClipConfig) -> OfficialTensors:
    """CLIPVisionModel is published without the projection, which Wan2.1 does not use; the parameter tree has it."""
    shape = (config.dim, config.out_dim)
    dtype = next(iter(found.tensors.values())).dtype
    head = LazyTensor(shape, dtype, lambda: np.zeros(shape, dtype))
    return dataclasses.replace(found, tensors={**found.tensors, "visual.head": head})


def open_native(native: NativeCheckpoint, component: str) -> PublishedNetwork:
    """A network of a native checkpoint, its own or one that it refers to. Smoothing is undone, up to rounding.

    Raises:
        UserError: as `NativeCheckpoint.tensors`.
    """
    holder = native.holder(component)
    variant = native.variant if component == "transformer" else None
    source = NetworkFiles(
        component, tuple(native.files(component)), "official", variant, config_file=holder.path / MODEL_FILE
    )
    raw = RawTensors(official_tensors(native, component))
    config, found = native.config(component), to_official(raw, KeyConvention(component))
    if native.smoothing(component) is not None:
        found = without_smoothing(found, config, native.smoothing_inverses(component))
    return PublishedNetwork(source, config, found)


def official_tensors(native: NativeCheckpoint, component: str) -> dict[str, LazyTensor]:
    """The tensors of a native component as stored, under official names and in official axes, read one at a time.

    Quantized weights have LightX2V's names: KEY.weight and KEY.weight_scale.
    """
    own = native.tensors(component)
    return {
        key: _official(row, own[row.native], layer)
        for row in table(component, native.config(component), native.quantization(component))
        for layer, key in enumerate(row.official_keys)
    }


def _official(row: Row, tensor: LazyTensor, layer: int) -> LazyTensor:
    def load() -> np.ndarray:
        values = tensor.read()
        return contiguous(row.transform.backward(values if row.layers is None else values[layer]))

    return LazyTensor(row.official_shape, tensor.dtype, load)


def source_notes(one: PublishedNetwork) -> Iterator[str]:
    """Sentences for the user about a network as it was found."""
    source, found = one.source, one.found
    if source.state:
        left = f" (left aside: {', '.join(source.other_states)})" if source.other_states else ""
        yield f"{source.component}: taken from {source.state!r} of {source.files[0].name}{left}"
    for reason in dict.fromkeys(found.ignored.values()):
        count = sum(r == reason for r in found.ignored.values())
        yield f"{source.component}: {count} {'tensor' if count == 1 else 'tensors'} ignored ({reason})"
    if "visual.head" in found.tensors and "visual.head" not in found.origin:
        yield "image_encoder: the files have no projection, which Wan2.1 does not use; zeros stand for it"


def without_smoothing(found: OfficialTensors, config: object, inverses: Mapping[str, LazyTensor]) -> OfficialTensors:
    """The tensors of a smoothed transformer, such that they read as those that were smoothed, up to rounding.

    Args:
        found: as the checkpoint has them; 8-bit matrices keep their values and scales, and know what undoes the rest.
        config: of the transformer.
        inverses: as `NativeCheckpoint.smoothing_inverses` gives them.
    """
    tensors, kept = dict(found.tensors), dict(found.kept)
    for row in table("transformer", config):
        module = module_of(row.native)
        columns, rows = GROUP_OF_COLUMNS.get(module), GROUP_OF_ROWS.get(module)
        for layer, key in enumerate(row.official_keys):
            if row.is_quantizable and (columns or rows):
                kept[key] = one = _undone(found.kept[key], inverses, columns, rows, layer)
                tensors[key] = LazyTensor(one.values.shape, np.dtype(np.float32), one.read)
            elif rows:
                tensors[key] = _unfolded(found.tensors[key], inverses[rows], layer)
    return dataclasses.replace(found, tensors=tensors, kept=kept)


def _undone(
    matrix: EightBit, inverses: Mapping[str, LazyTensor], columns: str | None, rows: str | None, layer: int
) -> EightBit:
    def undo() -> Factors:
        # Columns had been multiplied by s, rows by 1 / s.
        return Factors(
            None if columns is None else inverses[columns].read()[layer],
            None if rows is None else 1 / inverses[rows].read()[layer],
        )

    return dataclasses.replace(matrix, undo=undo)


def _unfolded(vector: LazyTensor, inverse: LazyTensor, layer: int) -> LazyTensor:
    return LazyTensor(
        vector.shape, np.dtype(np.float32), lambda: vector.read().astype(np.float32) / inverse.read()[layer]
    )
