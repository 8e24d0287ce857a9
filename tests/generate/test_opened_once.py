"""In one run a request is decided once, and every file is opened and decoded once, however many videos share it."""

import contextlib
import inspect
import os
import pathlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tiny_models

import x2v_jax
from infer.__main__ import main
from x2v_jax import Pipeline
from x2v_jax.checkpoint.files import json_file, safetensors
from x2v_jax.checkpoint.native.writer import MODEL_FILE
from x2v_jax.media import image
from x2v_jax.media.video import write_png, write_video
from x2v_jax.request import earlier_video
from x2v_jax.request.inputs import InputFiles
from x2v_jax.request.resolve import resolve

LIBRARY = pathlib.Path(x2v_jax.__file__).parent


@contextlib.contextmanager
def watching(seen: Callable[[types.CodeType, types.FrameType], object]) -> Iterator[None]:
    """Calls `seen` with each function that starts in this process; what it answers with DISABLE is not shown again."""
    tool = sys.monitoring.PROFILER_ID
    sys.monitoring.use_tool_id(tool, "test_opened_once")
    start = sys.monitoring.events.PY_START
    sys.monitoring.register_callback(tool, start, lambda code, offset: seen(code, sys._getframe(1)))
    sys.monitoring.set_events(tool, start)
    try:
        yield
    finally:
        sys.monitoring.set_events(tool, 0)
        sys.monitoring.free_tool_id(tool)
        sys.monitoring.restart_events()


@contextlib.contextmanager
def calls(*functions: Callable[..., object]) -> Iterator[Counter[str]]:
    """How often each function is called, and with which first argument where that is a path."""
    names = {inspect.unwrap(function).__code__: function.__name__ for function in functions}
    counted: Counter[str] = Counter()

    def seen(code: types.CodeType, frame: types.FrameType) -> object:
        if code not in names:
            return sys.monitoring.DISABLE
        first = frame.f_locals.get(code.co_varnames[0])
        is_path = isinstance(first, str | os.PathLike)
        counted[f"{names[code]} {pathlib.Path(first).name}" if is_path else names[code]] += 1
        return None

    with watching(seen):
        yield counted


def counted_run(*arguments: str) -> Counter[str]:
    """What one `python -m infer` resolves, parses and decodes."""
    show = warnings.showwarning
    watched = (
        resolve, json_file.read_json, safetensors.read_safetensors, image.load_image, earlier_video.read,
        earlier_video.fingerprint,
    )  # fmt: skip
    try:
        with calls(*watched) as found:
            assert main([*arguments, "--config.compilation_cache=", "--config.dtype=float32"]) == 0
    finally:
        warnings.showwarning = show
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("once")


@pytest.fixture(scope="module")
def distilled(folder: pathlib.Path) -> pathlib.Path:
    return tiny_models.write_checkpoint(folder / "t2v", schedule=tiny_models.DISTILLED)


@pytest.fixture(scope="module")
def causal(folder: pathlib.Path) -> pathlib.Path:
    return tiny_models.write_checkpoint(folder / "causal", schedule=tiny_models.CAUSAL)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def headers(found: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in found.items() if name.startswith("read_safetensors")}


def test_a_text_to_video_run_decides_once_and_reads_each_file_once(distilled: pathlib.Path):
    found = counted_run(f"--config.checkpoint={distilled}", "--config.seed=1", "--config.prompt=a red circle")
    assert found["resolve"] == 1
    assert found[f"read_json {MODEL_FILE}"] == 1
    assert set(headers(found).values()) == {1}, headers(found)


@pytest.mark.slow
def test_three_prompts_are_decided_once_each_and_share_all_that_is_read(
    distilled: pathlib.Path, tmp_path: pathlib.Path
):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na red square\n")
    found = counted_run(f"--config.checkpoint={distilled}", "--config.seed=1", "--config.prompt_file=prompts.txt")
    assert found["resolve"] == 3
    assert found[f"read_json {MODEL_FILE}"] == 1
    assert set(headers(found).values()) == {1}, headers(found)


def test_the_picture_of_three_prompts_is_decoded_once(folder: pathlib.Path, tmp_path: pathlib.Path):
    i2v = folder / "i2v"
    tiny_models.write_checkpoint(i2v, image=True, schedule=tiny_models.DISTILLED)
    write_png(tmp_path / "first.png", np.full((40, 60, 3), 90, np.uint8))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na red square\n")
    found = counted_run(
        f"--config.checkpoint={i2v}", "--config.seed=1", "--config.prompt_file=prompts.txt", "--config.image=first.png"
    )
    assert found["resolve"] == 3 and found["load_image first.png"] == 1
    assert set(headers(found).values()) == {1}, headers(found)


@pytest.mark.slow
def test_an_earlier_video_is_decoded_once_for_two_continuations(causal: pathlib.Path, tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "earlier.mp4", rng.integers(0, 255, (33, 32, 48, 3), np.uint8), 16)
    found = counted_run(
        f"--config.checkpoint={causal}", "--config.seed=1", "--config.num_videos=2", "--config.prompt=a red circle",
        "--config.continue_from=earlier.mp4", "--config.num_frames=12",
    )  # fmt: skip
    assert found["resolve"] == 2 and found["read earlier.mp4"] == 1 and found["fingerprint"] == 1
    assert found[f"read_json {MODEL_FILE}"] == 1


def test_a_thousand_prompts_with_one_picture_hold_it_once_and_many_pictures_are_let_go(tmp_path: pathlib.Path):
    files, read = InputFiles(), Counter[str]()

    def opened(name: str) -> np.ndarray:
        def load() -> np.ndarray:
            read[name] += 1
            return np.zeros(1)

        return files.once(tmp_path / name, "picture", load)

    for name in map(str, range(40)):
        (tmp_path / name).write_text(name)
    assert len({id(opened("0")) for _ in range(1000)}) == 1 and read == {"0": 1}
    for name in map(str, range(40)):
        opened(name)
    assert len(files._found) < 20
    (tmp_path / "39").write_text("changed")
    opened("39")
    assert read["39"] == 2


# What a call hands on under these names, or as these values, is followed.
FOLLOWED = ("prompt", "prompts", "request", "asked", "text", "texts", "embeddings", "latents", "initial")
LEFT_OUT = ("models", "ops", "diffusion")
MOST_FILES = 10


def test_a_prompt_passes_few_files_on_its_way_to_a_video(distilled: pathlib.Path):
    pipeline, prompt = Pipeline.from_checkpoint(distilled, dtype="float32"), "a red circle"
    kinds = (x2v_jax.Request, x2v_jax.ResolvedRequest)
    files: set[str] = set()

    def seen(code: types.CodeType, frame: types.FrameType) -> object:
        path = pathlib.Path(code.co_filename)
        if not path.is_relative_to(LIBRARY) or (relative := path.relative_to(LIBRARY)).parts[0] in LEFT_OUT:
            return sys.monitoring.DISABLE
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            if name in FOLLOWED or isinstance(value, kinds) or (isinstance(value, str) and value == prompt):
                files.add(relative.as_posix())
        return None

    with watching(seen):
        pipeline(prompt, seed=1)
    assert {"pipeline.py", "request/resolve.py", "generate/text.py", "generate/denoise.py"} <= files
    assert len(files) <= MOST_FILES, sorted(files)
