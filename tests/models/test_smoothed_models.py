"""Smoothed networks compute what the others do, and lose less where few channels are large."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smooth_checkpoints
import tiny_models
from flax import nnx

from x2v_jax.checkpoint.names import wan
from x2v_jax.checkpoint.names.smoothing import ASIDE
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.open import open_native
from x2v_jax.checkpoint.quantize.eight_bit import quantize
from x2v_jax.checkpoint.quantize.smoothing import Smoother
from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.models import functional
from x2v_jax.models.activation_stats import listening
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.host_blocks import with_blocks_on_host
from x2v_jax.models.wan import WanModel
from x2v_jax.ops.choice import OpChoice

Flat = dict[str, np.ndarray]


def smoothed(folder: pathlib.Path, config: Any, flat: Flat, calibration, quantization: str | None = None) -> Flat:
    """The parameters of the smoothed network, of floats or in 8 bits."""
    components = {"transformer": (config, flat)}
    tiny_models.write_checkpoint(folder, image=config.model_type == "i2v", changes={"components": components})
    smoother = Smoother(calibration, 0.5, open_native(open_checkpoint(folder), "transformer").found.tensors)
    result = {}
    for row in wan.table("transformer", config):
        value = flat[row.native]
        if smoother.takes(row):
            value = np.stack([layer * smoother.vector(row, i) for i, layer in enumerate(value)])
        if not row.is_quantizable:
            result[row.native] = value
            continue
        factors = [smoother.matrix(row, i) for i in range(config.num_layers)]
        if quantization is None:
            turned = np.array(value.swapaxes(1, 2))
            for layer, own in zip(turned, factors, strict=True):
                own.apply(layer)
            result[row.native] = turned.swapaxes(1, 2)
        else:
            pairs = [quantize(w.T, quantization, "w", own) for w, own in zip(value, factors, strict=True)]
            weight, scale = (part.native for part in row.quantized())
            result |= {weight: np.stack([p[0] for p in pairs]), scale: np.stack([p[1] for p in pairs])}
    for name, stream in smoother.streams().items():
        if not name.startswith(ASIDE):
            result[name] = np.concatenate(list(stream.pieces()))
    return result


def network(config: Any, flat: Flat, *, host: bool = False, **options: Any):
    def make():
        made = WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32, **options)
        return with_blocks_on_host(made) if host else made

    graphdef, shapes = functional.abstract(make)
    assert {n: x.shape for n, x in functional.flatten(shapes).items()} == {n: x.shape for n, x in flat.items()}
    params = functional.unflatten({name: jnp.asarray(value) for name, value in flat.items()})
    return lambda call: jax.jit(lambda params: call(functional.merge(graphdef, params)))(params)


def inputs(config: Any, frames: int = 2):
    rng = np.random.default_rng(3)
    latents = jnp.asarray(rng.standard_normal((1, frames, 4, 6, config.in_dim)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((1, config.text_len, config.text_dim)), jnp.float32)
    image = jnp.asarray(rng.standard_normal((1, 5, config.clip_dim)), jnp.float32)
    return latents, text, image if config.model_type == "i2v" else None


def relative(one, other) -> float:
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


@pytest.fixture
def case(tmp_path):
    def make(config: Any):
        flat = tiny_models.random_parameters("transformer", config)
        rng = np.random.default_rng(1)
        flat["blocks.norm3.bias"] = rng.standard_normal(flat["blocks.norm3.bias"].shape).astype(np.float32)
        calibration = smooth_checkpoints.recording(tmp_path / "c.safetensors", config)
        return flat, smoothed(tmp_path / "source", config, flat, calibration)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [pytest.param(tiny_models.T2V, id="t2v"), pytest.param(tiny_models.I2V, id="i2v", marks=pytest.mark.long)],
)
def test_without_rounding_the_result_is_the_same(case, config):
    """Whether frames share a timestep or have their own, whatever gradients keep, wherever weights lie."""
    flat, even = case(config)
    changed = [n for n in flat if not np.array_equal(flat[n], even[n])]
    assert len(changed) == 8 + 2 + 2 + (2 if config.model_type == "i2v" else 0)  # matrices, biases, norm3, of v_img
    latents, text, image = inputs(config)
    for timestep in (jnp.full((1,), 700.0), jnp.asarray([[300.0, 900.0]])):
        expected = network(config, flat)(lambda model, t=timestep: model(latents, t, text, image))
        for options in ({}, {"remat": "block"}, {"host": True}):
            made = network(config, even, smoothed=True, **options)
            assert relative(made(lambda model, t=timestep: model(latents, t, text, image)), expected) < 2e-5


@pytest.mark.slow
def test_every_causal_way_of_attending_gives_the_same(case):
    config = tiny_models.T2V
    flat, even = case(config)
    latents, text, _ = inputs(config)
    timestep = jnp.asarray([[300.0, 900.0]])

    def every_way(model):
        context, parts = model.cross_keys(text), []
        cache = KVCache.empty(config, CacheLayout(window=2, frame_tokens=6), batch=1, dtype="float32")
        for frame in range(2):
            own = slice(frame, frame + 1)
            velocity, cache = model.with_cache(latents[:, own], timestep[:, own], context, cache, jnp.asarray(frame))
            parts.append(velocity)
        last = latents[:, 1:], timestep[:, 1:], context, cache.k, cache.v, jnp.asarray(1), jnp.asarray(6)
        whole = model(latents, timestep, text, causal=CausalPattern(block=1))
        return jnp.concatenate(parts, axis=1), model.after_frames(*last), whole

    for one, other in zip(
        network(config, even, smoothed=True)(every_way), network(config, flat)(every_way), strict=True
    ):
        assert relative(one, other) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["8bit", "16bit"])
@pytest.mark.parametrize("factor", [20, 100])
def test_smoothing_takes_the_loss_of_a_few_large_channels(tmp_path, activations, factor):
    """Two channels of both modulated inputs, of norm3 and of v are `factor` times the others."""
    config = tiny_models.T2V
    flat = tiny_models.random_parameters("transformer", config)
    flat["blocks.modulation"][:, [1, 4], :2] = factor - 1
    flat["blocks.norm3.scale"][:, :2] = factor
    for attention in ("self_attn", "cross_attn"):
        flat[f"blocks.{attention}.v.kernel"][..., :2] *= factor
    for matrix in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o"):
        flat[f"blocks.{matrix}.kernel"][:, :2] /= factor  # so that large channels matter as much as the others
    flat["blocks.ffn.linear_1.kernel"][:, :2] /= factor
    latents, text, _ = inputs(config)
    call = lambda model: model(latents, jnp.full((1,), 700.0), text)  # noqa: E731
    calibration = smooth_checkpoints.recording(tmp_path / "c.safetensors", config)

    def hear(name: str, layer: int, largest: np.ndarray) -> None:
        calibration.maxima[name][layer] = largest

    with listening(hear):
        expected = network(config, flat)(call)
    options: dict[str, Any] = {"quantization": "int8", "ops": OpChoice(linear_activations=activations)}
    even = smoothed(tmp_path / "source", config, flat, calibration, "int8")
    error = relative(network(config, even, smoothed=True, **options)(call), expected)
    rows = [row for row in wan.table("transformer", config) if row.is_quantizable]
    plain = {name: value for name, value in flat.items() if name not in {row.native for row in rows}}
    for row in rows:
        pairs = [quantize(w.T, "int8", "w") for w in flat[row.native]]
        weight, scale = (part.native for part in row.quantized())
        plain |= {weight: np.stack([p[0] for p in pairs]), scale: np.stack([p[1] for p in pairs])}
    before = relative(network(config, plain, **options)(call), expected)
    if activations == "8bit":
        assert error < 0.03 and error < before / 2, (error, before)
    else:
        assert error < 0.03, (error, before)
