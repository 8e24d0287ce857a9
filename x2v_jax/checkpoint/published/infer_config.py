"""Finds the sizes of a network: measured on its tensors, completed by what its config.json declares.

Small random checkpoints in a published layout thus work like the full ones. What tensors cannot tell (the number of
heads) must be declared or follow from the published head size; otherwise the user is asked.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from x2v_jax.checkpoint.names.wan import Shape
from x2v_jax.checkpoint.native.fields import check_sizes
from x2v_jax.checkpoint.published.relatives import check_transformer
from x2v_jax.errors import UserError
from x2v_jax.models.config import CONFIGS, Config

Shapes = Mapping[str, Shape]
Values = dict[str, Any]

# Head size of the published models, used when nothing declares the number of heads.
_HEAD_DIM = {"transformer": 128, "image_encoder": 80}

_DECLARED_NAMES = {
    "transformer": {
        **{name: name for name in ("dim", "ffn_dim", "num_heads", "num_layers", "model_type", "in_dim", "out_dim")},
        **{name: name for name in ("freq_dim", "text_dim", "text_len", "patch_size", "clip_dim", "eps")},
        "num_attention_heads": "num_heads",
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "image_dim": "clip_dim",
    },
    "vae": {
        **{name: name for name in ("dim", "z_dim", "dim_mult", "num_res_blocks", "temporal_downsample")},
        **{name: name for name in ("latents_mean", "latents_std")},
        "base_dim": "dim",
        "temperal_downsample": "temporal_downsample",  # the published code's spelling
    },
    "text_encoder": {
        **{name: name for name in ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "vocab_size", "eps")},
        **{name: name for name in ("num_buckets", "max_distance")},
        "vocab": "vocab_size",
        "d_model": "dim",
        "d_ff": "dim_ffn",
        "relative_attention_num_buckets": "num_buckets",
        "relative_attention_max_distance": "max_distance",
        "layer_norm_epsilon": "eps",
    },
    "image_encoder": {
        **{name: name for name in ("image_size", "patch_size", "dim", "mlp_ratio", "num_heads", "num_layers")},
        **{name: name for name in ("out_dim", "eps")},
        "hidden_size": "dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "projection_dim": "out_dim",
        "layer_norm_eps": "eps",
    },
}  # fmt: skip


def infer_config(component: str, shapes: Shapes, declared: Mapping[str, object] | None = None) -> Config:
    """The config of a component.

    Args:
        component: transformer, vae, text_encoder or image_encoder.
        shapes: official key -> shape of the tensors that were found. They may be incomplete.
        declared: what config.json (the official one's or diffusers') says, as read.

    Raises:
        OtherModel: the network is one that this project does not run.
        UserError: the two contradict each other, or a size is neither measured nor declared.
    """
    measure = {
        "transformer": _measure_transformer,
        "vae": _measure_vae,
        "text_encoder": _measure_text_encoder,
        "image_encoder": _measure_image_encoder,
    }
    measured = {k: v for k, v in measure[component](shapes).items() if v is not None}
    if component == "transformer":
        check_transformer(measured, declared or {})
    said = _declared(component, declared or {})
    # A lost shard must show as missing tensors, not as a shallower network: the declared depth counts.
    wrong = [
        f"{name} is {said[name]} in config.json and {measured[name]} by the tensors"
        for name in sorted(said.keys() & measured.keys() - {"num_layers"})
        if said[name] != measured[name]
    ]
    if wrong:
        raise UserError(f"{component}: {'; '.join(wrong)}; put the config.json of these weights beside them")
    values = measured | said
    if component in _HEAD_DIM and "num_heads" not in values:
        values["num_heads"] = _heads(component, values.get("dim"))
    _check_latent_statistics(component, values)
    return CONFIGS[component].from_dict(values)


def _declared(component: str, config: Mapping[str, Any]) -> Values:
    names = _DECLARED_NAMES[component]
    said = {
        names[key]: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key in names and value is not None
    }
    check_sizes(component, said, config)
    heads = said.get("num_heads")
    if component == "transformer":
        if "attention_head_dim" in config and heads:
            said["dim"] = heads * config["attention_head_dim"]
        _refuse_other_transformers(config)
    if component == "text_encoder" and "d_kv" in config and heads:
        said["dim_attn"] = heads * config["d_kv"]
    if component == "image_encoder":
        if "intermediate_size" in config and said.get("dim"):
            said["mlp_ratio"] = config["intermediate_size"] // said["dim"]
        if config.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"image_encoder: hidden_act is {config['hidden_act']!r}; Wan2.1's CLIP uses 'gelu'")
    return said


def _refuse_other_transformers(config: Mapping[str, object]) -> None:
    for switch in ("qk_norm", "cross_attn_norm"):
        if config.get(switch, True) in (False, None):
            raise UserError(f"transformer: {switch} is {config[switch]!r} in config.json; Wan2.1 has it on")


def _heads(component: str, dim: int | None) -> int:
    head_dim = _HEAD_DIM[component]
    if dim and dim % head_dim == 0:
        return dim // head_dim
    raise UserError(
        f"{component}: num_heads cannot be read from the tensors, and dim {dim} is no multiple of the published head "
        f"size {head_dim}; add num_heads to the checkpoint's config.json or give --set {component}.num_heads=N"
    )


def _check_latent_statistics(component: str, values: Values) -> None:
    if component != "vae" or values.get("z_dim", 16) == 16:
        return
    if len(values.get("latents_mean", ())) != values["z_dim"] or len(values.get("latents_std", ())) != values["z_dim"]:
        raise UserError(
            f"vae: z_dim is {values['z_dim']}, and the published latents_mean and latents_std are for 16 channels; put "
            "a config.json with both lists beside the VAE (a diffusers folder has one)"
        )


def _size(shapes: Shapes, *probes: tuple[str, int]) -> int | None:
    """The first probe that fits: (key or pattern with {} for any layer, axis)."""
    for pattern, axis in probes:
        for key in _matching(shapes, pattern):
            shape = shapes[key]
            if -len(shape) <= axis < len(shape):
                return shape[axis]
    return None


def _matching(shapes: Shapes, pattern: str) -> list[str]:
    if "{}" not in pattern:
        return [pattern] if pattern in shapes else []
    first = pattern.format(0)
    if first in shapes:
        return [first]
    regex = re.compile(re.escape(pattern).replace(r"\{\}", r"\d+"))
    return [key for key in shapes if regex.fullmatch(key)]


def _layers(shapes: Shapes, prefix: str) -> int | None:
    found = [int(m[1]) for key in shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))]
    return max(found) + 1 if found else None


def _measure_transformer(shapes: Shapes) -> Values:
    image = any(key.startswith("img_emb.") or ".cross_attn.k_img." in key for key in shapes)
    patch = shapes.get("patch_embedding.weight", ())
    patch_size = tuple(patch[2:]) if len(patch) == 5 else None
    head = _size(shapes, ("head.head.bias", 0), ("head.head.weight", 0))
    return {
        "dim": _size(shapes, ("patch_embedding.bias", 0), ("blocks.{}.norm3.weight", 0), ("head.modulation", -1)),
        "ffn_dim": _size(shapes, ("blocks.{}.ffn.0.bias", 0), ("blocks.{}.ffn.2.weight", 1)),
        "num_layers": _layers(shapes, "blocks."),
        "model_type": "i2v" if image else "t2v",
        "in_dim": _size(shapes, ("patch_embedding.weight", 1)),
        "patch_size": patch_size,
        "out_dim": head // math.prod(patch_size) if head and patch_size else None,
        "freq_dim": _size(shapes, ("time_embedding.0.weight", 1)),
        "text_dim": _size(shapes, ("text_embedding.0.weight", 1)),
        "clip_dim": _size(shapes, ("img_emb.proj.0.weight", 0), ("img_emb.proj.1.weight", 1)),
    }


def _measure_text_encoder(shapes: Shapes) -> Values:
    bias = "blocks.{}.pos_embedding.embedding.weight"
    return {
        "vocab_size": _size(shapes, ("token_embedding.weight", 0)),
        "dim": _size(shapes, ("norm.weight", 0), ("token_embedding.weight", 1)),
        "dim_attn": _size(shapes, ("blocks.{}.attn.q.weight", 0), ("blocks.{}.attn.o.weight", 1)),
        "dim_ffn": _size(shapes, ("blocks.{}.ffn.fc1.weight", 0), ("blocks.{}.ffn.fc2.weight", 1)),
        "num_layers": _layers(shapes, "blocks."),
        "num_buckets": _size(shapes, (bias, 0)),
        "num_heads": _size(shapes, (bias, 1)),
    }


def _measure_image_encoder(shapes: Shapes) -> Values:
    dim = _size(shapes, ("visual.pre_norm.weight", 0), ("visual.cls_embedding", -1))
    patch = _size(shapes, ("visual.patch_embedding.weight", -1))
    tokens = _size(shapes, ("visual.pos_embedding", 1))
    hidden = _size(shapes, ("visual.transformer.{}.mlp.0.bias", 0), ("visual.transformer.{}.mlp.2.weight", 1))
    return {
        "dim": dim,
        "patch_size": patch,
        "image_size": math.isqrt(tokens - 1) * patch if tokens and patch else None,
        "mlp_ratio": hidden // dim if hidden and dim else None,
        "num_layers": _layers(shapes, "visual.transformer."),
        "out_dim": _size(shapes, ("visual.head", 1)),
    }


def _measure_vae(shapes: Shapes) -> Values:
    dim = _size(shapes, ("encoder.conv1.bias", 0), ("encoder.conv1.weight", 0))
    layers = _layers(shapes, "encoder.downsamples.")
    values: Values = {"dim": dim, "z_dim": _size(shapes, ("conv2.bias", 0), ("conv2.weight", 0))}
    if not dim or not layers:
        return values
    # Stages are runs of residual blocks; a resampling layer ends all but the last.
    widths: list[int | None] = []
    in_time: list[bool] = []
    blocks = [0]
    for index in range(layers):
        name = f"encoder.downsamples.{index}"
        if any(key.startswith(f"{name}.resample.") for key in shapes):
            in_time.append(any(key.startswith(f"{name}.time_conv.") for key in shapes))
            blocks.append(0)
        else:
            blocks[-1] += 1
            width = _size(shapes, (f"{name}.residual.6.bias", 0), (f"{name}.residual.3.gamma", 0))
            if blocks[-1] == 1:
                widths.append(width)
    if None not in widths:
        values["dim_mult"] = tuple(width // dim for width in widths if width)
        values["temporal_downsample"] = tuple(in_time)
        values["num_res_blocks"] = max(blocks)
    return values
