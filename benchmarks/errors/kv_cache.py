"""What is lost when keys and values are kept in fewer bits, on CPU, with a float32 cache as truth.

    python -m benchmarks.errors.kv_cache --checkpoint=assets/shapes

Prints a table in Markdown. Attention: one block's queries over a full window, heads of 128 channels, for activations
with tails of several weights. Rollout: latents of five blocks, four steps each, window of three blocks; of a network of
random weights and, with --checkpoint, of a trained one, for a random text embedding. Errors are of the L2 norm,
relative to that of the truth.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import split
from x2v_jax.models.networks import abstract_network, make_network

NARROW = ("bfloat16", "int8", "int8_e4m3")
_TOKENS, _WINDOW = 64, 9
_SIGMAS = (1.0, 0.9375, 0.8333, 0.625)
_RANDOM = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=32, text_len=8, freq_dim=64)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape)


def _heavy_tailed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.t(key, 3.0, shape)


def _outlier_channels(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _normal(key, shape).at[..., :2].multiply(20.0)


DRAWS = {
    "normal": _normal,
    "Student's t, 3 degrees of freedom": _heavy_tailed,
    "normal, two channels of 128 twenty times the others": _outlier_channels,
}


def attention_errors(kind: str) -> list[float]:
    config = WanConfig(dim=512, ffn_dim=8, num_heads=4, num_layers=1)
    layout = CacheLayout(_WINDOW, _TOKENS)
    shape = (1, _WINDOW * _TOKENS, 4, 128)
    keys, values, q = (DRAWS[kind](jax.random.key(i), shape) for i in range(3))
    # So that the logits are spread as after the norms of queries and keys, whatever the tails.
    q, keys = (x / jnp.sqrt(jnp.mean(x**2)) for x in (q, keys))

    def attend(dtype: str) -> np.ndarray:
        cache = KVCache.empty(config, layout, dtype=dtype).write(0, keys, values, 0)
        return np.asarray(cache.attend(0, q[:, : 3 * _TOKENS], _WINDOW))

    truth = attend("float32")
    return [_relative(attend(dtype), truth) for dtype in NARROW]


def rollout_errors(config: WanConfig, params: Any, size: tuple[int, int], text: jax.Array) -> list[float]:
    graphdef, _ = abstract_network(config, dtype=jnp.float32)
    plan = RolloutPlan(_SIGMAS, block=3, mode="sliding", window=_WINDOW)
    noise, renoise = keyed_noise(jax.random.key(1))

    def video(dtype: str) -> np.ndarray:
        rollout = Rollout(graphdef, config, plan, size, cache_dtype=dtype)
        context = rollout.prepare(params, text)
        return np.concatenate(list(rollout.stream(params, context, noise, renoise, 15)), axis=1)

    truth = video("float32")
    return [_relative(video(dtype), truth) for dtype in NARROW]


def random_network() -> tuple[WanConfig, Any]:
    params = jax.jit(lambda: split(make_network(_RANDOM, rngs=nnx.Rngs(0)))[1])()
    # A new model's last layer is zero.
    head = params["head"]["linear"]
    head["kernel"] = 0.05 * jax.random.normal(jax.random.key(2), head["kernel"].shape)
    return _RANDOM, params


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.errors.kv_cache", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a native text-to-video checkpoint, e.g. assets/shapes")
    options = parser.parse_args(arguments)
    print(f"| relative error | {' | '.join(NARROW)} |\n|---|{'---|' * len(NARROW)}")
    for kind in DRAWS:
        _print(f"attention, {kind}", attention_errors(kind))
    config, params = random_network()
    text = jax.random.normal(jax.random.key(3), (1, config.text_len, config.text_dim))
    _print("latents of 5 blocks, random weights", rollout_errors(config, params, (8, 8), text))
    if options.checkpoint is not None:
        checkpoint = open_checkpoint(options.checkpoint)
        config: Any = checkpoint.config("transformer")
        text = jax.random.normal(jax.random.key(3), (1, config.text_len, config.text_dim))
        params = checkpoint.load("transformer", dtype="float32")
        name = f"latents of 5 blocks, {options.checkpoint.name}"
        _print(name, rollout_errors(config, params, (8, 8), text))
    return 0


def _print(name: str, errors: list[float]) -> None:
    print(f"| {name} | {' | '.join(f'{error:.2%}' for error in errors)} |", flush=True)


def _relative(a: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(a - truth) / np.linalg.norm(truth))


if __name__ == "__main__":
    sys.exit(main())
