"""How far a run is: what is said, when, and that saying it changes nothing in the video."""

import dataclasses
import io
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from x2v_jax import Pipeline, Request
from x2v_jax.generate.progress import Progress, vae_to_step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_ten_seconds_with_the_time_left():
    clock, output = Time(), io.StringIO()
    progress = Progress("1/2 ", clock=clock, output=output)
    progress.expect(4, decoding=2.0)
    for seconds, stage in ((0, "load"), (3, "text"), (5, "denoise")):
        clock.now = seconds
        progress.begin(stage)
        progress.show()
    assert not output.getvalue()
    clock.now = 12
    progress.show()
    assert output.getvalue() == "1/2 compiling and first step, 12 s\n"
    for done, clock.now in ((1, 30.0), (2, 40.0)):
        progress.step(done)
    assert output.getvalue().splitlines()[-1] == "1/2 denoising, 2 of 4 steps, 40 s, about 40 s left"
    clock.now = 60
    progress.begin("vae")
    clock.now = 65
    assert progress.text() == "1/2 decoding, 65 s, about 15 s left"
    progress.begin("writing the file")
    assert progress.text() == "1/2 writing the file, 65 s"


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end():
    clock, output = Time(), Terminal()
    with Progress(clock=clock, output=output) as progress:
        progress.expect(2, decoding=1.0)
        progress.begin("denoise")
        for done, clock.now in ((1, 10.0), (2, 20.0)):
            progress.step(done)
    assert "[################........]  67 %  denoising, 2 of 2 steps, 20 s, about 10 s left" in output.getvalue()
    assert output.getvalue().endswith("\r\033[K")


def test_a_closed_terminal_ends_nothing():
    output = io.StringIO()
    progress = Progress(output=output, every=0.0)

    def broken(text: str) -> int:
        raise BrokenPipeError

    output.write = broken  # type: ignore[method-assign]
    progress.show(at_once=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path_factory.mktemp("p") / "t2v", schedule=tiny_models.DISTILLED)


def test_decoding_counts_as_steps(path: pathlib.Path):
    resolved = Pipeline.from_checkpoint(path).resolve(Request("a"))
    vaes = (dataclasses.replace(tiny_models.VAE, dim=dim) for dim in (4, 8))
    small, large = (vae_to_step(resolved, tiny_models.T2V, vae) for vae in vaes)
    assert large == pytest.approx(4 * small) and small > 0


@pytest.mark.parametrize("schedule", [tiny_models.DISTILLED, tiny_models.BASE], ids=["distilled", "base"])
def test_watching_changes_no_byte_in_bfloat16(
    schedule: object, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    file = tiny_models.write_checkpoint(tmp_path / "t2v", schedule=schedule)  # type: ignore[arg-type]
    pipe, request = Pipeline.from_checkpoint(file, dtype=jnp.bfloat16), Request("a red circle", seed=3)
    plain = pipe.generate(request)
    watched = pipe.generate(request, lambda *_: None, progress=True)
    np.testing.assert_array_equal(plain.latents, watched.latents)
    np.testing.assert_array_equal(plain.frames, watched.frames)
    np.testing.assert_array_equal(pipe("a red circle", seed=3, progress=True), plain.frames)


def test_the_first_pipeline_sets_a_compilation_cache_where_there_is_none(path: pathlib.Path, tmp_path: pathlib.Path):
    code = (
        "import sys, jax; folder = sys.argv[2]\n"
        "if folder == 'jax': jax.config.update('jax_compilation_cache_dir', '/own')\n"
        "from x2v_jax import Pipeline\n"
        "Pipeline.from_checkpoint(sys.argv[1], **({'compilation_cache': ''} if folder == 'off' else {}))\n"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")} | {"HOME": str(tmp_path)}
    expected = {"default": str(tmp_path / ".cache" / "x2v_jax"), "jax": "/own", "off": "None"}
    runs = {
        name: subprocess.Popen(
            [sys.executable, "-c", code, str(path), name], env=environment, stdout=subprocess.PIPE, text=True
        )
        for name in expected
    }
    assert {name: run.communicate()[0].strip() for name, run in runs.items()} == expected
