"""What to say where memory does not suffice: the need, its biggest parts, and the settings with which it would do.

Weights are counted exactly and activations are not, so a video is refused beforehand only where its weights alone are
more than the device has, or where the user set a limit; a prediction beyond what is free is a warning, because it can
be wrong in either direction and a run that would have gone well is worth more than an error that comes early.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator
from typing import Protocol, Unpack, cast, runtime_checkable

from x2v_jax.errors import UserError
from x2v_jax.memory.predict import MemoryPlan, PlanChanges


@runtime_checkable
class PlanWith(Protocol):
    """Predicted memory of a video with some fields of `predict.Workload` changed."""

    def __call__(self, **changes: Unpack[PlanChanges]) -> MemoryPlan: ...


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that a user could change. values: fields of `predict.Workload` after it."""

    words: str
    values: PlanChanges


def explain(plan: MemoryPlan, limit: int | None, changes: list[Change], plan_with: PlanWith) -> str:
    """A sentence: what is needed, of what it consists, what would fit.

    Args:
        limit: bytes there are; None: not known, and then less than the plan's peak.
        changes: what there is to try, the least harmful first.
    """
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    parts = sorted(plan.parts[phase].items(), key=lambda part: -part[1])[:3]
    biggest = ", ".join(f"{_words(name, plan)} {_gb(size)}" for name, size in parts if size)
    need = f"{_gb(plan.peak)} GB predicted in the phase {phase!r} (the biggest parts, in GB: {biggest})"
    found = settings_that_fit(plan, limit, changes, plan_with)
    if not found:
        return f"{need}; no settings help enough here: ask for a smaller height, width or num_frames"
    return f"{need}; {found}"


def settings_that_fit(plan: MemoryPlan, limit: int | None, changes: list[Change], plan_with: PlanWith) -> str:
    """What to change, with the need that is left: single changes that suffice, or as many as it takes; or nothing."""
    limit = plan.peak - 1 if limit is None else limit
    alone = [(change, plan_with(**change.values).peak) for change in changes]
    if enough := [f"{change.words} ({_gb(peak)} GB)" for change, peak in alone if peak <= limit]:
        return " or ".join(enough[:3])
    together: PlanChanges = {}
    words: list[str] = []
    peak = plan.peak
    for change, _ in alone:
        less = plan_with(**(together | change.values)).peak
        if less < peak:
            together, peak = together | change.values, less
            words.append(change.words)
        if peak <= limit:
            return f"{' and '.join(words)} ({_gb(peak)} GB)"
    return ""


def check(plan: MemoryPlan, free: int | None, device: int | None, limit: int | None, say: Callable[[int], str]) -> None:
    """Compares a prediction with what there is, before anything is loaded.

    Args:
        free, device: bytes that the device could still give, and that it has; None: not known.
        limit: bytes that the user allows.
        say: bytes there are -> `explain`'s sentence.

    Raises:
        UserError: it is beyond the user's limit, or its weights alone are more than the device has.
    """
    if limit is not None and plan.peak > limit:
        raise UserError(f"memory_limit is {_gb(limit)} GB, and this video needs more: {say(limit)}")
    if device is not None and plan.weights_at_once > device:
        raise UserError(
            f"the device has {_gb(device)} GB of memory, and the weights that are needed at one time take "
            f"{_gb(plan.weights_at_once)} GB: {say(device)}"
        )
    if free is not None and plan.peak > free:
        warnings.warn(
            f"the device has {_gb(free)} GB of memory free, which may not be enough: {say(free)}", stacklevel=3
        )


@contextlib.contextmanager
def explained(say: Callable[[], str]) -> Generator[None]:
    """Turns jax's error on full memory into a UserError that says what to change."""
    import jax

    # jaxlib, where the error comes from, has no types.
    failure = cast(type[Exception], jax.errors.JaxRuntimeError)  # pyright: ignore[reportUnknownMemberType]
    try:
        yield
    except failure as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device's memory does not suffice: {say()}") from error


def _words(part: str, plan: MemoryPlan) -> str:
    return f"weights of the {part.replace('_', ' ')}" if part in plan.weights else part


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.2g}"
