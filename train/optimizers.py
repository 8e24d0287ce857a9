"""Optimizers and learning-rate schedules, built from a config."""

from typing import Any

import jax
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
