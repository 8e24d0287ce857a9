"""The state of a training run, its optimizers, and how one role of it is updated.

A run has one role ("model"), or several that learn from each other: a generator and a critic. Each has parameters and
an optimizer of its own; one of them is averaged and exported.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from x2v_jax.errors import UserError
from x2v_jax.models.functional import Params


def learning_rate_schedule(peak: float, steps: int, warmup: int, decay_share: float, final_scale: float) -> Any:
    """Linear warm-up, a plateau, then linear decay to final_scale * peak over the last `decay_share` of the steps."""
    decay_steps = max(1, round(steps * decay_share))
    plateau_end = max(warmup, steps - decay_steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0 if warmup else peak, peak, max(1, warmup)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final_scale * peak, decay_steps),
        ],
        [warmup, plateau_end],
    )


def make_optimizer(
    name: str,
    learning_rate: Any,
    *,
    clip_norm: float,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Any:
    """AdamW, or Muon for the matrices of hidden layers with Adam for all else. Gradients are clipped by global norm.

    With b1 = 0, as distribution matching distillation has it, no first moment is kept.
    """
    if name == "adam":
        # Adam's second moment alone: with b1 = 0 the first is the gradient, and 4 bytes a parameter are saved.
        by_size = (
            optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
            if b1 == 0
            else optax.scale_by_adam(b1, b2, eps)
        )
        decay = optax.add_decayed_weights(weight_decay)
        optimizer = optax.chain(by_size, decay, optax.scale_by_learning_rate(learning_rate))
    elif name == "muon":
        optimizer = optax.contrib.muon(
            learning_rate,
            adam_b1=b1,
            adam_b2=b2,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,  # pyright: ignore[reportArgumentType] (a tree with None)
            # The update has the size of Adam's (Moonlight, arXiv 2502.16982), so one learning rate serves both.
            consistent_rms=0.2,
        )
    else:
        raise UserError(f"config.optimizer is {name!r}; choose adam or muon")
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _muon_dimensions(params: Params) -> Any:
    def of_leaf(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        names = [getattr(part, "key", "") for part in path]
        # Input and output layers and embeddings do not want orthogonal updates.
        if names[-1] != "kernel" or {"patch_embedding", "head", "token_embedding"} & set(names):
            return None
        if leaf.ndim == 2:
            return MuonDimensionNumbers(0, 1)
        return MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None  # stacked blocks: one matrix a layer

    return jax.tree_util.tree_map_with_path(of_leaf, params)


# (parameters of all roles, frozen networks, batch, key) -> (loss, gradients of one role, metrics)
Gradient = Callable[[dict[str, Params], Any, Any, jax.Array], tuple[jax.Array, Params, dict[str, jax.Array]]]


class Role(NamedTuple):
    """What is trained, and its optimizer's state."""

    params: Params
    opt_state: Any


class TrainState(NamedTuple):
    """Everything a resumed run needs. Keys and batches are functions of the seed and `step`, so they are not stored."""

    step: jax.Array
    roles: dict[str, Role]
    ema: Params
    skipped: jax.Array  # updates left out in a row because loss or gradient was not finite, or the norm exploded
    skipped_total: jax.Array

    @property
    def params(self) -> dict[str, Params]:
        return {name: role.params for name, role in self.roles.items()}


class Averaging(NamedTuple):
    """Which role is averaged, how slowly, and from which step on; until then the average is the role itself."""

    role: str
    decay: float
    start: int = 0


def init_state(
    params: Mapping[str, Params], optimizers: Mapping[str, optax.GradientTransformation], averaged: str
) -> TrainState:
    roles = {name: Role(params[name], optimizers[name].init(params[name])) for name in params}
    # No buffer twice: an update donates them all.
    ema = jax.tree.map(jnp.copy, params[averaged])
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    return TrainState(zero(), roles, ema, zero(), zero())


def make_update(
    name: str,
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    averaging: Averaging,
    *,
    accumulate: int = 1,
    max_norm: float = float("inf"),
    ends_step: bool = True,
    shardings: Any = None,
) -> Any:
    """Jitted (state, frozen, batch, key) -> (state, metrics), which updates one role.

    An update whose loss or gradient is not finite, or whose gradient's norm is above `max_norm`, changes nothing but
    the counts.

    Args:
        name: of the role.
        gradient: what it learns from.
        averaging: how the average follows, where it is of this role.
        accumulate: parts whose gradients make up a batch's; leaves of a batch have the samples on their first axis.
        ends_step: whether this is the last update of a step.
        shardings: of the state, where there are several devices.
    """

    def update(state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads, metrics = _accumulated(gradient, accumulate)(state.params, frozen, batch, key)
        norm = optax.tree.norm(grads)
        role = state.roles[name]
        changes, opt_state = optimizer.update(grads, role.opt_state, role.params)
        new_role = Role(optax.apply_updates(role.params, changes), opt_state)  # pyright: ignore[reportArgumentType]
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= max_norm)
        new_role = _choose(good, new_role, role)
        ema = state.ema
        if name == averaging.role:
            ema = _choose(good, _averaged(ema, new_role.params, averaging, state.step), ema)
        bad = 1 - good.astype(jnp.int32)
        new = TrainState(
            state.step + ends_step,
            state.roles | {name: new_role},
            ema,
            (state.skipped + 1) * bad,
            state.skipped_total + bad,
        )
        return new, {"loss": loss, "grad_norm": norm, "skipped": new.skipped_total, **metrics}

    return jax.jit(update, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _averaged(ema: Params, params: Params, averaging: Averaging, step: jax.Array) -> Params:
    # The average follows quickly at first, else it would remember its start for long.
    since = jnp.maximum(step - averaging.start, 0).astype(jnp.float32)
    decay = jnp.minimum(averaging.decay, (1.0 + since) / (10.0 + since))
    decay = jnp.where(step < averaging.start, 0.0, decay)
    return jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)


def _choose(good: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)


def _accumulated(gradient: Gradient, parts: int) -> Gradient:
    """The mean over `parts` equal parts of the batch, one after the other. All see the same key."""
    if parts == 1:
        return gradient

    def mean(params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array) -> Any:
        # Every part takes samples from all over the batch, so that each device keeps those that it has.
        split = jax.tree.map(lambda x: einops.rearrange(x, "(row part) ... -> part row ...", part=parts), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, part, key)), None

        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradient, params, frozen, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, split)
        return jax.tree.map(lambda x: x / parts, total)

    return mean
