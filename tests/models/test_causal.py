"""The block-causal forward pass: who sees whom, a timestep in each frame, positions of any frame number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.errors import UserError
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, merge, split
from x2v_jax.models.rope import apply_rope, frame_shift_tables, rope_tables, rope_tables_at
from x2v_jax.models.wan import WanModel
from x2v_jax.ops.attention import Span, attention, attention_by_spans

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=12, text_len=5, freq_dim=16)
FRAMES = 7


@pytest.fixture(scope="module")
def params():
    params = jax.jit(lambda: split(WanModel(CONFIG, rngs=nnx.Rngs(0)))[1])()
    head = params["head"]["linear"]
    head["kernel"] = jax.random.normal(jax.random.key(9), head["kernel"].shape)
    return params


@pytest.fixture(scope="module")
def inputs():
    latents = jax.random.normal(jax.random.key(1), (2, FRAMES, 2, 4, 16))
    timestep = jnp.tile(jnp.array([[900.0], [400.0]]), (1, FRAMES))
    return latents, timestep, jax.random.normal(jax.random.key(2), (2, 5, 12))


@functools.cache
def forward(causal: CausalPattern | None):
    graphdef, _ = abstract(lambda: WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return jax.jit(lambda params, *inputs: merge(graphdef, params)(*inputs, causal=causal))


def test_a_timestep_in_each_frame_is_one_timestep_where_all_are_the_same(params, inputs):
    latents, timestep, text = inputs
    one = forward(None)(params, latents, timestep[:, 0], text)
    np.testing.assert_allclose(forward(None)(params, latents, timestep, text), one, rtol=1e-5, atol=1e-5)
    changed = forward(None)(params, latents, timestep.at[:, 3].set(10.0), text)
    assert float(jnp.abs(changed - one)[:, 3].max()) > 1e-2


def test_timesteps_that_are_not_one_a_frame_are_refused(params, inputs):
    latents, timestep, text = inputs
    with pytest.raises(ValueError, match="timesteps of shape"):
        forward(None)(params, latents, timestep[:, :3], text)


@pytest.mark.parametrize(
    "pattern",
    [
        CausalPattern(3),
        CausalPattern(2, window=4, sink=1),
        CausalPattern(3, window=5, independent_first_frame=True),
    ],
)
def test_a_frame_depends_on_the_frames_that_the_pattern_shows(pattern: CausalPattern, params, inputs):
    latents, timestep, text = inputs
    velocity = jax.jit(lambda x: forward(pattern)(params, x, timestep[:1], text[:1]))
    # Through L layers a frame is reached by what its visible frames see: the pattern's reachability, squared.
    sees = np.zeros((FRAMES, FRAMES), bool)
    for start, stop in pattern.blocks(FRAMES):
        sink, first = pattern.visible(stop)
        sees[start:stop, :sink] = sees[start:stop, first:stop] = True
    reached = (sees.astype(int) @ sees.astype(int)) > 0
    base = velocity(latents[:1])
    for frame in range(FRAMES):
        moved = jnp.abs(velocity(latents[:1].at[:, frame].add(1.0)) - base).max(axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(np.asarray(moved) > 0, reached[:, frame])


def test_one_block_of_all_frames_is_the_bidirectional_model(params, inputs):
    latents, timestep, text = inputs
    whole = forward(None)(params, latents, timestep[:, 0], text)
    np.testing.assert_allclose(
        forward(CausalPattern(FRAMES))(params, latents, timestep[:, 0], text), whole, rtol=1e-5, atol=1e-5
    )


def test_spans_equal_a_dense_mask():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 10, 3, 8)) for i in range(3))
    spans = [Span(0, 4, 0, 4), Span(4, 6, 2, 6), Span(6, 10, 7, 9, sink=2)]
    mask = np.zeros((10, 10), bool)
    for span in spans:
        mask[span.start : span.stop, : span.sink] = mask[span.start : span.stop, span.first_key : span.stop_key] = True
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5, -jnp.inf)
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(attention_by_spans(q, k, v, spans), expected, atol=1e-6)


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 3, 0, 4)],
        [Span(0, 2, 0, 4), Span(3, 4, 0, 4)],
        [Span(0, 4, 0, 5)],
        [Span(0, 4, 1, 4, sink=2)],
        [Span(0, 4, 4, 4)],
    ],
)
def test_spans_that_miss_queries_or_keys_are_refused(spans):
    x = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match=r"Span|spans"):
        attention_by_spans(x, x, x, spans)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_key_length_leaves_out_the_keys_behind_it(length: int):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((5, 9, 9)))
    cut = jax.jit(lambda n: attention(q, k.at[:, length:].set(100.0), v.at[:, length:].set(100.0), key_length=n))
    expected = attention(q, k[:, :length], v[:, :length])
    np.testing.assert_allclose(cut(jnp.int32(length)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 0}, "block is 0"),
        ({"block": 3, "sink": -1}, "sink is -1"),
        ({"block": 3, "window": 2}, r"window is 2 .* at least 3"),
        ({"block": 3, "window": 5, "sink": 3}, r"window is 5 .* at least 6"),
        ({"block": 2.0}, r"block is 2\.0"),
        ({"block": True}, "block is True"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_patterns_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        CausalPattern(**fields)


@pytest.mark.parametrize("start", [0, 20, 1023, 50_000, (1 << 20) - 3])
def test_traced_positions_are_as_exact_as_the_table_at_any_frame(start: int):
    exact = rope_tables((3, 2, 2), 128, start_frame=start)
    traced = jax.jit(lambda s: rope_tables_at(s + jnp.arange(3), (2, 2), 128))(jnp.int32(start))
    for ours, table in zip(traced, exact, strict=True):
        np.testing.assert_allclose(ours, table, atol=1e-6)


def test_turned_keys_turn_on_by_frames():
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 24))
    there = apply_rope(apply_rope(x, rope_tables((2, 2, 2), 24)), frame_shift_tables(jnp.int32(3000), 24))
    np.testing.assert_allclose(there, apply_rope(x, rope_tables((2, 2, 2), 24, start_frame=3000)), atol=1e-5)
