"""UniPC of order 2 for flow matching, as Wan2.1 samples its undistilled models.

Zhao et al., arXiv:2302.04867, variant B(h) = expm1(-h) ("bh2") on x0 predictions; source: wan/utils/fm_solvers_unipc.py
of Wan2.1. At each step the new x0 prediction first corrects the sample that it was made at, then predicts the next one.

For given noise levels both are linear: the corrected and the next sample are weighted sums of samples and the last
three x0 predictions. The weights are worked out here once, in float64, and one `step` with weights as arguments serves
every step, so it compiles once and can be scanned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from x2v_jax.diffusion.flow import x0_from_velocity
from x2v_jax.diffusion.schedules import unipc_schedule

VelocityFn = Callable[[Array, Array], Array]


class Coefficients(NamedTuple):
    """The weights of one step (scalars) or of all steps (float32 [S]): `unipc_table` gives the latter.

    Below, x is the incoming sample, m_new its x0 prediction, m0 and m1 the two predictions before that, and x_last the
    corrected sample of the step before.
    """

    sigma: Any
    timestep: Any
    # corrected = correct_x * x + correct_last * x_last + correct_new * m_new + correct_m0 * m0 + correct_m1 * m1
    correct_x: Any
    correct_last: Any
    correct_new: Any
    correct_m0: Any
    correct_m1: Any
    # next sample = predict_x * corrected + predict_new * m_new + predict_m0 * m0
    predict_x: Any
    predict_new: Any
    predict_m0: Any


class UniPCState(NamedTuple):
    """What passes from step to step; float32 arrays of the latents' shape."""

    latents: Array  # the sample at the next step's sigma; after the last step, the clean latents
    last_sample: Array  # the corrected sample of the step just taken
    m0: Array  # the newest x0 prediction
    m1: Array  # the one before


def unipc_table(num_steps: int, shift: float) -> Coefficients:
    """The weights of every step, as float32 arrays [num_steps].

    Raises:
        UserError: num_steps or shift is out of range.
    """
    sigmas, timesteps = (values.astype(np.float64) for values in unipc_schedule(num_steps, shift))
    alphas = 1.0 - sigmas
    with np.errstate(divide="ignore"):
        lambdas = np.log(alphas) - np.log(sigmas)  # half the log signal-to-noise ratio; infinite at sigma 0
    # The solver warms up at order 1, and takes the last step at order 1 for stability.
    orders = [2 if 0 < i < num_steps - 1 else 1 for i in range(num_steps)]
    rows = []
    for i, order in enumerate(orders):
        corrector = _corrector(sigmas, alphas, lambdas, i, orders[i - 1]) if i else (1.0, 0.0, 0.0, 0.0, 0.0)
        rows.append((sigmas[i], timesteps[i], *corrector, *_predictor(sigmas, alphas, lambdas, i, order)))
    return Coefficients(*np.asarray(rows, np.float64).T.astype(np.float32))


def coefficients_at(table: Coefficients, i: int) -> Coefficients:
    """Row i of the table, as scalars."""
    return Coefficients(*(column[i] for column in table))


def init_state(latents: Float[Array, "*s"]) -> UniPCState:
    """The state before the first step. latents: standard normal noise."""
    # A copy and three buffers of zeros: a jitted step may donate the state, and that must neither take the caller's
    # noise nor meet one buffer twice.
    latents = jnp.array(latents, jnp.float32)
    return UniPCState(latents, *(jnp.zeros_like(latents) for _ in range(3)))


def step(state: UniPCState, velocity: Float[Array, "*s"], c: Coefficients) -> UniPCState:
    """One step, in float32.

    Args:
        velocity: the network's answer at (state.latents, c.timestep), after guidance.
        c: this step's weights; traced, so that one compiled step serves all.
    """
    x, last, m0, m1 = state
    new = x0_from_velocity(x, velocity, c.sigma)
    corrected = c.correct_x * x + c.correct_last * last + c.correct_new * new + c.correct_m0 * m0 + c.correct_m1 * m1
    latents = c.predict_x * corrected + c.predict_new * new + c.predict_m0 * m0
    return UniPCState(latents=latents, last_sample=corrected, m0=new, m1=m0)


def sample(velocity_fn: VelocityFn, noise: Float[Array, "*s"], table: Coefficients) -> Float[Array, "*s"]:
    """All steps by `lax.scan`: the network is compiled once whatever the number of steps.

    Args:
        velocity_fn: (latents, timestep scalar) -> velocity, guidance included.
        noise: standard normal.
        table: from `unipc_table`.

    Returns:
        Clean latents, float32.
    """

    def body(state: UniPCState, c: Coefficients) -> tuple[UniPCState, None]:
        return step(state, velocity_fn(state.latents, c.timestep), c), None

    state, _ = jax.lax.scan(body, init_state(noise), jax.tree.map(jnp.asarray, table))
    return state.latents


def _predictor(
    sigmas: np.ndarray, alphas: np.ndarray, lambdas: np.ndarray, i: int, order: int
) -> tuple[float, float, float]:
    """Weights of (corrected, m_new, m0) in the step from sigmas[i] to sigmas[i + 1]."""
    h = lambdas[i + 1] - lambdas[i]
    b = alphas[i + 1] * np.expm1(-h)
    w_m0 = 0.0
    if order == 2:
        r = (lambdas[i - 1] - lambdas[i]) / h
        w_m0 = -0.5 * b / r
    return sigmas[i + 1] / sigmas[i], -b - w_m0, w_m0


def _corrector(
    sigmas: np.ndarray, alphas: np.ndarray, lambdas: np.ndarray, i: int, order: int
) -> tuple[float, float, float, float, float]:
    """Weights of (x, x_last, m_new, m0, m1) that redo the step from sigmas[i - 1] to sigmas[i], knowing m_new.

    The order is that of the prediction which is corrected.
    """
    h = lambdas[i] - lambdas[i - 1]
    phi = np.expm1(-h)
    b = alphas[i] * phi
    if order == 1:
        w_new, w_m1 = -0.5 * b, 0.0
    else:
        r = (lambdas[i - 2] - lambdas[i - 1]) / h
        phi_1 = -phi / h - 1.0
        phi_2 = -phi_1 / h - 0.5
        rho_m1, rho_new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_1 / phi, 2.0 * phi_2 / phi])
        w_new, w_m1 = -b * rho_new, -b * rho_m1 / r
    return 0.0, sigmas[i] / sigmas[i - 1], w_new, -b - w_new - w_m1, w_m1
