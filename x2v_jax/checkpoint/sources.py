"""Opens the files of one network, whatever wrote them, as lazy tensors under official names.

Handles trainers' nesting (generator_ema | generator) and wrapper prefixes, diffusers' names and split projections, and
8-bit weights with scales, which read as float32. Every key of the files is accounted for: used, ignored with a reason,
or unknown.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from x2v_jax.checkpoint.names import CONFIGS, official_shapes
from x2v_jax.checkpoint.names_diffusers import DiffusersNames, Part, res_blocks_of
from x2v_jax.checkpoint.safetensors_file import read_safetensors
from x2v_jax.checkpoint.tensors import LazyTensor
from x2v_jax.checkpoint.torch_file import read_torch_file
from x2v_jax.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

# Path segments that training wrappers put into names, at any depth.
_WRAPPERS = frozenset(
    ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module", "model", "diffusion_model")
)
# Where a trainer's file keeps the weights, best first: the published demos load the averaged weights.
_STATES = ("generator_ema", "generator", "model", "state_dict", "module", "ema")

_ACTIVATION_SCALES = (".scale_input", ".input_scale")
_QUANTIZED = frozenset(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))


@dataclasses.dataclass(frozen=True)
class RawTensors:
    """Tensors of one or several files by their own names, wrappers removed.

    state: which of a trainer's states they are, None for a plain file. other_states: the ones left aside.
    """

    tensors: Mapping[str, LazyTensor]
    state: str | None = None
    other_states: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a set of keys is: a component (or "lora" or None) and the convention of its names."""

    component: str | None
    naming: str = "official"


@dataclasses.dataclass(frozen=True)
class OfficialTensors:
    """The tensors of one component under official names.

    origin: official key -> the file's own keys. ignored: own key -> why it is not used. unknown: own keys that nothing
    explains. quantized: official keys whose tensors were 8-bit. problems: sentences about unusable tensors.
    """

    tensors: Mapping[str, LazyTensor]
    origin: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]
    quantized: frozenset[str]
    problems: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.tensors.items()}


def read_raw(files: Sequence[pathlib.Path]) -> RawTensors:
    """The tensors of files that belong together (shards, blocks or parts of one network).

    Raises:
        UserError: a file cannot be read, holds no tensors, or two files hold the same key.
    """
    tensors: dict[str, LazyTensor] = {}
    owner: dict[str, tuple[str, pathlib.Path]] = {}
    states: list[str | None] = []
    other_states: list[str] = []
    for path in files:
        found, state, others = _read_file(path)
        states.append(state)
        other_states += others
        for key, tensor in found.items():
            name = unwrapped(key)
            if name in owner:
                first, where = owner[name]
                raise UserError(
                    f"{key!r} of {path.name} and {first!r} of {where.name} are the same tensor; keep one of the two "
                    "files in the folder, or give the file itself"
                )
            owner[name] = (key, path)
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"{', '.join(str(f) for f in files)}: no tensors; give a checkpoint file")
    return RawTensors(tensors, states[0], tuple(other_states))


def unwrapped(key: str) -> str:
    """The name without what FSDP, activation checkpointing, torch.compile, DDP and pipelines put into it.

    >>> unwrapped("model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.norm3.weight")
    'blocks.0.norm3.weight'
    """
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _read_file(path: pathlib.Path) -> tuple[Mapping[str, LazyTensor], str | None, list[str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path), None, []
    node: Any = read_torch_file(path)
    state, others = None, []
    while isinstance(node, Mapping):
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, LazyTensor)}
        nested = {k: v for k, v in node.items() if isinstance(v, Mapping) and _holds_tensors(v)}
        chosen = next((name for name in _STATES if name in nested), None)
        if chosen is None or (tensors and not nested):
            return tensors, state, others
        others += [str(name) for name in node if name != chosen]
        state = state or chosen
        node = nested[chosen]
    raise UserError(f"{path}: it holds {type(node).__name__}, not named tensors; give a file of model weights")


def _holds_tensors(node: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, LazyTensor) or (isinstance(v, Mapping) and _holds_tensors(v)) for v in node.values())


_SIGNS = (
    ("lora", "", (".lora_A.", ".lora_down.", ".lora_B.", ".lora_up.", ".diff", ".diff_b", ".diff_m", "lora_unet_")),
    ("transformer", "official", ("time_projection.1.", ".self_attn.q.", "text_embedding.0.")),
    ("transformer", "diffusers", ("condition_embedder.", ".attn1.to_q.")),
    ("image_encoder", "official", ("visual.cls_embedding", "visual.transformer.", "visual.pos_embedding")),
    ("image_encoder", "diffusers", ("embeddings.class_embedding", "encoder.layers.0.layer_norm1.")),
    ("text_encoder", "official", (".pos_embedding.embedding.", ".ffn.gate.0.")),
    ("text_encoder", "diffusers", (".SelfAttention.q.", ".SelfAttention.relative_attention_bias.", "shared.weight")),
    ("vae", "diffusers", ("encoder.down_blocks.", "decoder.up_blocks.", "post_quant_conv.", "encoder.mid_block.")),
    ("vae", "official", ("encoder.downsamples.", "decoder.upsamples.", "encoder.middle.", "decoder.middle.")),
)


def identify(keys: Iterable[str]) -> Kind:
    """Tells a network by names that only it has. A few keys of it are enough (one shard of many)."""
    names = list(keys)
    for component, naming, signs in _SIGNS:
        for name in names:
            if any(_has_sign(name, sign) for sign in signs):
                return Kind(component, naming)
    return Kind(None)


def _has_sign(name: str, sign: str) -> bool:
    if sign.startswith(".diff"):
        return name.endswith(sign)
    return sign in name if sign.startswith(".") else name.startswith(sign) or f".{sign}" in name


def to_official(raw: RawTensors, kind: Kind) -> OfficialTensors:
    """Brings tensors under official names: merges scales, renames, joins what diffusers splits."""
    if kind.component not in CONFIGS:
        raise ValueError(f"{kind.component} is no network of Wan2.1")
    tensors, own, quantized, problems = _with_scales(raw.tensors)
    ignored: dict[str, str] = {}
    parts: dict[str, dict[int, str]] = {}
    part_of: dict[str, Part] = {}
    unknown: list[str] = []
    names = DiffusersNames(kind.component, res_blocks_of(tensors)) if kind.naming == "diffusers" else None
    known = None if names else _official_grammar(kind.component, tensors)
    for key in tensors:
        reason = _reason_to_ignore(kind.component, key, tensors)
        if reason:
            ignored |= {k: reason for k in own[key]}
            continue
        part = names.parse(_full_name(kind.component, key)) if names else (Part(key) if known and known(key) else None)
        if part is None:
            unknown += own[key]
        elif part.index in parts.get(part.official, {}):
            raise UserError(f"{own[key][0]!r} and {parts[part.official][part.index]!r} are the same tensor; keep one")
        else:
            parts.setdefault(part.official, {})[part.index] = key
            part_of[key] = part
    official: dict[str, LazyTensor] = {}
    origin: dict[str, tuple[str, ...]] = {}
    for name, found in parts.items():
        keys = [found[i] for i in sorted(found)]
        origin[name] = tuple(k for key in keys for k in own[key])
        part = part_of[keys[0]]
        if len(found) < part.count:
            lost = part.count - len(found)
            problems.append(f"{', '.join(keys)}: {lost} of the {part.count} parts of {name} missing")
            continue
        official[name] = _joined([tensors[key] for key in keys], part)
    was_8bit = frozenset(name for name, found in parts.items() if quantized & set(found.values()))
    return OfficialTensors(official, origin, ignored, tuple(unknown), was_8bit, tuple(problems))


def _full_name(component: str, key: str) -> str:
    # transformers 5 writes CLIPVisionModel without the prefix that version 4 had.
    if component == "image_encoder" and not key.startswith(("vision_model.", "visual_projection.")):
        return f"vision_model.{key}"
    if component == "text_encoder" and key == "encoder.embed_tokens.weight":
        return "shared.weight"
    return key


def _official_grammar(component: str, tensors: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key is one that an official file of some size can hold: layer numbers count as any number."""

    def shape_free(key: str) -> str:
        return ".".join("#" if part.isdecimal() else part for part in key.split("."))

    config = {
        "transformer": lambda: CONFIGS["transformer"](dim=128, ffn_dim=1, num_heads=1, num_layers=1, model_type="i2v"),
    }.get(component, CONFIGS[component])()
    known = {shape_free(key) for key in official_shapes(component, config)}
    return lambda key: shape_free(key) in known


def _reason_to_ignore(component: str, key: str, tensors: Mapping[str, Any]) -> str | None:
    if component == "image_encoder":
        if key.startswith(("textual.", "text_model.", "text_projection.")):
            return "CLIP's text tower, which Wan2.1 does not use"
        if key in ("log_scale", "logit_scale") or key.endswith("embeddings.position_ids"):
            return "not a weight of the visual tower"
    if component == "text_encoder" and key.startswith(("decoder.", "lm_head.")):
        return "UMT5's decoder, which Wan2.1 does not use"
    if component == "text_encoder" and key == "encoder.embed_tokens.weight" and "shared.weight" in tensors:
        return "the same table as shared.weight"
    if component == "transformer" and (key in ("freqs", "scaled_fp8") or key.endswith(_ACTIVATION_SCALES)):
        return "not a weight"
    return None


def _with_scales(
    raw: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, tuple[str, ...]], set[str], list[str]]:
    """Joins 8-bit weights with their scales. Returns tensors, the raw keys of each, which were 8-bit, and problems."""
    tensors: dict[str, LazyTensor] = {}
    own: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    scale_of: dict[str, str] = {}
    for key in raw:
        for weight in (key.removesuffix("_scale"), key.removesuffix("scale_weight") + "weight"):
            if key.endswith(("weight_scale", ".scale_weight")) and weight in raw and weight != key:
                scale_of[weight] = key
    scales = set(scale_of.values())
    quantized = {key for key, tensor in raw.items() if tensor.dtype.name in _QUANTIZED and key != "scaled_fp8"}
    for key, tensor in raw.items():
        if key in scales:
            continue
        scale = scale_of.get(key)
        own[key] = (key,) if scale is None else (key, scale)
        tensors[key] = tensor
        if key in quantized or scale:
            if scale is None and tensor.dtype.name == "int8":
                problems.append(f"{key} is int8 and {key}_scale is missing; its values have no meaning without it")
            problem = scale and _scale_problem(key, tensor.shape, raw[scale].shape)
            if problem:
                problems.append(problem)
            else:
                tensors[key] = _dequantized(tensor, raw[scale] if scale else None)
                quantized.add(key)
    return tensors, own, quantized, problems


def _scale_problem(key: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> str | None:
    """Scales are one for all, one a row, or one a 128x128 block."""
    size = int(np.prod(scale, dtype=np.int64))
    blocks = tuple(-(-n // 128) for n in shape)
    if size == 1 or (shape and size == shape[0] and scale in ((shape[0],), (shape[0], 1))) or scale == blocks:
        return None
    return f"{key} has shape {list(shape)} and its scale {list(scale)}; it must be one a tensor, row or 128x128 block"


def _dequantized(weight: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    """weight * scale in float32: the scale is never rounded to a shorter type."""

    def load() -> np.ndarray:
        values = weight.read().astype(np.float32)
        if scale is None:
            return values
        factors = scale.read().astype(np.float32)
        if factors.size == 1:
            factors = factors.reshape(())
        elif factors.size == values.shape[0] and factors.shape in ((values.shape[0],), (values.shape[0], 1)):
            factors = factors.reshape(-1, *([1] * (values.ndim - 1)))
        else:
            factors = factors.repeat(128, 0)[: values.shape[0]].repeat(128, 1)[:, : values.shape[1]]
        values *= factors
        return values

    return LazyTensor(weight.shape, np.dtype(np.float32), load)


def _joined(tensors: list[LazyTensor], part: Part) -> LazyTensor:
    """One official tensor from its diffusers parts."""
    transform = part.transform
    if len(tensors) == 1 and transform is None:
        return tensors[0]
    first = tensors[0]
    if transform is not None:
        if len(first.shape) != len(transform.order):
            return first  # misshapen: reported with the others
        shape = transform.backward_shape(first.shape)
        return LazyTensor(shape, first.dtype, lambda: transform.backward(first.read()))
    same_tail = {t.shape[1:] for t in tensors}
    if len(same_tail) > 1 or len({t.dtype for t in tensors}) > 1 or not first.shape:
        return first
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return LazyTensor(shape, first.dtype, lambda: np.concatenate([t.read() for t in tensors]))
