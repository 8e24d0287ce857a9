"""The causal VAE: chunked equals whole, the future is invisible, and its convolutions are those of three axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2v_jax.models.config import VaeConfig
from x2v_jax.models.functional import abstract, merge, parameter_count, split
from x2v_jax.models.vae import WanVae
from x2v_jax.models.vae_blocks import conv3d_valid_in_time
from x2v_jax.models.vae_pieces import decode_tiled

CONFIG = VaeConfig(dim=4, num_res_blocks=1)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    graphdef, _ = abstract(lambda: WanVae(CONFIG, rngs=nnx.Rngs(0)))
    # One compiled program makes all parameters; made one by one they take much longer.
    return merge(graphdef, jax.jit(lambda: split(WanVae(CONFIG, rngs=nnx.Rngs(0)))[1])())


@pytest.fixture(scope="module")
def video() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (1, 13, 16, 24, 3), minval=-1.0, maxval=1.0)


@pytest.fixture(scope="module")
def latents() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (1, 4, 4, 4, 16))


@pytest.mark.slow
def test_encoding_in_chunks_equals_encoding_the_whole(vae: WanVae, video: jax.Array):
    whole = jax.jit(vae.encode)(video)
    assert whole.shape == (1, 4, 2, 3, 16)
    first, cache = jax.jit(vae.encode_chunk)(video[:, :1])
    second, cache = jax.jit(vae.encode_chunk)(video[:, 1:5], cache)
    third, _ = jax.jit(vae.encode_chunk)(video[:, 5:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], 1), whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frames_per_chunk", [1, 2, 3])
def test_decoding_in_chunks_equals_decoding_the_whole(vae: WanVae, latents: jax.Array, frames_per_chunk: int):
    whole = jax.jit(vae.decode)(latents)
    assert whole.shape == (1, 13, 32, 32, 3)
    decode_chunk = jax.jit(vae.decode_chunk)
    piece, cache = decode_chunk(latents[:, :1], None)
    pieces = [piece]
    for start in range(1, latents.shape[1], frames_per_chunk):
        piece, cache = decode_chunk(latents[:, start : start + frames_per_chunk], cache)
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)


def test_a_single_frame_is_coded_alone(vae: WanVae, video: jax.Array):
    latent = jax.jit(vae.encode)(video[:, :1])
    np.testing.assert_allclose(latent, jax.jit(vae.encode)(video)[:, :1], atol=1e-6)
    assert jax.eval_shape(vae.decode, latent).shape == (1, 1, 16, 24, 3)


@pytest.mark.slow
def test_no_gradient_flows_from_a_latent_frame_to_later_pixels(vae: WanVae, video: jax.Array):
    def second_latent(video: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(vae.encode(video)[:, 1]))

    gradient = jax.jit(jax.grad(second_latent))(video)
    assert jnp.all(gradient[:, 5:] == 0)
    assert jnp.any(gradient[:, 1:5] != 0)


@pytest.mark.slow
def test_no_gradient_flows_from_a_pixel_to_later_latent_frames(vae: WanVae, latents: jax.Array):
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(vae.decode(z)[:, 1:5]))))(latents * 0.1)
    assert jnp.all(gradient[:, 2:] == 0)
    assert jnp.any(gradient[:, 1] != 0)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_convolutions_of_three_frames_are_those_of_three_axes(frames: int):
    before, x, kernel = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 2, 5, 4, 3), (2, frames, 5, 4, 3), (3, 3, 3, 3, 6)])
    )
    layout = ("NDHWC", "DHWIO", "NDHWC")
    joined = jnp.concatenate([before, x], axis=1)
    exact = jax.lax.conv_general_dilated(joined, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=layout)
    np.testing.assert_allclose(conv3d_valid_in_time(before, x, kernel), exact, atol=1e-4)


def test_frame_counts_other_than_4n_plus_1_are_refused(vae: WanVae, video: jax.Array):
    with pytest.raises(ValueError, match=r"4n\+1 frames, got 12"):
        vae.encode(video[:, :12])


def test_latents_are_normalised_by_the_config(vae: WanVae, latents: jax.Array):
    np.testing.assert_allclose(vae.normalize_latents(vae.denormalize_latents(latents)), latents, atol=1e-5)
    mean = jnp.asarray(CONFIG.latents_mean)
    np.testing.assert_allclose(vae.denormalize_latents(jnp.zeros((1, 1, 1, 1, 16))), mean[None, None, None, None])


def test_one_tile_is_the_whole(vae: WanVae):
    latents = np.asarray(jax.random.normal(jax.random.key(3), (1, 1, 4, 6, 16)))
    decode = jax.jit(vae.decode)
    np.testing.assert_allclose(decode_tiled(decode, latents), np.asarray(decode(latents)), atol=1e-5)


@pytest.mark.parametrize(("tile", "overlap"), [(10, 6), (5, 2), (8, 0)])
def test_tiles_are_put_where_they_belong_and_blended_to_one(tile: int, overlap: int):
    def decode(z: np.ndarray) -> np.ndarray:
        # A decoder that sees one latent only: whatever the tiles, the result must be that of the whole.
        return np.repeat(np.repeat(z[..., :3], 8, axis=2), 8, axis=3)

    latents = np.random.default_rng(0).normal(size=(1, 2, 12, 20, 16)).astype(np.float32)
    np.testing.assert_allclose(decode_tiled(decode, latents, tile=tile, overlap=overlap), decode(latents), atol=1e-5)


def test_the_published_size_has_the_published_number_of_parameters():
    _, params = abstract(lambda: WanVae(VaeConfig(), rngs=nnx.Rngs(0)))
    assert parameter_count(params) == 126_892_531


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32(vae: WanVae, latents: jax.Array):
    graphdef, _ = abstract(lambda: WanVae(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    half = merge(graphdef, split(vae)[1])
    difference = jax.jit(half.decode)(latents) - jax.jit(vae.decode)(latents)
    assert float(jnp.sqrt(jnp.mean(difference**2))) < 0.02
