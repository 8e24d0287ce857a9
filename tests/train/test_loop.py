"""The training loop on a task small enough to follow by hand: a weight that moves to a target."""

import contextlib
import json
import os
import pathlib
import resource
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from train.loop import SingleRoleTask, Stopped, load_ema, train
from x2v_jax.config.training import phase, training_config
from x2v_jax.errors import UserError


class Regression(SingleRoleTask):
    """Learns weights [3] from batches that depend on the step alone."""

    def __init__(self, *, stop_at: int | None = None, poison_from: int | None = None):
        self.stop_at, self.poison_from = stop_at, poison_from
        self.phases_started: list[str] = []

    def init(self, key: jax.Array) -> Any:
        return {"model": {"w": jax.random.normal(key, (3,))}}

    def start_phase(self, params: Any, phase: Any) -> Any:
        self.phases_started.append(phase.name)
        return params

    def batch(self, role: str, step: int, phase: Any) -> Any:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = np.random.default_rng([7, step]).normal(size=(phase.batch_size, 3)).astype(np.float32)
        poisoned = self.poison_from is not None and step >= self.poison_from
        return x * (np.nan if poisoned else 1.0)

    def loss(self, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        noise = 0.01 * jax.random.normal(key, ())
        return jnp.mean((batch @ (params["w"] - 1.0) + noise) ** 2), {}

    def evaluate(self, params: Any, step: int, directory: pathlib.Path) -> dict[str, float]:
        return {"distance": float(jnp.abs(params["w"] - 1.0).max())}

    def export(self, params: Any, path: pathlib.Path, *, overwrite: bool = False) -> None:
        path.mkdir(exist_ok=overwrite)


def make_config(run_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    config = training_config(task="regression", run_dir=str(run_dir))
    config.phases = (
        phase("first", steps=30, learning_rate=0.05, batch_size=4),
        phase("second", steps=30, learning_rate=0.02, warmup=5, decay_share=0.5, final_scale=0.1, batch_size=8),
    )
    config.log_every, config.save_every, config.eval_every = 10, 7, 30
    config.read_ahead = 0  # a batch that sends a signal then sends it in its own step
    config.update(changes)
    return config


def leaves(state: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_it_learns_and_logs(tmp_path: pathlib.Path):
    state = train(make_config(tmp_path / "run"), Regression())
    assert int(state.step) == 60
    assert float(jnp.abs(state.params["model"]["w"] - 1.0).max()) < 0.2
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.2 * losses[0]
    assert all(0.01 < line["peak_memory_gb"] < 100 for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "eval/distance" in line] == [30, 60]


@pytest.mark.parametrize("stop_at", [3, 29, 41])
def test_a_stopped_run_resumes_to_the_very_same_state(tmp_path: pathlib.Path, stop_at: int):
    expected = leaves(train(make_config(tmp_path / "whole"), Regression()))
    config = make_config(tmp_path / "parts")
    with pytest.raises(Stopped, match=f"step {stop_at + 1}"):
        train(config, Regression(stop_at=stop_at))
    resumed = leaves(train(config, Regression()))
    for ours, theirs in zip(resumed, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_reading_ahead_changes_nothing(tmp_path: pathlib.Path):
    expected = leaves(train(make_config(tmp_path / "in_turn"), Regression()))
    config = make_config(tmp_path / "ahead", read_ahead=3)
    with pytest.raises(Stopped):
        train(config, Regression(stop_at=20))
    for got, wanted in zip(leaves(train(config, Regression())), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_signal_handlers_are_given_back(tmp_path: pathlib.Path):
    before = signal.getsignal(signal.SIGTERM)
    train(make_config(tmp_path / "run"), Regression())
    assert signal.getsignal(signal.SIGTERM) is before


def test_each_phase_starts_once_even_after_a_resume(tmp_path: pathlib.Path):
    config = make_config(tmp_path / "run")
    with pytest.raises(Stopped):
        train(config, Regression(stop_at=40))
    task = Regression()
    train(config, task)
    assert task.phases_started == []


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(tmp_path: pathlib.Path):
    healthy = train(
        make_config(tmp_path / "healthy", phases=(phase("a", steps=10, learning_rate=0.05, batch_size=4),)),
        Regression(),
    )
    config = make_config(tmp_path / "run", phases=(phase("a", steps=60, learning_rate=0.05, batch_size=4),))
    with pytest.raises(UserError, match="training diverged: 20 updates in a row"):
        train(config, Regression(poison_from=10))
    kept = load_ema(config, Regression())
    np.testing.assert_array_equal(kept["w"], healthy.ema["w"])


def test_a_directory_of_another_run_is_refused(tmp_path: pathlib.Path):
    train(make_config(tmp_path / "run"), Regression())
    other = make_config(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match=r"holds a run of another config \(seed was 0 and is 1\).*resume_any"):
        train(other, Regression())
    other.resume_any = True
    train(other, Regression())


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    config = make_config(tmp_path / "run")
    train(config, Regression())
    folders = sorted(
        (p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
    )
    for file in [p for p in folders[-1].rglob("*") if p.is_file()]:
        file.write_bytes(b"")
    with pytest.raises(Stopped):  # what is done again has to be saved again, at or before the damaged step
        train(config, Regression(stop_at=58))
    assert "does not read back" in capsys.readouterr().out
    assert int(folders[-1].name) == 60 and (tmp_path / "run" / "unreadable" / "60").is_dir()
    state = train(config, Regression())
    assert "resumed at step 59" in capsys.readouterr().out
    assert int(state.step) == 60


def test_checkpoints_that_all_are_damaged_are_kept_and_the_run_refused(tmp_path: pathlib.Path):
    config = make_config(tmp_path / "run")
    train(config, Regression())
    steps = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal()]
    for file in [p for step in steps for p in step.rglob("*") if p.is_file()]:
        file.write_bytes(b"")
    with pytest.raises(UserError, match="56, 60, and none reads back"):
        train(config, Regression())
    with pytest.raises(UserError, match="none reads back"):
        load_ema(config, Regression())
    assert all(step.is_dir() for step in steps)


def test_exporting_without_a_run_says_so(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="holds no checkpoints; train first"):
        load_ema(make_config(tmp_path / "nothing"), Regression())


class Wide(Regression):
    """Weights that take more than the small files of a run."""

    def init(self, key: jax.Array) -> Any:
        return {"model": {"w": jax.random.normal(key, (3,)), "unused": jax.random.normal(key, (40_000,))}}


@contextlib.contextmanager
def no_room_for_large_files() -> Iterator[None]:
    """A write beyond 64 kB fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: pathlib.Path):
    expected = leaves(train(make_config(tmp_path / "whole"), Wide()))
    config = make_config(tmp_path / "run")
    with pytest.raises(Stopped):
        train(config, Wide(stop_at=10))
    with no_room_for_large_files(), pytest.raises(UserError, match=r"could not be saved.*free some space.*step 11"):
        train(config, Wide())
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal()]
    assert sorted(map(int, saved)) == [7, 11]
    for got, wanted in zip(leaves(train(config, Wide())), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
