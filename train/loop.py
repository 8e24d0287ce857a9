"""The training loop: phases, checkpoints, logs, evaluation, signals. What is learnt is a `Task`'s business."""

import contextlib
import itertools
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from tqdm import tqdm

from x2v_jax.cli.interrupts import StopFlag
from x2v_jax.errors import UserError
from x2v_jax.memory.device import peak_bytes
from x2v_jax.models.functional import Params, parameter_count
from x2v_jax.parallel import Mesh, place_batch, place_tree, tree_shardings

from .checkpoints import Checkpoints
from .data.order import read_ahead
from .logs import Log
from .run_directory import RunDirectory
from .state import Averaging, TrainState, init_state, learning_rate_schedule, make_optimizer, make_update

_MAX_SKIPPED_IN_A_ROW = 20


class Task(Protocol):
    """What is learnt. `phase` is one entry of config.phases.

    roles: what is trained, by name. averaged: the one that is averaged, evaluated and exported.
    frozen: networks that are used and not trained, as a tree of arrays.
    """

    roles: Sequence[str]
    averaged: str
    frozen: Any

    def init(self, key: jax.Array) -> dict[str, Params]:
        """The first parameters of every role."""
        ...

    def start_phase(self, params: Params, phase: Any) -> Params: ...

    def updates(self, step: int) -> Sequence[str]:
        """The roles that learn in a step, in order."""
        ...

    def batch(self, role: str, step: int, phase: Any) -> Any:
        """What a role learns from in a step: a function of the config's seed and the step alone, so that resuming is
        exact. Leaves have the samples on their first axis."""
        ...

    def gradient(
        self, role: str, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
        """(loss, gradients of the role's parameters, metrics). Compiled."""
        ...

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """Measures the averaged weights; may leave pictures in `directory`."""
        ...

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a native checkpoint."""
        ...


class SingleRoleTask:
    """A task with one role, "model", and a loss(params, batch, key) -> (loss, metrics)."""

    roles: ClassVar[Sequence[str]] = ("model",)
    averaged = "model"
    frozen: Any = ()
    loss: Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

    def start_phase(self, params: Params, phase: Any) -> Params:
        return params

    def updates(self, step: int) -> Sequence[str]:
        return self.roles

    def gradient(
        self, role: str, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(self.loss, has_aux=True)(params[role], batch, key)
        return loss, grads, metrics


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the state has been saved."""


def train(config: Any, task: Task) -> TrainState:
    """Runs or resumes config.run_dir to the end of its last phase.

    Raises:
        UserError: the directory belongs to another config or holds nothing that reads back, or training diverged.
        Stopped: a signal asked for an end; a checkpoint has been written.
    """
    run = _Run(config, task)
    try:
        return run.all_phases()
    finally:
        run.close()


def load_ema(config: Any, task: Task) -> Params:
    """The averaged weights of the newest checkpoint of config.run_dir.

    Raises:
        UserError: there is none, or none that reads back.
    """
    if not pathlib.Path(config.run_dir, "checkpoints").is_dir():
        raise UserError(f"run_dir {config.run_dir} holds no checkpoints; train first, or name another --config.run_dir")
    checkpoints = Checkpoints(pathlib.Path(config.run_dir))
    optimizers = {role: optimizer_of(config, role, config.phases[0]) for role in task.roles}
    state = init_state(task.init(jax.random.key(config.seed)), optimizers, task.averaged)
    try:
        restored = checkpoints.restore_latest(state)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"run_dir {config.run_dir} holds no checkpoints; train first, or name another --config.run_dir")
    return restored.ema


class _Run:
    """One run of `train`: its directory, log and checkpoints."""

    def __init__(self, config: Any, task: Task):
        self.config, self.task = config, task
        self.mesh = Mesh.of(config.devices or None)
        for phase in config.phases:
            self.mesh.check_batch(phase.batch_size, config.accumulate)
        self.held = RunDirectory(config)
        self.directory = self.held.path
        self.checkpoints = Checkpoints(self.directory)
        self.log = Log(self.directory)
        self.stop = StopFlag()
        self.frozen: Any = None
        self.root = jax.random.fold_in(jax.random.key(config.seed), 1)

    def close(self) -> None:
        self.stop.restore()
        self.log.close()
        try:
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.held.release()

    def all_phases(self) -> TrainState:
        state = self._first_state()
        self.frozen = place_tree(self.task.frozen, self.mesh)
        begin = 0
        for phase in self.config.phases:
            end = begin + phase.steps
            if int(state.step) < end:
                if int(state.step) == begin:
                    state = self._start_phase(state, phase)
                state = self._phase(phase, end, state)
            begin = end
        return state

    def _first_state(self) -> TrainState:
        params = self.task.init(jax.random.key(self.config.seed))
        counts = ", ".join(f"{name} {parameter_count(tree):,}" for name, tree in params.items())
        print(f"parameters: {counts}; run directory {self.directory}")
        optimizers = {role: optimizer_of(self.config, role, self.config.phases[0]) for role in self.task.roles}
        state = place_tree(init_state(params, optimizers, self.task.averaged), self.mesh)
        restored = self.checkpoints.restore_latest(state)
        if restored is None:
            return state
        self.checkpoints.set_aside_after(int(restored.step))
        print(f"resumed at step {int(restored.step)}")
        for line in self._changed_rates(int(restored.step)):
            print(line)
        return restored

    def _changed_rates(self, step: int) -> Iterator[str]:
        """For an extended run, where the learning rate goes on from another value than it had come to."""
        for begin, old, new in zip(_begins(self.held.before), self.held.before, self.config.phases, strict=False):
            if not begin < step <= begin + old["steps"] or old["steps"] == new.steps:
                continue
            longer = new.to_dict()
            shorter = {**longer, "steps": old["steps"]}
            for role in self.task.roles:
                count = (step - begin) // longer.get(role, {}).get("every", longer.get("every", 1))
                was, is_now = (float(_rate(phase, role)(count)) for phase in (shorter, longer))
                if was != is_now:
                    yield f"{role}: the learning rate had come to {was:.3g}; in the longer phase it is {is_now:.3g}"

    def _start_phase(self, state: TrainState, phase: Any) -> TrainState:
        # A phase starts its optimizers afresh: moments of the phase before do not fit weights that come alive.
        params = {name: self.task.start_phase(tree, phase) for name, tree in state.params.items()}
        optimizers = {role: optimizer_of(self.config, role, phase) for role in self.task.roles}
        fresh = init_state(params, optimizers, self.task.averaged)
        fresh = fresh._replace(
            step=state.step, ema=self.task.start_phase(state.ema, phase), skipped_total=state.skipped_total
        )
        return place_tree(fresh, self.mesh)

    def _phase(self, phase: Any, end: int, state: TrainState) -> TrainState:
        config = self.config
        updates = {role: self._update(role, phase, state) for role in self.task.roles}
        window: dict[str, list[Any]] = defaultdict(list)
        since, steps = time.monotonic(), 0
        first, begin = int(state.step), end - phase.steps
        bar = tqdm(range(first, end), initial=first - begin, total=phase.steps, desc=phase.name, unit="step")

        def make(step: int) -> dict[str, Any]:
            return {role: self.task.batch(role, step, phase) for role in self.task.updates(step)}

        with contextlib.closing(read_ahead(make, range(first, end), config.read_ahead)) as batches:
            for step, batch in zip(bar, batches, strict=True):
                state = self._step(updates, state, step, batch, window)
                done, steps = step + 1, steps + 1
                if done % config.log_every == 0 or done == end:
                    means = {name: _mean(values) for name, values in window.items()}
                    seconds = (time.monotonic() - since) / steps
                    costs = {"seconds_per_step": seconds, "peak_memory_gb": peak_bytes() / 1e9}
                    self.log.write(done, {**costs, **means}, phase.name)
                    bar.set_postfix({name: f"{value:.4f}" for name, value in means.items() if name.endswith("loss")})
                    self._check_divergence(state, done)
                    window.clear()
                    since, steps = time.monotonic(), 0
                if done % config.eval_every == 0 or done == end:
                    started = time.monotonic()
                    results = self.task.evaluate(state.ema, done, self.directory)
                    self.log.write(done, {f"eval/{k}": v for k, v in results.items()})
                    bar.write(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in results.items()))
                    since += time.monotonic() - started
                if done % config.save_every == 0 or done == end or self.stop.requested:
                    self.checkpoints.save(state)
                if self.stop.requested:
                    raise Stopped(f"stopped at step {done}; the same command goes on from there")
        return state

    def _step(
        self,
        updates: dict[str, Any],
        state: TrainState,
        step: int,
        batches: dict[str, Any],
        window: dict[str, list[Any]],
    ) -> TrainState:
        for role, batch in batches.items():
            key = jax.random.fold_in(jax.random.fold_in(self.root, step), self.task.roles.index(role))
            state, metrics = updates[role](state, self.frozen, place_batch(batch, self.mesh), key)
            prefix = "" if len(self.task.roles) == 1 else f"{role}/"
            for name, value in metrics.items():
                window[prefix + name].append(value)
        return state

    def _update(self, role: str, phase: Any, state: TrainState) -> Any:
        def gradient(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
            return self.task.gradient(role, params, frozen, batch, key)

        config = self.config
        averaging = Averaging(self.task.averaged, config.ema_decay, config.ema_start)
        return make_update(
            role,
            gradient,
            optimizer_of(config, role, phase),
            averaging,
            accumulate=config.accumulate,
            max_norm=config.max_grad_norm,
            # The counts of a step belong to its last update.
            ends_step=role == self.task.roles[-1],
            shardings=tree_shardings(state, self.mesh) if self.mesh.size > 1 else None,
        )

    def _check_divergence(self, state: TrainState, done: int) -> None:
        if int(state.skipped) >= _MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"training diverged: {_MAX_SKIPPED_IN_A_ROW} updates in a row before step {done} had a loss or "
                "gradient that is not finite or above max_grad_norm; lower --config.phases learning_rate and resume"
            )


def _mean(values: list[Any]) -> float:
    """Of what is a number: a metric that a step cannot give (a loss of an exit step that was not drawn) is NaN."""
    numbers = np.asarray([float(v) for v in values])
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def optimizer_of(config: Any, role: str, phase: Any) -> Any:
    """A role's optimizer in a phase. The phase's entry of the role's name replaces its other settings."""
    # The schedule counts from the start of the phase: the optimizer's own step count is reset there.
    rate = _rate(phase.to_dict(), role)
    return make_optimizer(config.optimizer, rate, clip_norm=config.clip_norm, **config.get("adam", {}))


def _rate(phase: dict[str, Any], role: str) -> Any:
    """A role's learning rate by the count of its updates in the phase."""
    settings = {**phase, **phase.get(role, {})}
    # A role that learns in every n-th step goes through its schedule in a n-th of the steps.
    steps = max(1, phase["steps"] // settings.get("every", 1))
    return learning_rate_schedule(
        settings["learning_rate"], steps, settings["warmup"], settings["decay_share"], settings["final_scale"]
    )


def _begins(phases: list[Any]) -> list[int]:
    """The step that each begins at."""
    return [0, *itertools.accumulate(phase["steps"] for phase in phases)][:-1]
