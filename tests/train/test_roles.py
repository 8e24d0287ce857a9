"""Runs of two roles: their schedule, average, accumulation, devices, and what a kill leaves."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from two_roles import SIZE, TwoRoles, make_config, run

from train.loop import train
from x2v_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def lines(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "two_roles.py"), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def stored(run_dir: pathlib.Path) -> list[np.ndarray]:
    with np.load(run_dir / "state.npz") as file:
        return [file[str(i)] for i in range(len(file.files))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, run(str(run_dir), 20)


def test_both_roles_learn_and_are_logged_apart(whole: Any):
    run_dir, _ = whole
    log = [line for line in lines(run_dir) if "critic/loss" in line]
    assert log[-1]["generator/loss"] < log[0]["generator/loss"]
    assert {"generator/grad_norm", "critic/grad_norm", "seconds_per_step"} <= set(log[0])
    assert list((run_dir / "tensorboard").iterdir())


def test_the_generator_learns_in_every_third_step(tmp_path: pathlib.Path):
    state = run(str(tmp_path), 7)
    counts = {role: _count(state.roles[role].opt_state) for role in ("generator", "critic")}
    assert counts == {"generator": 3, "critic": 7}


def _count(opt_state: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim == 0 and leaf.dtype == np.int32]
    return int(max(leaves))


def test_the_average_is_the_generator_until_it_starts(tmp_path: pathlib.Path):
    early = run(str(tmp_path / "early"), 4)
    np.testing.assert_array_equal(early.ema["w"], early.params["generator"]["w"])
    late = run(str(tmp_path / "late"), 13)
    assert np.abs(np.asarray(late.ema["w"] - late.params["generator"]["w"])).max() > 0


def test_accumulation_gives_the_same_weights(tmp_path: pathlib.Path, whole: Any):
    parts = run(str(tmp_path), 20, accumulate=4)
    assert_same_weights(parts, whole[1])


def assert_same_weights(a: Any, b: Any) -> None:
    """Adam divides by the size of the gradient: where that is near zero it shows how the sum was rounded."""
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        difference = np.abs(np.asarray(x - y))
        assert difference.mean() < 1e-6 and difference.max() < 2e-4


def test_updates_with_exploding_gradients_are_left_out_and_counted(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="diverged"):
        run(str(tmp_path), 60, max_grad_norm=1e-9)
    assert [line for line in lines(tmp_path) if line.get("critic/skipped", 0) > 0]


@pytest.mark.slow
def test_eight_devices_give_the_same_loss_and_split_the_weights(tmp_path: pathlib.Path, whole: Any):
    told = finish(start(tmp_path, 20, 8))
    assert told["devices"] == 8
    assert any("fsdp" in spec for spec in told["specs"])
    for one, eight in zip(lines(whole[0]), lines(tmp_path), strict=True):
        losses = {name: value for name, value in one.items() if name.endswith("/loss")}
        assert losses == pytest.approx({name: eight[name] for name in losses}, rel=1e-5)


@pytest.mark.slow
def test_another_number_of_devices_goes_on(tmp_path: pathlib.Path, whole: Any):
    finish(start(tmp_path, 8, 4))
    state = train(make_config(str(tmp_path), 20, resume_any=True), TwoRoles())
    assert int(state.step) == 20
    # Another learning-rate schedule is not in play (no decay), so the run is the same as in one piece.
    assert_same_weights(state, whole[1])


@pytest.mark.slow
def test_a_run_killed_in_every_phase_goes_on_to_the_very_same_state(tmp_path: pathlib.Path):
    arguments = (180, 1, 1, 3)  # three phases of 60 steps, a checkpoint every four
    finish(start(tmp_path / "whole", *arguments))
    killed = tmp_path / "killed"
    for phase in range(3):
        process = start(killed, *arguments)
        _wait_for(lambda p=phase, process=process: _checkpoints(killed) > 15 * p or process.poll() is not None)
        assert process.poll() is None, f"the run ended before it could be killed in phase {phase}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 15 * phase < _checkpoints(killed) <= 15 * phase + 15
    finish(start(killed, *arguments))
    for ours, theirs in zip(stored(killed), stored(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _checkpoints(run_dir: pathlib.Path) -> int:
    steps = [int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(steps, default=0) // 4


def _wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_batch_that_does_not_split_is_refused_before_anything_starts(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"batch_size is 16; .* accumulate 3 it has to be a multiple of 3: give 15"):
        run(str(tmp_path / "run"), 20, accumulate=3)
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="devices is 64; this machine has"):
        run(str(tmp_path), 20, devices=64)


def test_matrices_are_large_enough_to_be_split():
    from x2v_jax.parallel import spec_of

    assert spec_of((SIZE, SIZE), 8) != spec_of((SIZE, SIZE), 1)
