"""The diffusion transformer: published sizes, patches in order, conditioning that reaches the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, merge, parameter_count, split
from x2v_jax.models.rope import apply_rope, axis_dims, rope_tables
from x2v_jax.models.wan import WanModel, _patchify, _unpatchify, timestep_embedding

TINY = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 12, "text_len": 5, "freq_dim": 16}


def _model(config: WanConfig) -> WanModel:
    graphdef, _ = abstract(lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    model = merge(graphdef, jax.jit(lambda: split(WanModel(config, rngs=nnx.Rngs(0)))[1])())
    # A new model's head is zero; these tests want to see through it.
    model.head.linear.kernel[...] = jax.random.normal(jax.random.key(9), model.head.linear.kernel.shape)
    return model


@pytest.fixture(scope="module")
def t2v() -> WanModel:
    return _model(WanConfig(**TINY))


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    latents = jax.random.normal(jax.random.key(1), (2, 3, 4, 6, 16))
    return latents, jnp.array([900.0, 100.0]), jax.random.normal(jax.random.key(2), (2, 5, 12))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (WanConfig.t2v_1_3b(), 1_418_996_800),
        (WanConfig.t2v_14b(), 14_288_491_584),
        (WanConfig.i2v_14b(), 16_394_878_784),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(config: WanConfig, count: int):
    _, params = abstract(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    assert parameter_count(params) == count


def test_patches_come_back_in_place():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 5))
    tokens = _patchify(x, (1, 2, 2))
    assert tokens.shape == (2, 3 * 2 * 3, 4 * 5)
    np.testing.assert_array_equal(_unpatchify(tokens, (3, 2, 3), (1, 2, 2)), x)


@pytest.mark.slow
def test_every_input_reaches_the_velocity(t2v: WanModel, inputs: tuple[jax.Array, jax.Array, jax.Array]):
    latents, timestep, text = inputs
    base = t2v(latents, timestep, text)
    assert base.shape == latents.shape
    assert base.dtype == jnp.float32
    for changed in ((latents + 0.1, timestep, text), (latents, timestep + 50, text), (latents, timestep, text + 0.5)):
        assert float(jnp.abs(t2v(*changed) - base).max()) > 1e-3


def test_padding_rows_of_the_text_are_attended(t2v: WanModel, inputs: tuple[jax.Array, jax.Array, jax.Array]):
    latents, timestep, text = inputs
    shorter = text.at[:, 3:].set(0.0)
    assert float(jnp.abs(t2v(latents, timestep, shorter) - t2v(latents, timestep, shorter[:, :3])).max()) > 1e-4


def test_items_of_a_batch_do_not_mix(t2v: WanModel, inputs: tuple[jax.Array, jax.Array, jax.Array]):
    latents, timestep, text = inputs
    together = t2v(latents, timestep, text)
    alone = t2v(latents[1:], timestep[1:], text[1:])
    np.testing.assert_allclose(together[1:], alone, atol=2e-5)


@pytest.mark.slow
def test_image_to_video_takes_mask_latents_and_features():
    config = WanConfig(**TINY, model_type="i2v", in_dim=36, clip_dim=8)
    model = _model(config)
    latents = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 36))
    features = jax.random.normal(jax.random.key(2), (1, 7, 8))
    text = jnp.zeros((1, 5, 12))
    base = model(latents, jnp.array([500.0]), text, features)
    assert base.shape == (1, 2, 4, 4, 16)
    assert float(jnp.abs(model(latents, jnp.array([500.0]), text, features.at[..., 0].add(3.0)) - base).max()) > 1e-4
    with pytest.raises(ValueError, match="image_features"):
        model(latents, jnp.array([500.0]), text)


@pytest.mark.slow
def test_a_new_model_predicts_zero_velocity(inputs: tuple[jax.Array, jax.Array, jax.Array]):
    model = WanModel(WanConfig(**TINY), rngs=nnx.Rngs(0))
    assert float(jnp.abs(model(*inputs)).max()) == 0.0


def test_splitting_and_merging_keeps_the_function(t2v: WanModel, inputs: tuple[jax.Array, jax.Array, jax.Array]):
    np.testing.assert_array_equal(merge(*split(t2v))(*inputs), t2v(*inputs))


def test_bfloat16_stays_close_to_float32(t2v: WanModel, inputs: tuple[jax.Array, jax.Array, jax.Array]):
    graphdef, _ = abstract(lambda: WanModel(WanConfig(**TINY), rngs=nnx.Rngs(0)))
    exact, half = t2v(*inputs), merge(graphdef, split(t2v)[1])(*inputs)
    assert float(jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact)) < 0.03


def test_timestep_embedding_is_cosine_then_sine():
    embedding = timestep_embedding(jnp.array([0.0, 1000.0]), 8)
    np.testing.assert_allclose(embedding[0], [1, 1, 1, 1, 0, 0, 0, 0])
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(embedding[1, :4], np.cos(1000 * frequencies), atol=1e-4)


def test_rope_splits_128_channels_as_published():
    assert axis_dims(128) == (44, 42, 42)
    assert sum(axis_dims(32)) == 32


def test_rope_turns_adjacent_pairs_as_complex_numbers():
    tables = rope_tables((2, 3, 2), 12, start_frame=5)
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 12, 1, 12)))
    turned = np.asarray(apply_rope(jnp.asarray(x), tables))
    token = 2 * 1 + 6 * 1  # frame 1, row 1, column 0
    dims = axis_dims(12)
    angles = np.concatenate([p * 10_000.0 ** (-np.arange(0, d, 2) / d) for p, d in zip((6, 1, 0), dims, strict=True)])
    expected = (x[0, token, 0, 0::2] + 1j * x[0, token, 0, 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned[0, token, 0, 0::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[0, token, 0, 1::2], expected.imag, atol=1e-5)
