"""The VAE in pieces gives what it gives as a whole."""

import jax
import numpy as np
import pytest
import tiny_models

from x2v_jax import memory
from x2v_jax.checkpoint.tensors import LazyTensor
from x2v_jax.networks import Network
from x2v_jax.pixels import to_uint8
from x2v_jax.vae_runner import VaeRunner


@pytest.fixture(scope="module")
def vae() -> Network:
    parameters = tiny_models.random_parameters("vae", tiny_models.VAE)
    tensors = {name: LazyTensor(a.shape, a.dtype, lambda a=a: a) for name, a in parameters.items()}
    return Network("vae", tiny_models.VAE, tensors, dtype="bfloat16")


def test_streaming_and_tiling_give_the_whole_video(vae: Network):
    latents = jax.random.normal(jax.random.key(0), (1, 3, 2, 40, 16))
    whole = VaeRunner(vae, "whole").decode(latents)
    np.testing.assert_array_equal(VaeRunner(vae, "stream").decode(latents), whole)
    tiled = VaeRunner(vae, "tiled").decode(latents)
    assert tiled.shape == whole.shape == (9, 16, 320, 3)
    # Two tiles of 256 pixels share 192 in blended form; away from the seam they are the whole's.
    assert np.abs(tiled[:, :, :48].astype(int) - whole[:, :, :48]).mean() < 1


def test_encoding_in_pieces_gives_the_same_latents(vae: Network, monkeypatch: pytest.MonkeyPatch):
    video = jax.random.uniform(jax.random.key(0), (1, 9, 16, 32, 3), minval=-1)
    whole = VaeRunner(vae).encode(video)
    monkeypatch.setattr(memory, "WHOLE_LIMIT", 0)
    np.testing.assert_allclose(VaeRunner(vae).encode(video), whole, atol=2e-5)


def test_levels_are_rounded_to_the_nearest():
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(np.float32([-1, -0.999, 0.998, 1])), [0, 0, 255, 255])
