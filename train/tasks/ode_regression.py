"""The start of a causal student: it learns where the teacher's trajectories end, from states along them.

Each block has a state of its own along the trajectory, and looks at the blocks before it, whatever state they are in.
Source: CausVid's ODE regression, Yin et al., arXiv:2412.07772, section 4.3.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from x2v_jax.diffusion.flow import timestep_from_sigma, x0_from_velocity
from x2v_jax.errors import UserError
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.functional import Params, merge

from ..data.order import epoch_rows
from ..data.sources import encode
from ..data.trajectories import TrajectoryCache
from .distillation import Distillation


class OdeRegressionTask(Distillation):
    """Config, besides `Distillation`'s: pairs, the folder that `ode_pairs` made."""

    def __init__(self, config: Any):
        super().__init__(config)
        if not self.is_causal:
            raise UserError(
                "config.causal is empty; an ODE regression starts a causal student: set config.causal.block"
            )
        self.variant = "self_forcing"
        self._pattern = CausalPattern(config.causal.block)
        if not config.pairs:
            raise UserError(
                "config.pairs is not set; make trajectories with configs/train/wan_ode_pairs.py and name them"
            )
        self.pairs = TrajectoryCache.open(config.pairs, self.shape, (*self.sigmas, 0.0))
        self._prompts: Any = None

    def batch(self, role: str, step: int, phase: Any) -> Any:
        if self._prompts is None:
            directory = pathlib.Path(self.config.run_dir)
            self._prompts = encode(directory / "prompts", self.pairs.prompts, self.teacher)
        rows = epoch_rows(self.config.seed, step, phase.batch_size, len(self.pairs))
        rng = np.random.default_rng([self.config.seed, step])
        blocks = self.shape[0] // self.config.causal.block
        place = np.repeat(
            rng.integers(len(self.pairs.sigmas), size=(phase.batch_size, blocks)), self.config.causal.block, axis=1
        )
        states = self.pairs.states(rows)
        noisy = np.take_along_axis(states, place[:, None, :, None, None, None], axis=1)[:, 0]
        sigma = np.asarray(self.pairs.sigmas, np.float32)[place]
        return {"text": self._prompts.embeddings(rows), "noisy": noisy, "sigma": sigma, "clean": states[:, -1]}

    def gradient(self, role: str, params: dict[str, Params], frozen: Any, batch: Any, key: jax.Array) -> Any:
        def loss_of(generator: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            sigma = batch["sigma"]
            model = merge(self.graph, self.transformer(generator, frozen))
            velocity = model(batch["noisy"], timestep_from_sigma(sigma), batch["text"], causal=self._pattern)
            x0 = x0_from_velocity(batch["noisy"], velocity, sigma)
            errors = jnp.mean(jnp.square(x0 - batch["clean"]), axis=(2, 3, 4))
            by_step = {
                f"loss_step_{i}": jnp.mean(errors, where=jnp.isclose(sigma, level))
                for i, level in enumerate(self.sigmas)
            }
            # Where a block is clean already there is nothing to learn.
            return jnp.sum(errors * (sigma > 0)) / jnp.maximum(jnp.sum(sigma > 0), 1), by_step

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params[role])
        return loss, grads, metrics
