"""Block-by-block videos: what comes out of the stream, in which order, in how much memory, and how they go on."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from x2v_jax import Pipeline
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_metadata, read_safetensors
from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.errors import UserError
from x2v_jax.generate import blocks as streaming
from x2v_jax.generate.vae import StreamDecoder
from x2v_jax.media import tensor_files
from x2v_jax.media.video import write_video
from x2v_jax.models.config import CausalSchedule
from x2v_jax.request import Request
from x2v_jax.request.inputs import fit

PROMPT = "a red circle moves left"
PICTURE = np.random.default_rng(5).integers(0, 255, (32, 48, 3), np.uint8)


def make(path: pathlib.Path, **causal: Any) -> Pipeline:
    schedule = dataclasses.replace(tiny_models.CAUSAL, causal=CausalSchedule(**({"window": 9} | causal)))
    return Pipeline.from_checkpoint(tiny_models.write_checkpoint(path, schedule=schedule), dtype="float32")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make(tmp_path_factory.mktemp("causal") / "sliding")


@pytest.fixture(scope="module")
def first_alone(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The same weights for a model whose first frame is a block of its own."""
    return make(tmp_path_factory.mktemp("causal") / "alone", independent_first_frame=True, window=7)


def save(path: pathlib.Path, **arrays: np.ndarray) -> pathlib.Path:
    with SafetensorsWriter(path, {name: (a.shape, a.dtype) for name, a in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return path


def rollout(pipeline: Pipeline) -> Rollout:
    assert pipeline._components._streamer is not None
    return next(iter(pipeline._components._streamer._rollouts.values()))


def by_hand(pipeline: Pipeline, given: np.ndarray, seed: int, *, first_block: int = 0) -> np.ndarray:
    """The block that follows latents [f, h, w, C], with the noise of block `first_block` of a rollout."""
    noise, renoise = keyed_noise(jax.random.key(seed))
    assert pipeline._components._prompts is not None
    text = pipeline._components._prompts._known[PROMPT]
    text = np.pad(text, ((0, tiny_models.T2V.text_len - len(text)), (0, 0)))
    params, made = pipeline._components.network("transformer").load(), rollout(pipeline)
    with jax.default_matmul_precision("highest"):
        blocks = made.stream(
            params,
            made.prepare(params, jnp.asarray(text)[None]),
            lambda block, shape: noise(first_block, shape),
            lambda block, steps, shape: renoise(first_block, steps, shape),
            len(given) + 3,
            given=given[None],
        )
        return np.asarray(next(blocks)[0])


def decode(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """All frames at once."""
    runner = pipeline._components.vae
    with jax.default_matmul_precision("highest"):
        return np.asarray(runner._decode(runner.network.load(), jnp.asarray(latents)[None]))[0]


def near(a: np.ndarray, b: np.ndarray) -> None:
    """The same frames, but for rounding at the border of two levels."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 1e-3


@pytest.mark.slow
def test_blocks_come_in_order_and_are_what_generate_collects(pipeline: Pipeline):
    request = Request(PROMPT, seed=3)
    blocks = list(pipeline.stream_blocks(request))
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.frames.shape for block in blocks] == [(9, 32, 48, 3), (12, 32, 48, 3), (12, 32, 48, 3)]
    assert all(block.frames.dtype == np.uint8 and block.latents.shape == (3, 4, 6, 16) for block in blocks)
    assert {"load", "text", "denoise", "vae"} <= blocks[0].seconds.keys()
    assert blocks[1].seconds.keys() == {"denoise", "vae"} and min(blocks[1].seconds.values()) >= 0
    seen = []
    result = pipeline.generate(request, lambda *step: seen.append(step))
    np.testing.assert_array_equal(result.frames, np.concatenate([block.frames for block in blocks]))
    np.testing.assert_array_equal(result.latents, np.concatenate([block.latents for block in blocks]))
    assert [step[:2] for step in seen] == [(0, 3), (1, 3), (2, 3)] and seen[0][2].shape == (1, 3, 4, 6, 16)
    assert result.frames.shape == (33, 32, 48, 3) and result.seconds["denoise"] > 0
    np.testing.assert_array_equal(np.concatenate(list(pipeline.stream(PROMPT, seed=3))), result.frames)
    np.testing.assert_array_equal(pipeline(PROMPT, seed=3), result.frames)
    assert np.abs(pipeline.generate(Request(PROMPT, seed=4)).latents - result.latents).max() > 0.1


@pytest.mark.slow
def test_the_frames_are_those_of_decoding_everything_at_once(pipeline: Pipeline):
    result = pipeline.generate(Request(PROMPT, seed=3))
    near(result.frames, decode(pipeline, result.latents))


def test_each_block_is_the_rollouts(pipeline: Pipeline):
    latents = pipeline.generate(Request(PROMPT, seed=3, num_frames=21)).latents
    np.testing.assert_allclose(by_hand(pipeline, latents[:3], 3, first_block=1), latents[3:], atol=1e-5)


def test_a_block_is_out_before_the_second_next_is_begun(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, int]] = []
    pipeline.generate(Request(PROMPT, seed=3, num_frames=9))
    program, steps = rollout(pipeline).block, rollout(pipeline).plan.num_steps
    denoised, decoded = itertools.count(), itertools.count()

    def block(*arguments: Any) -> Any:
        if arguments[6] < steps:  # not the pass that only shows a finished block
            events.append(("denoise", next(denoised)))
        return program(*arguments)

    original = StreamDecoder.__call__

    def decode_spy(self: StreamDecoder, latents: Any) -> Any:
        events.append(("decode", next(decoded)))
        return original(self, latents)

    monkeypatch.setattr(rollout(pipeline), "block", block)
    monkeypatch.setattr(StreamDecoder, "__call__", decode_spy)
    for made in pipeline.stream_blocks(Request(PROMPT, seed=3, num_frames=57)):
        events.append(("out", made.index))
    for k in range(3):
        # Decoding is asked of the device before the next block, so that it waits for nothing; both before handing out.
        assert events.index(("decode", k)) < events.index(("denoise", k + 1)) < events.index(("out", k))
        assert events.index(("out", k)) < events.index(("denoise", k + 2))


def test_memory_and_programs_do_not_grow_with_the_length(pipeline: Pipeline):
    """Not at a prompt's change either, for which the frames of the window are kept."""
    counts: list[int] = []
    request = Request(PROMPT, seed=3, endless=True, prompt_schedule=((1.0, "a blue square"), (6.0, "a red square")))
    for block in itertools.islice(pipeline.stream_blocks(request), 30):
        counts.append(len(jax.live_arrays()))
        sizes = sum(array.nbytes for array in jax.live_arrays())
        if block.index == 4:
            expected = sizes
    assert counts[29] == counts[4] and sizes == expected
    runner = pipeline._components.vae
    programs = [rollout(pipeline).block, rollout(pipeline).prepare, runner._decode_chunk]
    assert all(program._cache_size() <= 2 for program in programs)
    assert len(pipeline._components._streamer._rollouts) == 1  # type: ignore[union-attr]


def test_leaving_early_leaves_everything_in_order(pipeline: Pipeline, tmp_path: pathlib.Path):
    file = tmp_path / "new" / "l.safetensors"
    blocks = pipeline.stream_blocks(Request(PROMPT, seed=3, num_frames=57, save_latents=file))
    first = next(blocks)
    assert not file.exists()
    second = next(blocks)
    blocks.close()
    saved = read_safetensors(file)["latents"].read()
    np.testing.assert_array_equal(np.moveaxis(saved, 0, -1), np.concatenate([first.latents, second.latents]))
    assert read_metadata(file)["blocks"] == "2" and read_metadata(file) == second.state
    assert list(file.parent.iterdir()) == [file]
    np.testing.assert_array_equal(pipeline.generate(Request(PROMPT, seed=3)).latents[:3], first.latents)
    frames = pipeline.stream(PROMPT, seed=3)
    np.testing.assert_array_equal(next(frames), first.frames)
    frames.close()
    pipeline.stream_blocks(Request(PROMPT, save_latents=tmp_path / "never.safetensors")).close()
    assert not (tmp_path / "never.safetensors").exists()


def test_an_endless_video_saves_what_a_continuation_needs(pipeline: Pipeline, tmp_path: pathlib.Path):
    file = tmp_path / "l.safetensors"
    blocks = pipeline.stream_blocks(Request(PROMPT, seed=3, endless=True, save_latents=file))
    made = list(itertools.islice(blocks, 14))
    blocks.close()
    saved = np.moveaxis(read_safetensors(file)["latents"].read(), 0, -1)
    assert len(saved) == 33  # the decoder recalls 30 frames
    np.testing.assert_array_equal(saved, np.concatenate([block.latents for block in made])[-33:])
    assert read_metadata(file)["blocks"] == "14"
    with pytest.raises(UserError, match="endless is True, and there is no end to wait for"):
        pipeline.generate(Request(PROMPT, endless=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "collected"])
def test_a_continuation_is_seamless(pipeline: Pipeline, tmp_path: pathlib.Path, kind: str):
    file = tmp_path / "l.safetensors"
    if kind == "latents":
        first = pipeline.generate(Request(PROMPT, seed=3, save_latents=file)).latents
    else:
        blocks = list(pipeline.stream_blocks(Request(PROMPT, seed=3)))
        first = np.concatenate([block.latents for block in blocks])
        tensor_files.write_latents(file, first, blocks[-1].state)
    second_file = tmp_path / "m.safetensors"
    second = pipeline.generate(Request(PROMPT, seed=3, num_frames=12, continue_from=file, save_latents=second_file))
    expected = by_hand(pipeline, first[-6:], 3, first_block=3)
    np.testing.assert_allclose(second.latents, expected, atol=1e-5)
    both = np.concatenate([first, second.latents])
    near(second.frames, decode(pipeline, both)[33:])
    third = pipeline.generate(Request(PROMPT, seed=3, num_frames=24, continue_from=second_file))
    near(third.frames, decode(pipeline, np.concatenate([both, third.latents]))[45:])
    np.testing.assert_allclose(third.latents[:3], by_hand(pipeline, both[-6:], 3, first_block=4), atol=1e-5)


def test_fragments_go_on_as_if_they_had_never_stopped(pipeline: Pipeline, tmp_path: pathlib.Path):
    file = tmp_path / "l.safetensors"
    whole = pipeline.generate(Request(PROMPT, seed=5, rollout_mode="fragments", num_fragments=2))
    pipeline.generate(Request(PROMPT, seed=5, rollout_mode="fragments", num_fragments=1, save_latents=file))
    rest = pipeline.generate(
        Request(PROMPT, seed=5, rollout_mode="fragments", num_fragments=1, continue_from=file),
    )
    np.testing.assert_array_equal(rest.latents, whole.latents[9:])
    near(rest.frames, whole.frames[33:])


@pytest.mark.slow
def test_a_video_file_is_encoded_and_continued(pipeline: Pipeline, tmp_path: pathlib.Path):
    frames = np.random.default_rng(0).integers(0, 255, (35, 32, 48, 3), np.uint8)
    write_video(tmp_path / "v.mp4", frames, 16)
    made = pipeline.generate(Request(PROMPT, seed=3, num_frames=12, continue_from=tmp_path / "v.mp4"))
    from x2v_jax.media.video import read_frames

    last = read_frames(tmp_path / "v.mp4")[2:].astype(np.float32) / 127.5 - 1
    latents = np.asarray(pipeline._components.vae.encode(last[None]))[0]
    np.testing.assert_allclose(made.latents, by_hand(pipeline, latents[-6:], 3, first_block=3), atol=1e-4)
    with pytest.raises(UserError, match=r"v\.mp4 is 32x48 and this video would be 32x32; set height to 32 and width"):
        pipeline.stream_blocks(Request(PROMPT, width=32, num_frames=12, continue_from=tmp_path / "v.mp4"))
    write_video(tmp_path / "short.mp4", frames[:5], 16)
    with pytest.raises(UserError, match="has 2 latent frames, less than one block of 3"):
        pipeline.stream_blocks(Request(PROMPT, num_frames=12, continue_from=tmp_path / "short.mp4"))
    (tmp_path / "none.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="cannot be read as a video"):
        pipeline.stream_blocks(Request(PROMPT, num_frames=12, continue_from=tmp_path / "none.mp4"))


def test_files_of_another_model_or_size_are_refused(pipeline: Pipeline, tmp_path: pathlib.Path):
    file = tmp_path / "l.safetensors"
    *_, last = pipeline.stream_blocks(Request(PROMPT, seed=3, num_frames=9, save_latents=file))
    request = Request(PROMPT, num_frames=12, continue_from=file)
    with pytest.raises(UserError, match="holds a video of 32x48 and this one would be 32x32; set height to 32"):
        pipeline.stream_blocks(dataclasses.replace(request, width=32))
    other = tmp_path / "other.safetensors"
    tensor_files.write_latents(other, last.latents, dict(last.state) | {"model": "0" * 64})
    with pytest.raises(UserError, match=r"are another model's; use the checkpoint that made them, give the video"):
        pipeline.stream_blocks(dataclasses.replace(request, continue_from=other))
    tensor_files.write_latents(other, last.latents)
    with pytest.raises(UserError, match="was not written by save_latents of a block-by-block run"):
        pipeline.stream_blocks(dataclasses.replace(request, continue_from=other))
    tensor_files.write_latents(other, np.full_like(last.latents, np.nan), last.state)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        pipeline.stream_blocks(dataclasses.replace(request, continue_from=other))
    tensor_files.write_latents(other, last.latents[:, :, :4], last.state)
    with pytest.raises(UserError, match=r"is \[16, 3, 4, 4\]; this model needs \[16, F, 4, 6\]"):
        pipeline.stream_blocks(dataclasses.replace(request, continue_from=other))
    other.write_bytes(b"nothing")
    with pytest.raises(UserError, match="continue_from: "):
        pipeline.stream_blocks(dataclasses.replace(request, continue_from=other))


def test_an_image_is_held_for_the_first_block(pipeline: Pipeline):
    made = pipeline.generate(Request(PROMPT, seed=3, image=PICTURE, num_frames=33))
    still = np.repeat(PICTURE[None, None], 9, axis=1).astype(np.float32) / 127.5 - 1
    latents = np.asarray(pipeline._components.vae.encode(still))[0]
    np.testing.assert_allclose(made.latents[:3], latents, atol=1e-5)
    np.testing.assert_allclose(made.latents[3:6], by_hand(pipeline, latents, 3, first_block=1), atol=1e-5)
    near(made.frames, decode(pipeline, made.latents))
    inner = np.s_[:, 3:-3]  # at the border, what was cut off is still in the average
    np.testing.assert_array_equal(fit(PICTURE, 16, 16)[inner], fit(PICTURE[:, 8:40], 16, 16)[inner])
    with pytest.raises(UserError, match="num_frames is 9, which the image fills alone; give at least 21"):
        pipeline.generate(Request(PROMPT, image=PICTURE, num_frames=9))


@pytest.mark.slow
def test_an_image_is_one_frame_where_the_first_frame_is_a_block(first_alone: Pipeline):
    made = first_alone.generate(Request(PROMPT, seed=3, image=PICTURE, num_frames=25))
    video = PICTURE[None, None].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(made.latents[:1], first_alone._components.vae.encode(video)[0], atol=1e-5)
    assert made.frames.shape == (25, 32, 48, 3) and made.latents.shape == (7, 4, 6, 16)
    blocks = list(first_alone.stream_blocks(Request(PROMPT, seed=3, num_frames=25)))
    assert [len(block.frames) for block in blocks] == [1, 12, 12]


@pytest.mark.slow
def test_noise_is_exchanged_as_a_file(pipeline: Pipeline, first_alone: Pipeline, tmp_path: pathlib.Path):
    """Given the noise that the seed stands for, the latents are the same."""
    initial, between = keyed_noise(jax.random.key(5))
    shape = (1, 3, 4, 6, 16)
    noise = np.stack([np.moveaxis(np.asarray(initial(k, shape))[0], -1, 1) for k in range(3)])
    renoise = np.stack([np.moveaxis(np.asarray(between(k, 2, shape))[:, 0], -1, 2) for k in range(3)])
    file = save(tmp_path / "n.safetensors", noise=noise, renoise=renoise)
    expected = pipeline.generate(Request(PROMPT, seed=5)).latents
    given = pipeline.generate(Request(PROMPT, seed=99, initial_noise=file)).latents
    np.testing.assert_allclose(given, expected, atol=1e-6)
    half = save(tmp_path / "h.safetensors", noise=noise)
    np.testing.assert_allclose(
        pipeline.generate(Request(PROMPT, seed=5, initial_noise=half)).latents, expected, atol=1e-6
    )
    first_alone.generate(Request(PROMPT, seed=5, num_frames=25, initial_noise=file))
    with pytest.raises(UserError, match=r"noise of .* is \[3, 3, 16, 4, 6\]; this request needs \[2, 3, 16, 4, 6\]"):
        pipeline.generate(Request(PROMPT, num_frames=21, initial_noise=file))
    bad = save(tmp_path / "b.safetensors", noise=noise, renoise=renoise[:, :, :2])
    with pytest.raises(UserError, match=r"this request needs \[3, 1, 3, 16, 4, 6\]"):
        pipeline.generate(Request(PROMPT, initial_noise=bad))
    noise[2, 0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        pipeline.generate(Request(PROMPT, initial_noise=save(tmp_path / "x.safetensors", noise=noise)))


def test_the_prompt_changes_at_the_first_block_that_starts_in_time(pipeline: Pipeline):
    """Blocks start at frames 0, 9, 21, 33: at 16 frames a second, 1 s is after the start of the second."""
    plain = pipeline.generate(Request(PROMPT, seed=3, num_frames=45)).latents
    changed = pipeline.generate(
        Request(PROMPT, seed=3, num_frames=45, prompt_schedule=((1.0, "a blue square moves right"),))
    ).latents
    np.testing.assert_array_equal(changed[:6], plain[:6])
    assert np.abs(changed[6:9] - plain[6:9]).max() > 1e-3
    at_once = pipeline.generate(Request(PROMPT, seed=3, num_frames=45, prompt_schedule=((0.5, PROMPT),))).latents
    np.testing.assert_allclose(at_once[3:6], plain[3:6], atol=1e-5)  # shown again, nothing is new


def test_a_block_that_is_not_finite_ends_the_video(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    program, calls = rollout(pipeline).block, itertools.count()

    def block(*arguments: Any) -> Any:
        latents, cache = program(*arguments)
        return latents * (np.nan if next(calls) == 2 else 1), cache  # 0 and 1: the first block, and showing it

    monkeypatch.setattr(rollout(pipeline), "block", block)
    blocks = pipeline.stream_blocks(Request(PROMPT, seed=3))
    assert next(blocks).index == 0
    with pytest.raises(UserError, match="the latents of block 1 hold NaN or infinity"):
        next(blocks)


@pytest.mark.slow
def test_tiles_are_streamed_too(pipeline: Pipeline):
    tiled = Pipeline(pipeline.checkpoint, dtype="float32", vae_decode="tiled")
    request = Request(PROMPT, seed=3, num_frames=9)
    near(tiled.generate(request).frames, pipeline.generate(request).frames)


def test_whole_videos_cannot_be_streamed(tmp_path: pathlib.Path):
    path = tiny_models.write_checkpoint(tmp_path / "base")
    with pytest.raises(UserError, match="does not make videos block by block; use a causal checkpoint"):
        Pipeline.from_checkpoint(path).stream(PROMPT)


def test_a_state_says_where_it_comes_from(pipeline: Pipeline):
    block = next(pipeline.stream_blocks(Request(PROMPT, seed=3)))
    assert isinstance(block, streaming.Block)
    assert block.state.keys() == {"format", "model", "height", "width", "block", "blocks", "schedule"}
    assert block.state["blocks"] == "1" and block.state["block"] == "3"


def test_what_is_compiled_ahead_is_what_a_stream_calls(tmp_path: pathlib.Path):
    path = tiny_models.write_checkpoint(tmp_path / "ahead", schedule=tiny_models.CAUSAL)
    pipeline, request = Pipeline.from_checkpoint(path), Request(PROMPT, seed=3, num_frames=21)
    names = [name for name, _ in pipeline.warm_up(request)]
    assert "block of 3 latent frames" in names and "VAE decoder, later frames" in names
    assert not any(network.is_loaded for network in pipeline._components.networks.values())
    traced: list[str] = []

    def note(event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            traced.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        pipeline.generate(request)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in traced if name.strip("jit()") in ("_block", "decode_chunk")]
