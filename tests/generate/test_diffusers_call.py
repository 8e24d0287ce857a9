"""A pipeline called as diffusers' are: generators, lists of prompts, callbacks, latents, PIL images."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from PIL import Image

from x2v_jax import Pipeline, Request, UserError

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tiny_models.write_checkpoint(tmp_path_factory.mktemp("call") / "t2v", schedule=tiny_models.DISTILLED)
    return Pipeline.from_checkpoint(path, dtype="float32")


@pytest.fixture(scope="module")
def frames(pipe: Pipeline) -> np.ndarray:
    return pipe(PROMPT, seed=3)


def test_a_generator_is_its_seed(pipe: Pipeline, frames: np.ndarray):
    class Torch:
        def initial_seed(self) -> int:
            return 3

    np.testing.assert_array_equal(pipe(PROMPT, generator=Torch()), frames)


def test_lists_and_numbers_of_videos_come_stacked(pipe: Pipeline, frames: np.ndarray):
    found = pipe([PROMPT, "a blue square"], seed=3)
    assert found.shape == (2, 5, 32, 48, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], frames)
    twice = pipe(PROMPT, seed=2, num_videos_per_prompt=2)
    np.testing.assert_array_equal(twice[1], frames)
    assert not np.array_equal(twice[0], frames)


def test_pictures_come_as_pil_images(pipe: Pipeline, frames: np.ndarray):
    found: Any = pipe(PROMPT, seed=3, output_type="pil")
    assert len(found) == 5 and isinstance(found[0], Image.Image)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in found]), frames)
    (listed,) = pipe([PROMPT], seed=3, output_type="pil")
    np.testing.assert_array_equal(np.asarray(listed[4]), frames[4])


def test_both_callbacks_are_called_after_each_step_and_change_nothing(pipe: Pipeline, frames: np.ndarray):
    seen: list[Any] = []

    def at_end(of: Pipeline, step: int, timestep: float, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append((of is pipe, step, round(timestep), kept["latents"].shape))
        return kept

    steps: list[int] = []
    watched = pipe(PROMPT, seed=3, callback_on_step_end=at_end, on_step=lambda step, count, latents: steps.append(step))
    assert [entry[:2] for entry in seen] == [(True, i) for i in range(4)] and steps == [0, 1, 2, 3]
    assert {entry[3] for entry in seen} == {(1, 16, 2, 4, 6)} and seen[0][2] == 1000 > seen[1][2] > seen[3][2]
    np.testing.assert_array_equal(watched, frames)
    with pytest.raises(UserError, match="gave other latents back"):
        pipe(PROMPT, callback_on_step_end=lambda p, i, t, kept: {"latents": jnp.zeros_like(kept["latents"])})


def test_latents_are_the_noise_to_start_from(pipe: Pipeline):
    noise = np.random.default_rng(0).standard_normal((1, 16, 2, 4, 6)).astype(np.float32)
    first = pipe(PROMPT, latents=noise, seed=1)
    np.testing.assert_array_equal(pipe.generate(Request(PROMPT, initial_noise=noise[0], seed=1)).frames, first)
    assert not np.array_equal(pipe(PROMPT, latents=-noise, seed=1), first)
    with pytest.raises(UserError, match=r"is \[16, 2, 4, 4\]; this video starts from \[16, 2, 4, 6\]"):
        pipe(PROMPT, latents=noise[..., :4])
    with pytest.raises(UserError, match="NaN"):
        pipe(PROMPT, latents=noise * np.nan)


def test_what_is_not_here_is_said(pipe: Pipeline):
    for name in ("to", "load_lora_weights", "enable_model_cpu_offload"):
        with pytest.raises(UserError, match=f"Pipeline has no '{name}'"):
            getattr(pipe, name)
    with pytest.raises(UserError, match="from_checkpoint"):
        getattr(Pipeline, "from_pretrained")  # noqa: B009 - the type checker knows that it is not there
    with pytest.raises(UserError, match="give dtype="):
        Pipeline.from_checkpoint(pipe.checkpoint.path, torch_dtype=jnp.bfloat16)  # type: ignore[call-arg]
    for given in ("a cat", {"prompt": "a cat"}, None):
        with pytest.raises(UserError, match=r"generate takes a Request, .*write generate\(Request"):
            pipe.generate(given)  # type: ignore[call-overload]


def test_a_pipeline_says_what_it_is(pipe: Pipeline):
    assert repr(pipe) == (f"Pipeline({pipe.checkpoint.path}: t2v distill, 4 steps, 5 frames of 32x48, float32)")


def test_seeds_have_64_bits_and_old_ones_give_the_old_noise(pipe: Pipeline):
    import jax

    from x2v_jax.diffusion import noise

    for seed in (0, 3, 2**31, 2**32 - 1):
        old = jax.random.key(np.uint32(seed))
        assert (jax.random.key_data(noise.seed_key(seed)) == jax.random.key_data(old)).all()
    found = [pipe(PROMPT, num_frames=1, seed=seed).tobytes() for seed in (3, 2**32 + 3, 2**33 + 3, 2**64 - 1)]
    assert len(set(found)) == 4
    with pytest.raises(UserError, match="seed is 18446744073709551616; give a whole number from 0 to"):
        pipe(PROMPT, seed=2**64)
