"""The state of a training run, and one step of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from x2v_jax.models.functional import Params

Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """Everything a resumed run needs. Keys and batches are functions of the seed and `step`, so they are not stored."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: Any
    skipped: jax.Array  # steps left out in a row because loss or gradient was not finite


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    # No buffer twice: the step donates them all.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float) -> Any:
    """Jitted (state, batch, key) -> (state, metrics). A step whose loss or gradient is not finite changes nothing."""

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        # The average follows quickly at first, else it would remember the random start for long.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, ema, opt_state, jnp.zeros_like(state.skipped))
        old = state._replace(step=state.step + 1, skipped=state.skipped + 1)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        return new_state, {"loss": value, "grad_norm": norm, "skipped": new_state.skipped, **metrics}

    return jax.jit(step, donate_argnums=0)
