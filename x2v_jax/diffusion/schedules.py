"""Noise levels as numbers on the host: which sigma each step starts from. No jax import, so bad values are named fast.

sigma runs from 1 (noise) to 0 (clean); the network sees timestep = 1000 * sigma.
"""

import itertools
import numbers
from collections.abc import Sequence
from typing import Literal

import numpy as np

from x2v_jax.errors import UserError, is_number

NUM_TRAIN_TIMESTEPS = 1000

# How the steps become compiled programs: "steps" is one program, called for each; the others put all steps of a
# denoising_step_list into one, where lists of more than MOST_UNROLLED are a scan.
Loop = Literal["steps", "unrolled", "scan"]
MOST_UNROLLED = 16


def shift_sigma[T](sigma: T, shift: float) -> T:
    """Moves sigma towards noise: shift * sigma / (1 + (shift - 1) * sigma). Keeps 0 and 1; shift 1 changes nothing.

    Larger pictures need a larger shift, because neighbouring pixels average noise away (Esser et al.,
    arXiv:2403.03206). Takes floats, numpy and jax arrays.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)  # pyright: ignore[reportOperatorIssue]


def timestep_from_sigma[T](sigma: T) -> T:
    """1000 * sigma, not rounded."""
    return NUM_TRAIN_TIMESTEPS * sigma  # pyright: ignore[reportOperatorIssue, reportReturnType]


def check_shift(shift: float) -> float:
    """Returns `shift` if it is a positive finite number.

    Raises:
        UserError: it is not.
    """
    if not is_number(shift) or not shift > 0:
        raise UserError(f"shift is {shift!r}; give a number above 0 (Wan2.1 uses 3 to 8, and 1 shifts nothing)")
    return float(shift)


def step_sigmas(denoising_step_list: Sequence[float], shift: float = 1.0, *, warp: bool = True) -> np.ndarray:
    """The sigmas that a step-distilled model was trained at.

    Args:
        denoising_step_list: falling timesteps, above 0 and at most 1000, e.g. (1000, 750, 500, 250).
        shift: the time shift of the training.
        warp: whether the list is still to be shifted. Lists of step distillation are; CausVid's (999, 934, 862, ...)
            were written down after the shift, and shifting them twice would end the sampling at sigma 0.39.

    Returns:
        float32 [S], falling. Timesteps are 1000 * sigma and are not rounded: 833.3333 for 500 at shift 5.

    Raises:
        UserError: the list is empty, holds something that is no timestep, or does not fall.
    """
    shift = check_shift(shift)
    if isinstance(denoising_step_list, str) or not isinstance(denoising_step_list, Sequence | np.ndarray):
        raise UserError(
            f"denoising_step_list is {denoising_step_list!r}; give a list of timesteps such as (1000, 750, 500, 250)"
        )
    steps = list(denoising_step_list)
    if not steps:
        raise UserError("denoising_step_list is empty; give at least one timestep, e.g. (1000, 750, 500, 250)")
    for value in steps:
        if not is_number(value) or not 0 < value <= NUM_TRAIN_TIMESTEPS:
            raise UserError(f"denoising_step_list holds {value!r}; each timestep is a number above 0 and at most 1000")
    for before, after in itertools.pairwise(steps):
        if not after < before:
            raise UserError(
                f"denoising_step_list has {after!r} after {before!r}; timesteps must fall from noise (1000) towards 0"
            )
    sigmas = np.asarray(steps, np.float64) / NUM_TRAIN_TIMESTEPS
    return _distinct(shift_sigma(sigmas, shift) if warp else sigmas, "denoising_step_list", steps)


def unipc_schedule(num_steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """The noise levels of Wan2.1's UniPC sampling: evenly spaced over the training range, then shifted, then 0.

    Source: wan/utils/fm_solvers_unipc.py of Wan2.1, `set_timesteps`.

    Returns:
        sigmas: float32 [num_steps + 1], falling from just below 1 to exactly 0.
        timesteps: float32 [num_steps], what the network is asked at: 1000 * sigma without its fraction.

    Raises:
        UserError: num_steps is not in 1..1000, or the shift leaves no distinct noise levels.
    """
    shift = check_shift(shift)
    whole = isinstance(num_steps, numbers.Integral) and not isinstance(num_steps, bool)
    if not whole or not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UserError(f"num_inference_steps is {num_steps!r}; give a whole number from 1 to {NUM_TRAIN_TIMESTEPS}")
    # The published table of training sigmas is float32, so its largest entry is float32's 0.999.
    largest = float(np.float32(1.0 - 1.0 / NUM_TRAIN_TIMESTEPS))
    exact = shift_sigma(np.linspace(largest, 0.0, int(num_steps) + 1), shift)
    sigmas = _distinct(exact, "shift", shift)
    if sigmas[0] >= 1.0:  # log(1 - sigma) enters the coefficients
        raise UserError(f"shift is {shift:g}; that leaves no signal at the first step, give less (Wan2.1 uses 3 to 8)")
    # Truncated before sigma is rounded to float32: rounding first could lift 499.99999 to 500.
    return sigmas, np.trunc(timestep_from_sigma(exact[:-1])).astype(np.float32)


def _distinct(sigmas: np.ndarray, field: str, value: object) -> np.ndarray:
    rounded = sigmas.astype(np.float32)
    if not (np.diff(rounded) < 0).all():
        raise UserError(f"{field} is {value}; two steps get the same noise level in float32; shift less")
    return rounded
