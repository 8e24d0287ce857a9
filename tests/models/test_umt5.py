"""UMT5 encoder: what the reference case alone does not show."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.models import functional
from x2v_jax.models.config import Umt5Config
from x2v_jax.models.umt5 import Umt5Encoder, relative_position_buckets

TINY = Umt5Config(vocab_size=50, dim=16, dim_attn=24, dim_ffn=20, num_heads=3, num_layers=3)


@pytest.fixture(scope="module")
def model():
    return functional.split(Umt5Encoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.float32))


@jax.jit(static_argnums=0)
def _run(graphdef, params, ids, mask):
    return functional.merge(graphdef, params)(ids, mask)


def _encode(model, ids, mask):
    return np.asarray(_run(*model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32)))


def _bucket(relative: int, num_buckets: int, max_distance: int) -> int:
    half = num_buckets // 2
    base, distance, exact = (half if relative > 0 else 0), abs(relative), half // 2
    if distance < exact:
        return base + distance
    # 1e-6: exact borders such as 16 = 8 * 2 must not fall below themselves.
    far = exact + math.floor(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact) + 1e-6)
    return base + min(half - 1, far)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64), (8, 20)])
def test_buckets_equal_a_loop_over_pairs(num_buckets, max_distance):
    buckets = relative_position_buckets(160, num_buckets, max_distance)
    loop = [[_bucket(k - q, num_buckets, max_distance) for k in range(160)] for q in range(160)]
    np.testing.assert_array_equal(buckets, loop)
    assert buckets.dtype == np.int32 and buckets.max() == num_buckets - 1


def test_buckets_at_the_borders_of_the_published_table():
    after = relative_position_buckets(600, 32, 128)[0]
    assert [int(after[d]) for d in (0, 1, 7, 8, 11, 12, 16, 32, 64, 90, 91, 599)] == [
        0, 17, 23, 24, 24, 25, 26, 28, 30, 30, 31, 31,
    ]  # fmt: skip
    before = relative_position_buckets(600, 32, 128)[:, 0]
    np.testing.assert_array_equal(before[1:], after[1:] - 16)


@pytest.mark.slow
def test_features_do_not_depend_on_how_much_padding_there_is(model):
    ids = np.array([[3, 7, 11, 1], [9, 1, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    short = _encode(model, ids, mask)
    long = _encode(model, np.pad(ids, ((0, 0), (0, 9))), np.pad(mask, ((0, 0), (0, 9))))
    np.testing.assert_allclose(long[:, :4], short, atol=2e-6)
    assert not long[:, 4:].any()


def test_what_stands_in_the_padding_is_not_read(model):
    mask = np.array([[1, 1, 1, 0, 0]])
    a = _encode(model, [[3, 7, 1, 0, 0]], mask)
    b = _encode(model, [[3, 7, 1, 44, 21]], mask)
    np.testing.assert_array_equal(a, b)


def test_prompts_of_a_batch_do_not_mix(model):
    mask = np.ones((1, 4))
    one, two = _encode(model, [[2, 3, 4, 1]], mask), _encode(model, [[9, 8, 7, 1]], mask)
    both = _encode(model, [[2, 3, 4, 1], [9, 8, 7, 1]], np.ones((2, 4)))
    np.testing.assert_allclose(both, np.concatenate([one, two]), atol=2e-6)


def test_word_order_matters_only_through_the_position_biases(model):
    graphdef, params = model
    swapped = jnp.array([1, 0, 2])
    ids, mask = np.array([[3, 7, 11]]), np.ones((1, 3))
    assert np.abs(_encode(model, ids[:, swapped], mask) - _encode(model, ids, mask)[:, swapped]).max() > 1e-3

    flat = functional.flatten(params)
    bias = flat["blocks.pos_embedding.embedding"]
    assert bias.shape == (TINY.num_layers, TINY.num_buckets, TINY.num_heads)
    flat["blocks.pos_embedding.embedding"] = jnp.zeros_like(bias)
    blind = (graphdef, functional.unflatten(flat))
    np.testing.assert_allclose(_encode(blind, ids[:, swapped], mask), _encode(blind, ids, mask)[:, swapped], atol=2e-6)


def test_every_layer_has_weights_and_biases_of_its_own(model):
    for name, leaf in functional.flatten(model[1]).items():
        if name.startswith("blocks.") and "norm" not in name:
            assert np.abs(leaf[0] - leaf[1]).max() > 0, name


def test_every_parameter_is_used(model):
    graphdef, params = model
    ids, mask = jnp.array([[3, 7, 11, 1]]), jnp.ones((1, 4), jnp.int32)
    gradient = jax.grad(lambda p: (functional.merge(graphdef, p)(ids, mask) ** 3).sum())(params)
    for name, leaf in functional.flatten(gradient).items():
        # Each layer by itself: a layer that is skipped has a zero gradient.
        for layer in leaf if name.startswith("blocks.") else [leaf]:
            assert np.abs(layer).max() > 0, name


def test_bfloat16_matmuls_stay_close_and_give_float32(model):
    ids, mask = jnp.array([[3, 7, 11, 1]]), jnp.ones((1, 4), jnp.int32)
    exact = _encode(model, ids, mask)
    graphdef, _ = functional.abstract(lambda: Umt5Encoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    half = _run(graphdef, model[1], ids, mask)
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - exact) < 0.03 * np.linalg.norm(exact)


def test_the_full_size_has_the_published_parameters():
    _, params = functional.abstract(lambda: Umt5Encoder(Umt5Config(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    assert functional.parameter_count(params) == 5_680_910_336
    shapes = {name: leaf.shape for name, leaf in functional.flatten(params).items()}
    assert shapes == {
        "token_embedding.embedding": (256384, 4096),
        "blocks.norm1.scale": (24, 4096),
        "blocks.norm2.scale": (24, 4096),
        "blocks.attn.q.kernel": (24, 4096, 4096),
        "blocks.attn.k.kernel": (24, 4096, 4096),
        "blocks.attn.v.kernel": (24, 4096, 4096),
        "blocks.attn.o.kernel": (24, 4096, 4096),
        "blocks.ffn.gate.kernel": (24, 4096, 10240),
        "blocks.ffn.fc1.kernel": (24, 4096, 10240),
        "blocks.ffn.fc2.kernel": (24, 10240, 4096),
        "blocks.pos_embedding.embedding": (24, 32, 64),
        "norm.scale": (4096,),
    }
    assert all(leaf.dtype == jnp.bfloat16 for leaf in functional.flatten(params).values())


def test_the_full_size_runs_on_a_whole_prompt_by_shapes():
    config = dataclasses.replace(Umt5Config(), num_layers=2)
    graphdef, params = functional.abstract(lambda: Umt5Encoder(config, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    out = jax.eval_shape(lambda p, i, m: functional.merge(graphdef, p)(i, m), params, ids, ids)
    assert out.shape == (1, 512, 4096) and out.dtype == jnp.float32
