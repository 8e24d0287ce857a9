"""Opens the files of one network, whatever wrote them, as lazy tensors under official names.

Handles trainers' nesting (generator_ema | generator) and wrapper prefixes, diffusers' names and split projections, and
8-bit weights with scales, which read as float32. Every key of the files is accounted for: used, ignored with a reason,
or unknown.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.checkpoint.names.diffusers import DiffusersNames, Part, res_blocks_of
from x2v_jax.checkpoint.names.wan import official_shapes
from x2v_jax.checkpoint.quantize.eight_bit import EightBit, join_scales
from x2v_jax.errors import UserError
from x2v_jax.models.config import CONFIGS, Config, WanConfig

# Path segments that training wrappers put into names, at any depth.
_WRAPPERS = frozenset(
    ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module", "model", "diffusion_model")
)
# Where a trainer's file keeps the weights, best first: the published demos load the averaged weights.
_STATES = ("generator_ema", "generator", "model", "state_dict", "module", "ema")


class NoWeights(UserError):
    """A file of torch.save with other things than named tensors in it. held: what, in a user's words."""

    def __init__(self, path: pathlib.Path, held: str):
        super().__init__(f"{path}: it holds {held}; give a file of model weights")
        self.held = held


_ACTIVATION_SCALES = (".scale_input", ".input_scale")


@dataclasses.dataclass(frozen=True)
class RawTensors:
    """Tensors of one or several files by their own names, wrappers removed.

    state: which of a trainer's states they are, None for a plain file. other_states: the ones left aside.
    """

    tensors: Mapping[str, LazyTensor]
    state: str | None = None
    other_states: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class KeyConvention:
    """What a set of keys is: a component (or "lora" or None) and the convention of its names."""

    component: str | None
    naming: str = "official"


@dataclasses.dataclass(frozen=True)
class OfficialTensors:
    """The tensors of one component under official names.

    origin: official key -> the file's own keys. ignored: own key -> why it is not used. unknown: own keys that nothing
    explains. quantized: official keys whose tensors were 8-bit; they read as float32. kept: of these, what can be run
    as it is. problems: sentences about unusable tensors.
    """

    tensors: Mapping[str, LazyTensor]
    origin: Mapping[str, tuple[str, ...]]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]
    quantized: frozenset[str]
    problems: tuple[str, ...] = ()
    kept: Mapping[str, EightBit] = dataclasses.field(default_factory=dict)

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
    raise NoWeights(path, _told(node))


def _told(node: object) -> str:
    """What a file holds that is no set of named tensors, in a user's words."""
    if isinstance(node, LazyTensor):
        return f"one tensor without a name, {node.dtype.name} {list(node.shape)}{_use(node.shape)}"
    if isinstance(node, list | tuple):
        tensors = [item for item in node if isinstance(item, LazyTensor)]
        return f"a list of {len(node)} without names" + (f", the first of them {_told(tensors[0])}" if tensors else "")
    if node is None or isinstance(node, bool | int | float | str | bytes):
        return f"a single value, {node!r:.40}"
    return "something that is no set of named tensors"


def _use(shape: Sequence[int]) -> str:
    """What a tensor of this shape could be for, by Wan2.1's channels."""
    lead, size = (shape[:-4], tuple(shape[-4:])) if len(shape) >= 4 else ((), ())
    if size and math.prod(lead) == 1 and 16 in size[:2]:
        frames, (height, width) = size[1 - size.index(16)], size[2:]
        pixels = f"{4 * (frames - 1) + 1} frames of {8 * height}x{8 * width}"
        infer = shipped.command("infer --config.continue_from=FILE")
        return (
            f": by its shape it could be latents of a video of {pixels}, which are no weights; `{infer}` takes them as "
            "`latents` [16, frames, height, width] in a .safetensors file"
        )
    if size and 3 in size[-3:]:
        return ": by its shape it could be pictures, which are no weights"
    if len(shape) in (2, 3) and shape[-1] == 4096:
        infer = shipped.command("infer --config.text_embeddings=FILE")
        return (
            f": by its shape it could be the embedding of a prompt, which is no weights; `{infer}` takes it as `text` "
            "[tokens, 4096] in a .safetensors file"
        )
    return ""


def _holds_tensors(node: Mapping[object, object]) -> bool:
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


def identify(keys: Iterable[str]) -> KeyConvention:
    """Tells a network by names that only it has. A few keys of it are enough (one shard of many)."""
    names = list(keys)
    for component, naming, signs in _SIGNS:
        for name in names:
            if any(_has_sign(name, sign) for sign in signs):
                return KeyConvention(component, naming)
    return KeyConvention(None)


def _has_sign(name: str, sign: str) -> bool:
    if sign.startswith(".diff"):
        return name.endswith(sign)
    return sign in name if sign.startswith(".") else name.startswith(sign) or f".{sign}" in name


def to_official(raw: RawTensors, convention: KeyConvention) -> OfficialTensors:
    """Brings tensors under official names: merges scales, renames, joins what diffusers splits.

    Raises:
        UserError: two keys mean the same tensor.
    """
    if convention.component is None or convention.component not in CONFIGS:
        raise ValueError(f"{convention.component} is no network of Wan2.1")
    weights = join_scales(raw.tensors)
    parse = _parser(convention.component, convention.naming, raw.tensors)
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    parts: dict[str, dict[int, str]] = {}  # official key -> index -> own key
    meaning: dict[str, Part] = {}
    for key, own in weights.own.items():
        reason = _reason_to_ignore(convention.component, key, raw.tensors)
        part = None if reason else parse(key)
        if reason:
            ignored |= dict.fromkeys(own, reason)
        elif part is None:
            unknown += own
        elif part.index in parts.setdefault(part.official, {}):
            raise UserError(f"{key!r} and {parts[part.official][part.index]!r} are the same tensor; keep one of them")
        else:
            parts[part.official][part.index] = key
            meaning[key] = part
    official: dict[str, LazyTensor] = {}
    kept: dict[str, EightBit] = {}
    origin: dict[str, tuple[str, ...]] = {}
    problems = list(weights.problems)
    for name, found in parts.items():
        keys = [found[index] for index in sorted(found)]
        origin[name] = tuple(own for key in keys for own in weights.own[key])
        part = meaning[keys[0]]
        if len(keys) < part.count:
            lost = part.count - len(keys)
            problems.append(f"{', '.join(keys)}: {lost} of the {part.count} parts of {name} missing")
        else:
            official[name] = _joined([weights.tensors[key] for key in keys], part)
            if keys[0] in weights.kept and len(keys) == 1 and part.transform is None:
                kept[name] = weights.kept[keys[0]]
    was_8bit = frozenset(name for name, found in parts.items() if weights.quantized.intersection(found.values()))
    return OfficialTensors(official, origin, ignored, tuple(unknown), was_8bit, tuple(problems), kept)


def _parser(component: str, naming: str, keys: Iterable[str]) -> Callable[[str], Part | None]:
    """What a key of the file means, by the names of a convention; None where it means nothing."""
    if naming == "diffusers":
        names = DiffusersNames(component, res_blocks_of(keys))
        return lambda key: names.parse(_full_name(component, key))
    # Of official names every layer number is known: whether the network has the layer is asked when its depth is.
    known = {_any_layer(key) for key in official_shapes(component, _widest(component))}
    return lambda key: Part(key) if _any_layer(key) in known else None


def _any_layer(key: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))


def _widest(component: str) -> Config:
    """A config whose network has every kind of parameter that the component can have."""
    if component == "transformer":
        return WanConfig(dim=2, ffn_dim=1, num_heads=1, num_layers=1, model_type="i2v")
    return CONFIGS[component]()


def _full_name(component: str, key: str) -> str:
    # transformers 5 writes CLIPVisionModel without the prefix that version 4 had.
    if component == "image_encoder" and not key.startswith(("vision_model.", "visual_projection.")):
        return f"vision_model.{key}"
    if component == "text_encoder" and key == "encoder.embed_tokens.weight":
        return "shared.weight"
    return key


def _reason_to_ignore(component: str, key: str, tensors: Mapping[str, object]) -> str | None:
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


def _joined(tensors: list[LazyTensor], part: Part) -> LazyTensor:
    """One official tensor from its diffusers parts."""
    transform = part.transform
    if len(tensors) == 1 and transform is None:
        return tensors[0]
    first = tensors[0]
    if transform is not None:
        if len(first.shape) != transform.rank:
            return first  # misshapen: reported with the others
        shape = transform.backward_shape(first.shape)
        return LazyTensor(shape, first.dtype, lambda: transform.backward(first.read()))
    same_tail = {t.shape[1:] for t in tensors}
    if len(same_tail) > 1 or len({t.dtype for t in tensors}) > 1 or not first.shape:
        return first
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return LazyTensor(shape, first.dtype, lambda: np.concatenate([t.read() for t in tensors]))
