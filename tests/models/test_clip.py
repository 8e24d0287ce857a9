"""CLIP's visual tower: what the reference case alone does not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.models import functional
from x2v_jax.models.clip import ClipVisionTower
from x2v_jax.models.config import ClipConfig

TINY = ClipConfig(image_size=12, patch_size=4, dim=16, mlp_ratio=2, num_heads=2, num_layers=3, out_dim=8)


@pytest.fixture(scope="module")
def model():
    return functional.split(ClipVisionTower(TINY, rngs=nnx.Rngs(0), dtype=jnp.float32))


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(1), (2, 12, 12, 3))


@jax.jit(static_argnums=0)
def _encode(graphdef, params, pixels):
    return functional.merge(graphdef, params)(pixels)


def _used(model, pixels):
    graphdef, params = model
    gradient = jax.grad(lambda p: (_encode(graphdef, p, pixels) ** 3).sum())(params)
    return functional.flatten(gradient)


def test_gives_a_class_token_and_one_token_a_patch(model, pixels):
    features = _encode(*model, pixels)
    assert features.shape == (2, 1 + 9, 16) and features.dtype == jnp.float32


def test_the_last_block_the_norm_after_it_and_the_head_are_held_but_not_used(model, pixels):
    for name, leaf in _used(model, pixels).items():
        if name.startswith("blocks."):
            assert leaf.shape[0] == TINY.num_layers
            assert not leaf[-1].any(), name
            assert all(np.abs(layer).max() > 0 for layer in leaf[:-1]), name
        elif name.startswith(("post_norm.", "head")):
            assert not leaf.any(), name
        else:
            assert np.abs(leaf).max() > 0, name


def test_pictures_of_a_batch_do_not_mix(model, pixels):
    both = _encode(*model, pixels)
    one = jnp.concatenate([_encode(*model, pixels[:1]), _encode(*model, pixels[1:])])
    np.testing.assert_allclose(both, one, atol=2e-6)


def test_patches_are_read_row_by_row_as_a_convolution_with_that_stride(model, pixels):
    graphdef, params = model
    kernel = params["patch_embedding"]["kernel"]
    assert kernel.shape == (4, 4, 3, 16)
    expected = jax.lax.conv_general_dilated(
        pixels, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(2, 9, 16)
    embedding = functional.merge(graphdef, params).patch_embedding
    np.testing.assert_allclose(embedding(pixels), expected, atol=2e-6)


def test_moving_patches_together_with_their_positions_moves_their_features(model, pixels):
    graphdef, params = model
    # Upper and lower halves swapped: rows 0..3 and 8..11 of pixels, patches 0..2 and 6..8.
    swapped = jnp.concatenate([pixels[:, 8:], pixels[:, 4:8], pixels[:, :4]], axis=1)
    order = jnp.array([0, 7, 8, 9, 4, 5, 6, 1, 2, 3])
    flat = functional.flatten(params)
    flat["pos_embedding"] = flat["pos_embedding"][order]
    moved = _encode(graphdef, functional.unflatten(flat), swapped)
    np.testing.assert_allclose(moved, _encode(graphdef, params, pixels)[:, order], atol=2e-6)


def test_bfloat16_matmuls_stay_close_and_give_float32(model, pixels):
    exact = _encode(*model, pixels)
    graphdef, _ = functional.abstract(lambda: ClipVisionTower(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    half = _encode(graphdef, model[1], pixels)
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - exact) < 0.02 * np.linalg.norm(exact)


def test_the_full_size_has_the_published_parameters():
    graphdef, params = functional.abstract(lambda: ClipVisionTower(ClipConfig(), rngs=nnx.Rngs(0)))
    assert functional.parameter_count(params) == 632_076_800
    shapes = {name: leaf.shape for name, leaf in functional.flatten(params).items()}
    blocks = {
        "norm1.scale": (1280,),
        "norm1.bias": (1280,),
        "attn.to_qkv.kernel": (1280, 3840),
        "attn.to_qkv.bias": (3840,),
        "attn.proj.kernel": (1280, 1280),
        "attn.proj.bias": (1280,),
        "norm2.scale": (1280,),
        "norm2.bias": (1280,),
        "mlp.linear_1.kernel": (1280, 5120),
        "mlp.linear_1.bias": (5120,),
        "mlp.linear_2.kernel": (5120, 1280),
        "mlp.linear_2.bias": (1280,),
    }
    assert shapes == {
        "cls_embedding": (1280,),
        "pos_embedding": (257, 1280),
        "patch_embedding.kernel": (14, 14, 3, 1280),
        "pre_norm.scale": (1280,),
        "pre_norm.bias": (1280,),
        "post_norm.scale": (1280,),
        "post_norm.bias": (1280,),
        "head": (1280, 1024),
    } | {f"blocks.{name}": (32, *shape) for name, shape in blocks.items()}

    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    out = jax.eval_shape(lambda p, x: functional.merge(graphdef, p)(x), params, pixels)
    assert out.shape == (1, 257, 1280) and out.dtype == jnp.float32
