"""`--warmup` and the file of compiled programs: a second process starts from it without compiling anything."""

import json
import os
import pathlib
import subprocess
import sys
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import tiny_models

from x2v_jax.errors import UserError
from x2v_jax.generate import programs
from x2v_jax.media.video import read_frames

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Runs the command line and prints how many programs were asked of the compiler, and how many were found.
SPY = """
import collections, sys, jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **details: counts.update([event.rsplit("/", 1)[-1]]))
from infer.__main__ import main
code = main(sys.argv[1:])
print(counts["compile_requests_use_cache"], counts["cache_hits"])
sys.exit(code)
"""


def infer(*arguments: str, folder: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-c", SPY, *arguments], cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_second_process_starts_without_compiling(tmp_path: pathlib.Path):
    checkpoint = tiny_models.write_checkpoint(tmp_path / "i2v", schedule=tiny_models.DISTILLED, image=True)
    (tmp_path / "p.png").write_bytes(_png())
    arguments = [f"--config.checkpoint={checkpoint}", "--config.image=p.png", "--config.prompt=a red circle"]
    arguments += ["--config.compiled_programs=programs.zip", "--config.output=v.mp4"]
    warmed = infer("--warmup", *arguments, "--config.compilation_cache=", folder=tmp_path)
    assert not (tmp_path / "v.mp4").exists()
    for name in ("text encoder", "image encoder", "VAE encoder", "denoising step", "VAE decoder, whole"):
        assert f"{name}: " in warmed.stderr
    assert "programs compiled in" in warmed.stderr and "programs.zip: " in warmed.stdout
    started = infer(*arguments, "--config.compilation_cache=elsewhere", folder=tmp_path)
    asked, found = map(int, started.stdout.split()[-2:])
    assert asked == found > 5 and "warning" not in started.stderr
    assert read_frames(tmp_path / "v.mp4").shape[0] == 5
    other = infer(*arguments, "--config.compilation_cache=", "--config.num_frames=1", folder=tmp_path)
    assert "programs.zip was made for num_frames 5 and this run has 1; everything is compiled instead" in other.stderr


def _png() -> bytes:
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


NAME = "jit_f-0123-cache"


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / NAME).write_bytes(b"a program")
    (cache / "jit_f-0123-atime").write_bytes(b"no program")
    assert programs.save(tmp_path / "new" / "p.zip", cache, {"jax": "1", "config": {"height": 480}}) == 1
    return tmp_path / "new" / "p.zip"


def test_programs_are_put_where_they_were(file: pathlib.Path, tmp_path: pathlib.Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert programs.install(file, tmp_path / "out", {"jax": "1", "config": {"height": 480}})
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {NAME: b"a program"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"jax": "2", "config": {"height": 480}}, "was made for jax 1 and this is 2; everything is compiled instead"),
        ({"jax": "1", "config": {"height": 720}}, "was made for height 480 and this run has 720"),
        (
            {"jax": "1", "config": {"height": 480, "dtype": "float32"}},
            "was made for dtype null and this run has float32",
        ),
    ],
)
def test_a_file_for_something_else_is_not_used(
    file: pathlib.Path, tmp_path: pathlib.Path, wanted: dict[str, Any], expected: str
):
    with pytest.warns(UserWarning, match=expected):
        assert not programs.install(file, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_not_used(file: pathlib.Path, tmp_path: pathlib.Path):
    wanted = {"jax": "1", "config": {"height": 480}}
    manifest = {"format": programs.FORMAT, "version": 1, "made_for": wanted, "programs": {}}
    cases: dict[str, Any] = {
        "changed": {NAME: "0" * 64},
        "outside": {"../jit_f-1-cache": "0" * 64},
        "missing": {"jit_g-1-cache": "0" * 64},
    }
    for name, listed in cases.items():
        with zipfile.ZipFile(tmp_path / name, "w") as made:
            made.writestr("manifest.json", json.dumps(manifest | {"programs": listed}))
            made.writestr(NAME, b"another")
            made.writestr("../jit_f-1-cache", b"")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-30])
    with zipfile.ZipFile(tmp_path / "foreign", "w") as made:
        made.writestr("manifest.json", "[]")
    for name in (*cases, "cut", "foreign"):
        with pytest.warns(UserWarning, match=f"{name} is damaged"):
            assert not programs.install(tmp_path / name, tmp_path / "out", wanted)
    with pytest.warns(UserWarning, match="does not exist; everything is compiled instead. Make the file with"):
        assert not programs.install(tmp_path / "none", tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_said(file: pathlib.Path, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"compiled_programs: /proc/p\.zip cannot be written"):
        programs.save("/proc/p.zip", tmp_path, {})
    with pytest.raises(UserError, match=r"compiled_programs: /proc/p\.zip cannot be written"):
        programs.check_writable("/proc/p.zip")
    with pytest.raises(UserError, match="is a folder; give a file"):
        programs.check_writable(tmp_path)
    programs.check_writable(tmp_path / "other" / "p.zip")
    assert not list((tmp_path / "other").iterdir())


def test_who_the_programs_are_for_is_said_in_json():
    made = programs.identity({"sizes": (1, 2), "name": None})
    assert made == json.loads(json.dumps(made)) and made["config"] == {"sizes": [1, 2], "name": None}
    assert made["device"].startswith("cpu ") and made["jax"]
