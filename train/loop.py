"""The training loop: phases, checkpoints, logs, evaluation, signals. What is learnt is a `Task`'s business."""

import json
import pathlib
import signal
import time
from collections import defaultdict
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from train.checkpoints import Checkpoints, claim_directory
from train.optimizers import learning_rate_schedule, make_optimizer
from train.state import TrainState, init_state, make_step
from x2v_jax.errors import UserError
from x2v_jax.models.functional import Params, parameter_count

_MAX_SKIPPED_IN_A_ROW = 20


class Task(Protocol):
    """What is learnt. `phase` is one entry of config.phases."""

    def init(self, key: jax.Array) -> Params: ...

    def start_phase(self, params: Params, phase: Any) -> Params: ...

    def batch(self, step: int, phase: Any) -> Any:
        """The batch of a step: a function of the config's seed and the step alone, so that resuming is exact."""
        ...

    def loss(self, params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """Measures the averaged weights; may leave pictures in `directory`."""
        ...

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a native checkpoint."""
        ...


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the state has been saved."""


def train(config: Any, task: Task) -> TrainState:
    """Runs or resumes config.run_dir to the end of its last phase.

    Raises:
        UserError: the directory belongs to another config or holds nothing that reads back, or training diverged.
        Stopped: a signal asked for an end; a checkpoint has been written.
    """
    directory = pathlib.Path(config.run_dir)
    claim_directory(directory, _recorded(config), resume_any=config.resume_any)
    checkpoints = Checkpoints(directory)
    log = (directory / "log.jsonl").open("a")
    stop = _StopFlag()
    try:
        return _run_phases(config, task, directory, checkpoints, log, stop)
    finally:
        stop.restore()
        checkpoints.wait()
        checkpoints.close()
        log.close()


def load_ema(config: Any, task: Task) -> Params:
    """The averaged weights of the newest checkpoint of config.run_dir.

    Raises:
        UserError: there is none, or none that reads back.
    """
    if not pathlib.Path(config.run_dir, "checkpoints").is_dir():
        raise UserError(f"run_dir {config.run_dir} holds no checkpoints; train first, or name another --config.run_dir")
    checkpoints = Checkpoints(pathlib.Path(config.run_dir))
    state = init_state(task.init(jax.random.key(config.seed)), _optimizer(config, config.phases[0]))
    try:
        restored = checkpoints.restore_latest(state)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"run_dir {config.run_dir} holds no checkpoints; train first, or name another --config.run_dir")
    return restored.ema


def _run_phases(
    config: Any, task: Task, directory: pathlib.Path, checkpoints: Checkpoints, log: Any, stop: "_StopFlag"
) -> TrainState:
    key = jax.random.key(config.seed)
    params = task.init(key)
    print(f"{parameter_count(params):,} parameters, run directory {directory}")
    state = init_state(params, _optimizer(config, config.phases[0]))
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state = restored
        checkpoints.set_aside_after(int(state.step))
        print(f"resumed at step {int(state.step)}")
    begin = 0
    for phase in config.phases:
        end = begin + phase.steps
        if int(state.step) < end:
            optimizer = _optimizer(config, phase)
            if int(state.step) == begin:
                # A phase starts its optimizer afresh: moments of the phase before do not fit weights that come alive.
                params = task.start_phase(state.params, phase)
                ema = task.start_phase(state.ema, phase)
                state = state._replace(params=params, ema=ema, opt_state=optimizer.init(params))
            state = _run_phase(config, task, phase, end, optimizer, state, directory, checkpoints, log, stop)
        begin = end
    return state


def _run_phase(
    config: Any,
    task: Task,
    phase: Any,
    end: int,
    optimizer: Any,
    state: TrainState,
    directory: pathlib.Path,
    checkpoints: Checkpoints,
    log: Any,
    stop: "_StopFlag",
) -> TrainState:
    step_fn = make_step(task.loss, optimizer, config.ema_decay)
    root = jax.random.fold_in(jax.random.key(config.seed), 1)
    window: dict[str, list[Any]] = defaultdict(list)
    since = time.monotonic()
    first = int(state.step)
    bar = tqdm(range(first, end), initial=first, total=end, desc=phase.name, unit="step", mininterval=2)
    for step in bar:
        state, metrics = step_fn(state, task.batch(step, phase), jax.random.fold_in(root, step))
        for name, value in metrics.items():
            window[name].append(value)
        done = step + 1
        if done % config.log_every == 0 or done == end:
            means = {name: float(np.mean([float(v) for v in values])) for name, values in window.items()}
            seconds = (time.monotonic() - since) / len(window["loss"])
            _write(log, {"step": done, "phase": phase.name, "seconds_per_step": seconds, **means})
            bar.set_postfix(loss=f"{means['loss']:.4f}")
            if float(metrics["skipped"]) >= _MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"training diverged: {_MAX_SKIPPED_IN_A_ROW} steps in a row before step {done} had a loss or "
                    "gradient that is not finite; lower --config.phases learning_rate and resume"
                )
            window.clear()
            since = time.monotonic()
        if done % config.eval_every == 0 or done == end:
            started = time.monotonic()
            results = task.evaluate(state.ema, done, directory)
            _write(log, {"step": done, **{f"eval/{k}": v for k, v in results.items()}})
            bar.write(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in results.items()))
            since += time.monotonic() - started
        if done % config.save_every == 0 or done == end or stop.requested:
            checkpoints.save(state)
        if stop.requested:
            raise Stopped(f"stopped at step {done}; the same command goes on from there")
    return state


def _optimizer(config: Any, phase: Any) -> Any:
    # The schedule counts from the start of the phase: the optimizer's own step count is reset there.
    schedule = learning_rate_schedule(
        phase.learning_rate, phase.steps, phase.warmup, phase.decay_share, phase.final_scale
    )
    return make_optimizer(config.optimizer, schedule, clip_norm=config.clip_norm)


def _recorded(config: Any) -> dict[str, Any]:
    values = json.loads(config.to_json_best_effort())
    # Where and how often to write does not make it another run.
    for name in ("run_dir", "resume_any", "log_every", "eval_every", "save_every"):
        values.pop(name)
    return values


def _write(log: Any, values: dict[str, Any]) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()


class _StopFlag:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after the current step."""

    def __init__(self):
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
