"""The Hopper kernel, played by an interpreter that finds races, against the same rounding in jnp and float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreter import interpreted, lower_for_cuda, teach

from x2v_jax.ops.attention.hopper import attention_hopper, attention_hopper_groups, attention_hopper_spans
from x2v_jax.ops.attention.hopper_config import PRECISIONS, HopperConfig
from x2v_jax.ops.attention.reference import attention_reference
from x2v_jax.ops.attention.simulated import attention_simulated
from x2v_jax.ops.attention.tiles import Span

D = 128
SCALE = D**-0.5
# Of the kernel to the same rounding elsewhere, and of the rounding to float32.
SAME = {"full": 4e-3, "int8": 1e-3, "e4m3": 1e-3, "int8_e4m3": 1e-3, "e4m3_all": 1e-3}
EXACT = {"full": 4e-3, "int8": 0.03, "e4m3": 0.045, "int8_e4m3": 0.055, "e4m3_all": 0.06}
ONE = HopperConfig(warpgroups=1)
ONE_SMALL = HopperConfig(warpgroups=1, block_kv=64)


@pytest.fixture(autouse=True)
def _teach(monkeypatch: pytest.MonkeyPatch):
    teach(monkeypatch)


def inputs(queries: int, keys: int, batch: int = 1, heads: int = 1, seed: int = 0) -> list[jax.Array]:
    """Keys have channels that are far from zero, which is what the mean is taken out for."""
    lengths = (queries, keys, keys)
    q, k, v = (
        jax.random.normal(jax.random.key(3 * seed + i), (batch, n, heads, D), jnp.bfloat16)
        for i, n in enumerate(lengths)
    )
    return [q, k + 3 * jax.random.normal(jax.random.key(77), (1, 1, heads, D), jnp.bfloat16), v]


def relative(x, y) -> float:
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def exact(q, k, v, length: int | None = None):
    wide = [x.astype(jnp.float32) for x in (q, k[:, :length], v[:, :length])]
    return attention_reference(*wide, scale=SCALE, with_log_sum_exp=True)


def same(q, k, v, precision: str, length: int | None = None):
    count = None if length is None else jnp.int32(length)
    return attention_reference(
        q, k, v, scale=SCALE, precision=precision, key_length=count, with_log_sum_exp=True
    )  # fmt: skip


def check(precision: str, queries: int, keys: int, length: int | None, config: HopperConfig, **sizes: int) -> None:
    arrays = inputs(queries, keys, **sizes)
    count = None if length is None else jnp.int32(length)
    kernel = functools.partial(attention_hopper, scale=SCALE, precision=precision, with_log_sum_exp=True, config=config)
    with interpreted():
        out, log_sum_exp = jax.jit(kernel)(*arrays, key_length=count)
    (near, near_lse), (far, far_lse) = same(*arrays, precision, length), exact(*arrays, length)
    # Tiles of another size round probabilities beside another maximum.
    factor = 1 if config.block_kv == 128 else 20
    assert out.dtype == jnp.bfloat16 and out.shape == arrays[0].shape
    assert relative(out, near) < SAME[precision] * factor
    assert relative(out, far) < EXACT[precision]
    np.testing.assert_allclose(log_sum_exp, near_lse, atol=2e-5)
    np.testing.assert_allclose(log_sum_exp, far_lse, atol=1e-4 if precision == "full" else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "length"),
    [(p, n) for p in ("full", "int8", "e4m3_all") for n in (1, 127, 128, 129, 300)]
    + [("e4m3", 129), ("int8_e4m3", 129), ("int8_e4m3", 300)],
)
def test_any_length_counts_exactly_so_many_keys(precision: str, length: int):
    check(precision, 40, 300, length, ONE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["full", "int8", "e4m3", "e4m3_all"])
def test_two_warpgroups_take_turns(precision: str):
    check(precision, 130, 392, None, HopperConfig(), heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "config"),
    [
        ("full", HopperConfig(ping_pong=False)),
        ("full", HopperConfig(stages=3, block_kv=64)),
        ("int8", HopperConfig(warpgroups=3)),
        ("e4m3_all", HopperConfig(warpgroups=1, probabilities="shared")),
        ("e4m3_all", HopperConfig(probabilities="shared", block_kv=64)),
        ("e4m3_all", HopperConfig(stages=4)),
    ],
)
def test_every_configuration_computes_the_same(precision: str, config: HopperConfig):
    check(precision, 72, 272, 270, config)


# No multiple of anything; one query; as many as a tile; text and image of cross attention.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "queries", "keys"),
    [("full", 1, 3), ("full", 64, 128), ("full", 65, 129), ("full", 9, 512), ("int8", 70, 257), ("e4m3_all", 3, 9)],
)
def test_any_number_of_queries_and_keys(precision: str, queries: int, keys: int):
    check(precision, queries, keys, None, ONE)


@pytest.mark.parametrize("precision", ["full", "e4m3_all"])
def test_a_batch_keeps_to_its_own_keys(precision: str):
    check(precision, 40, 136, 131, ONE_SMALL, batch=2, heads=2)


@pytest.mark.parametrize("precision", ["full", "e4m3_all"])
def test_rows_behind_the_length_count_for_nothing(precision: str):
    q, k, v = inputs(16, 256)
    k, v = k.at[:, 130:].set(1e4), v.at[:, 130:].set(-1e4)
    kernel = functools.partial(attention_hopper, scale=SCALE, precision=precision, config=ONE)
    with interpreted():
        out, _ = kernel(q, k, v, key_length=jnp.int32(130))
    assert relative(out, same(q, k, v, precision, 130)[0]) < SAME[precision]
    assert relative(out, exact(q, k, v, 130)[0]) < EXACT[precision]


@pytest.mark.parametrize(("precision", "factor"), [("full", 300.0), ("full", 0.0), ("int8", 300.0), ("int8", 0.0)])
def test_large_and_equal_scores_do_not_overflow(precision: str, factor: float):
    q, k, v = inputs(8, 130)
    with interpreted():
        out, _ = attention_hopper(q * factor, k, v, scale=SCALE, precision=precision, config=ONE)
    assert relative(out, same(q * factor, k, v, precision)[0]) < 5e-3


# A window that moves on by blocks of 72, with and without a sink; ends in one tile, on its edges and beyond.
CLIPS = {
    "causal": [Span(0, 72, 0, 72), Span(72, 144, 0, 144), Span(144, 216, 0, 216)],
    "window": [Span(0, 72, 0, 72), Span(72, 144, 64, 144), Span(144, 216, 130, 200)],
    "sink": [Span(0, 40, 0, 128), Span(40, 72, 130, 216, 24), Span(72, 216, 200, 320, 128)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "precision"),
    [("causal", "full"), ("window", "full"), ("sink", "full"), ("sink", "int8"), ("window", "e4m3_all")],
)
def test_one_kernel_serves_a_block_causal_clip(clip: str, precision: str):
    spans = CLIPS[clip]
    q, k, v = inputs(216, 320)
    kernel = functools.partial(attention_hopper_spans, spans=spans, scale=SCALE, precision=precision, config=ONE)
    with interpreted():
        out = jax.jit(kernel)(q, k, v)
    mask = np.zeros((216, 320), bool)
    for span in spans:
        mask[span.start : span.stop, : span.sink] = True
        mask[span.start : span.stop, span.first_key : span.stop_key] = True
    scores = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k))) * SCALE
    weights = jax.nn.softmax(np.where(mask, scores, -np.inf), axis=-1)
    assert relative(out, np.einsum("bhqk,bkhd->bqhd", weights, np.asarray(v, np.float64))) < EXACT[precision]
    if precision != "full":
        near, _ = attention_simulated(q, k, v, scale=SCALE, precision=precision, spans=spans)
        assert relative(out, near) < SAME[precision]


@pytest.mark.parametrize("group", [0, 2, 4])
def test_rows_are_read_where_they_lie_in_a_cache_of_all_layers(group: int):
    q, k, v = inputs(24, 136, batch=6)
    q = q[:2]
    kernel = functools.partial(attention_hopper_groups, scale=SCALE, config=ONE_SMALL)
    with interpreted():
        out = jax.jit(kernel)(q, k, v, first_group=jnp.int32(group), key_length=jnp.int32(131))
    assert relative(out, exact(q, k[group : group + 2], v[group : group + 2], 131)[0]) < SAME["full"]


BIG = {
    "14B, 480p": (1, 32_760, 32_760, 40),
    "14B, 720p": (1, 75_600, 75_600, 40),
    "1.3B, 480p": (2, 32_760, 32_760, 12),
    "text": (1, 32_760, 512, 40),
    "image": (1, 32_760, 257, 40),
    "ragged": (1, 1_001, 3_003, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "precision"),
    [(shape, precision) for shape in BIG for precision in PRECISIONS],
)
def test_real_shapes_lower_for_cuda(shape: str, precision: str):
    batch, queries, keys, heads = BIG[shape]
    q, k = (jax.ShapeDtypeStruct((batch, n, heads, D), jnp.bfloat16) for n in (queries, keys))
    length = jax.ShapeDtypeStruct((), jnp.int32)

    def attend(q, k, v, length):
        return attention_hopper(q, k, v, scale=SCALE, precision=precision, key_length=length, with_log_sum_exp=True)

    assert "mosaic_gpu_v2" in lower_for_cuda(attend, q, k, k, length)


def test_a_chunk_against_the_cache_of_30_layers_lowers_without_a_copy_of_rows():
    q = jax.ShapeDtypeStruct((1, 4_680, 12, D), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((30, 32_760, 12, D), jnp.bfloat16)
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def attend(q, k, v, group, length):
        return attention_hopper_groups(q, k, v, first_group=group, key_length=length, scale=SCALE)

    program = lower_for_cuda(attend, q, cache, cache, number, number)
    assert "mosaic_gpu_v2" in program
    made = [line for line in program.splitlines() if "32760x12x128" in line.rsplit("->", 1)[-1]]
    assert all("stablehlo" not in line or "mosaic_gpu_v2" in line for line in made)


def test_a_clip_of_seven_blocks_is_one_kernel():
    block = 4_680
    spans = [Span(i * block, (i + 1) * block, max(0, i - 4) * block, (i + 1) * block, 0) for i in range(7)]
    q = jax.ShapeDtypeStruct((1, 7 * block, 12, D), jnp.bfloat16)
    for precision in ("full", "int8"):
        program = lower_for_cuda(
            lambda q, k, v, p=precision: attention_hopper_spans(q, k, v, spans, scale=SCALE, precision=p), q, q, q
        )
        assert program.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
