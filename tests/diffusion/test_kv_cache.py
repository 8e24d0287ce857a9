"""The cache holds, at any time, the sink and the latest frames, and turns the sink's keys as asked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig
from x2v_jax.models.rope import apply_rope, rope_tables

TOKENS, LAYERS = 2, 2
CONFIG = WanConfig(dim=12, ffn_dim=8, num_heads=1, num_layers=LAYERS)


def _cache(**layout) -> KVCache:
    return KVCache.empty(CONFIG, CacheLayout(frame_tokens=TOKENS, **layout), dtype=jnp.float32)


def _rows(frames) -> jax.Array:
    """Keys that say of which frame they are."""
    return jnp.broadcast_to(
        jnp.repeat(jnp.float32(frames), TOKENS)[None, :, None, None], (1, len(frames) * TOKENS, 1, 12)
    )


write = jax.jit(lambda cache, layer, k, v, start: cache.write(layer, k, v, start))


@jax.jit
def write_twice_and_read(cache, k, start):
    for _ in range(2):  # every step of a block writes to the same place
        cache = cache.write(1, k, -k, start)
    keys, values, length = cache.read(1, start + k.shape[1] // TOKENS)
    return cache, keys[0, :, 0, 0], values[0, :, 0, 0], length


GRID = [
    (window, sink, block)
    for window, sink, block in itertools.product((4, 7), (0, 1, 3), (1, 2, 3))
    if window >= sink + block
]


@pytest.mark.parametrize(("window", "sink", "block"), GRID)
def test_the_frames_of_the_published_rolling_cache_remain(window: int, sink: int, block: int):
    cache, published = _cache(window=window, sink=sink), []
    for start in range(0, 3 * window, block):
        frames = np.arange(start, start + block)
        cache, k, v, length = map(jax.device_get, write_twice_and_read(cache, _rows(frames), start))
        kept = k[:length].reshape(-1, TOKENS)
        # Self-Forcing's rule: what does not fit is taken out behind the sink, and the rest moves down.
        evicted = max(0, block + len(published) - window)
        published = published[:sink] + published[sink + evicted :] + frames.tolist()
        assert (kept == kept[:, :1]).all()
        assert sorted(kept[:, 0].tolist()) == published
        np.testing.assert_array_equal(v[:length], -k[:length])
    np.testing.assert_array_equal(cache.k[0], 0)  # the other layer


def test_a_first_block_of_one_frame_moves_nothing_else():
    cache = write(_cache(window=5, sink=1), 0, _rows([0]), _rows([0]), 0)
    for start in range(1, 13, 3):
        cache = write(cache, 0, _rows(range(start, start + 3)), _rows(range(start, start + 3)), start)
    assert sorted(np.asarray(cache.k[0, 0, ::TOKENS, 0, 0]).tolist()) == [0, 9, 10, 11, 12]


def test_to_start_again_nothing_has_to_be_cleared():
    cache = _cache(window=4)
    for start in (0, 2, 4):
        cache = write(cache, 0, _rows([start, start + 1]), _rows([start, start + 1]), start)
    cache = write(cache, 0, _rows([70, 71]), _rows([70, 71]), 0)
    k, _, length = cache.read(0, 2)
    np.testing.assert_array_equal(k[0, : int(length) : TOKENS, 0, 0], [70, 71])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_relative_sink_lies_just_before_the_window_for_ever(dtype):
    window, sink, block, grid = 6, 2, 2, (1, 2, 1)
    cache = KVCache.empty(CONFIG, CacheLayout(window, TOKENS, sink, relative=True), dtype=dtype)
    plain = [jax.random.normal(jax.random.key(i), (1, TOKENS, 1, 12)) for i in range(sink)]

    def turned(i: int, at: int) -> jax.Array:
        return apply_rope(plain[i], rope_tables(grid, 12, start_frame=at))

    first = jnp.concatenate([turned(i, i) for i in range(sink)], axis=1)
    cache = write(cache, 0, first, first, 0)
    for start in (2, 4, 6, 8, 2000, 1_000_000):
        rows = _rows([start] * block)
        cache = write(cache, 0, rows, rows, start)
        k, v, _ = cache.read(0, start + block)
        shift = max(0, start + block - window)
        expected = jnp.concatenate([turned(i, i + shift) for i in range(sink)], axis=1)
        np.testing.assert_allclose(
            np.asarray(k[:, : sink * TOKENS], np.float32), expected, atol=2e-5 if dtype == jnp.float32 else 0.05
        )
        np.testing.assert_array_equal(v[:, : sink * TOKENS], first.astype(dtype))


def test_no_gradient_reaches_what_was_written_before():
    @jax.grad
    def gradients(blocks):
        cache = _cache(window=4, sink=1, relative=True)
        for i in range(2):
            cache = cache.write(0, blocks[i], blocks[i], 2 * i)
        k, v, _ = cache.read(0, 4)
        return k.sum() + v.sum()

    first, second = jax.jit(gradients)(jnp.ones((2, 1, 2 * TOKENS, 1, 12)))
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_array_equal(second, 2)


def test_parts_of_frames_and_more_than_the_ring_are_refused():
    cache = _cache(window=4, sink=2)
    for rows in (3 * TOKENS, TOKENS + 1, 0):
        with pytest.raises(ValueError, match="rows are not 1 to 2 frames"):
            cache.write(0, jnp.zeros((1, rows, 1, 12)), jnp.zeros((1, rows, 1, 12)), 0)
    with pytest.raises(UserError, match="window is 2"):
        CacheLayout(window=2, frame_tokens=1, sink=2)
