"""The cache holds, at any time, the sink and the latest frames, and turns the sink's keys as asked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from x2v_jax.diffusion.kv_cache import CacheLayout, KVCache
from x2v_jax.diffusion.kv_storage import EightBit
from x2v_jax.errors import UserError
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.rope import apply_rope, rope_tables
from x2v_jax.ops.attention import in_parts

TOKENS, LAYERS = 2, 2
CONFIG = WanConfig(dim=12, ffn_dim=8, num_heads=1, num_layers=LAYERS)


def _cache(dtype="float32", **layout) -> KVCache:
    return KVCache.empty(CONFIG, CacheLayout(frame_tokens=TOKENS, **layout), dtype=dtype)


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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """Rows are read 3 at a time, which is no multiple of a frame's 2."""
    monkeypatch.setattr(in_parts, "_FEW_BYTES", 0)
    monkeypatch.setattr(in_parts, "_ROWS", 3)


def _dense(q, k, v, visible: np.ndarray) -> np.ndarray:
    """Attention under a mask over all frames there ever were, in float64."""
    mask = np.repeat(np.repeat(visible, TOKENS, 0), TOKENS, 1)
    scores = np.where(mask, np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / q.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "sink", "block", "dtype", "bound"),
    [(*case, "float32", 1e-5) for case in GRID]
    + [(*GRID[i], dtype, bound) for i in (4, -1) for dtype, bound in (("int8", 0.02), ("int8_e4m3", 0.06))],
)
def test_attention_to_the_cache_is_that_under_a_dense_mask(small_parts, window, sink, block, dtype, bound):
    frames = -(-2 * window // block) * block + block
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), (2, frames * TOKENS, 1, 12))) for i in range(3))
    visible = np.zeros((frames, frames), bool)
    for start, stop in CausalPattern(block, window, sink).blocks(frames):
        kept, first = CausalPattern(block, window, sink).visible(stop)
        visible[start:stop, :kept] = visible[start:stop, first:stop] = True

    @jax.jit
    def step(cache, q, k, v, start):
        cache = cache.write(1, k, v, start)
        return cache, cache.attend(1, q, start + block)

    cache, out = KVCache.empty(CONFIG, CacheLayout(window, TOKENS, sink), 2, dtype), []
    for start in range(0, frames, block):
        rows = np.s_[:, start * TOKENS : (start + block) * TOKENS]
        cache, y = step(cache, q[rows], k[rows], v[rows], start)
        out.append(np.asarray(y))
    expected = _dense(q, k, v, visible)
    if dtype == "float32":
        np.testing.assert_allclose(np.concatenate(out, axis=1), expected, atol=bound)
    assert np.linalg.norm(np.concatenate(out, axis=1) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize("dtype", ["int8", "int8_e4m3"])
def test_8_bits_are_half_the_bytes_of_16(dtype: str):
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)

    def size(dtype, sink: int = 0) -> int:
        layout = CacheLayout(21, 1560, sink, relative=True)
        leaves = jax.tree.leaves(jax.eval_shape(lambda: KVCache.empty(config, layout, dtype=dtype)))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    assert size(dtype) / size("bfloat16") == 0.5 + 2 / 128
    # Of three frames the keys are kept in 16 bits as well.
    assert size(dtype, sink=3) / size("bfloat16", sink=3) < 0.55


def test_in_8_bits_a_row_is_what_was_written_there_last():
    cache = _cache(window=4, dtype="int8")
    for start in (0, 2, 4, 6):
        k = jax.random.normal(jax.random.key(start), (1, 2 * TOKENS, 1, 12)) * 10.0**start
        cache = write(cache, 0, k, -k, start)
        again, _, _ = write(cache, 0, k, -k, start).read(0, start + 2)
        rows = np.s_[:, start % 4 * TOKENS : (start % 4 + 2) * TOKENS]
        got, values, length = cache.read(0, start + 2)
        assert int(length) == min(start + 2, 4) * TOKENS
        np.testing.assert_allclose(got[rows], k, atol=float(jnp.abs(k).max()) / 250)
        np.testing.assert_array_equal(values[rows], -got[rows])
        np.testing.assert_array_equal(again, got)


def test_in_8_bits_a_sink_is_rounded_once_however_often_it_was_turned():
    layout = CacheLayout(4, TOKENS, 1, relative=True)
    exact, ours = (KVCache.empty(CONFIG, layout, dtype=dtype) for dtype in ("float32", "int8"))
    assert isinstance(ours.k, EightBit) and ours.sink_k is not None and ours.sink_k.dtype == jnp.bfloat16
    k = jax.random.normal(jax.random.key(0), (1, TOKENS, 1, 12))
    for start in (0, *range(1, 400)):
        exact, ours = (write(cache, 0, k, k, start) for cache in (exact, ours))
    (near, _, _), (got, _, _) = exact.read(0, 400), ours.read(0, 400)
    np.testing.assert_allclose(got[:, :TOKENS], near[:, :TOKENS], atol=float(jnp.abs(k).max()) / 120)


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
