"""Networks, with the published weights put through the converter's own tables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.reference.cases_lib.case import Case
from tests.reference.cases_lib.weights import to_native
from x2v_jax.checkpoint.names import wan
from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.functional import Params, flatten, merge, unflatten
from x2v_jax.models.networks import abstract_network


def dit(case: Case) -> dict[str, Any]:
    """velocity [B,C,F,H,W] of one forward pass of the transformer."""
    config = WanConfig.from_dict(case.config)
    latents, image_features = _channels_last(case.inputs["latents"]), None
    if config.model_type == "i2v":
        image_features = jnp.asarray(case.inputs["clip_features"])
        config = dataclasses.replace(config, clip_dim=image_features.shape[-1])
        latents = jnp.concatenate([latents, _channels_last(case.inputs["image_condition"])], axis=-1)
    text = np.zeros((latents.shape[0], config.text_len, config.text_dim), np.float32)
    for i in range(len(text)):
        rows = case.inputs[f"text_{i}"]
        text[i, : len(rows)] = rows
    graphdef, params = load_network("transformer", config, case.weights)
    timestep = jnp.asarray(case.inputs["timestep"], jnp.float32)
    forward = jax.jit(lambda params, *args: merge(graphdef, params)(*args))
    return {"velocity": _channels_first(forward(params, latents, timestep, jnp.asarray(text), image_features))}


def vae(case: Case) -> dict[str, Any]:
    """latents of a video, video of latents, and the latents of the first frame by itself."""
    config = VaeConfig.from_dict(case.config)
    graphdef, params = load_network("vae", config, case.weights)
    encode = jax.jit(lambda params, video: merge(graphdef, params).encode(video))
    decode = jax.jit(lambda params, latents: merge(graphdef, params).decode(latents))
    video = _channels_last(case.inputs["video"])
    return {
        "latents": _channels_first(encode(params, video)),
        "video": _channels_first(decode(params, _channels_last(case.inputs["latents"]))),
        "first_frame": _channels_first(encode(params, video[:, :1])),
    }


def umt5(case: Case) -> dict[str, Any]:
    """hidden [B,L,D] of the text encoder, zero past the mask."""
    graphdef, params = load_network("text_encoder", Umt5Config.from_dict(case.config), case.weights)
    ids, mask = (jnp.asarray(case.inputs[name], jnp.int32) for name in ("ids", "mask"))
    return {"hidden": jax.jit(lambda params: merge(graphdef, params)(ids, mask))(params)}


def clip(case: Case) -> dict[str, Any]:
    """features [B,1+N,D] of the visual tower after all blocks but the last."""
    config = ClipConfig.from_dict(case.config)
    graphdef, params = load_network("image_encoder", config, case.weights)
    pixels = jnp.moveaxis(jnp.asarray(case.inputs["pixels"]), 1, -1)
    return {"features": jax.jit(lambda params: merge(graphdef, params)(pixels))(params)}


def load_network(component: str, config: Any, weights: dict[str, np.ndarray]) -> tuple[nnx.GraphDef, Params]:
    """A network in float32 with weights given by official names.

    Raises:
        ValueError: the weights are not exactly what the table asks for, or the table not what the network has.
    """
    rows = wan.table(component, config)
    keys = {key for row in rows for key in row.official_keys}
    if keys != set(weights):
        raise ValueError(f"{component}: missing {sorted(keys - set(weights))}, left over {sorted(set(weights) - keys)}")
    flat = {row.native: jnp.asarray(to_native(row, weights), jnp.float32) for row in rows}
    graphdef, expected = abstract_network(config, dtype=jnp.float32)
    shapes = {name: leaf.shape for name, leaf in flatten(expected).items()}
    if shapes != {name: array.shape for name, array in flat.items()}:
        raise ValueError(f"{component}: the table of names does not describe the network {shapes}")
    return graphdef, unflatten(flat)


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), 1, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)
