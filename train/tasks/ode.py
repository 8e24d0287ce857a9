"""The start of a causal student: a teacher's trajectories from noise to video, and the regression to where they end.

Source: CausVid's ODE regression, Yin et al., arXiv:2412.07772, section 4.3.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from x2v_jax.diffusion.flow import guided_velocity, shift_sigma, timestep_from_sigma, x0_from_velocity
from x2v_jax.diffusion.noise import initial_noise
from x2v_jax.errors import UserError
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.functional import Params, merge

from ..data.order import epoch_rows
from ..data.sources import Conditions, encode
from ..data.trajectories import TrajectoryCache, TrajectoryWriter
from ..rollouts import velocity_of
from .distillation import Distillation


class OdePairs(Distillation):
    """Writes the teacher's trajectories, at the noise levels of a student's steps.

    The grid that the teacher is integrated on follows from the student: its shift, and as many steps as it takes to
    pass through every level of the student's list. (Published pairs were made with another shift than their student's.)
    Config, besides `Distillation`'s: output (folder), num_steps, guidance_scale, batch_size.
    """

    def run(self) -> None:
        """Makes what is missing in config.output; one process of many makes every n-th shard."""
        config, source = self.config, self.source
        grid = trajectory_grid(self.sigmas, config.student_schedule.shift, config.num_steps)
        writer = TrajectoryWriter(
            config.output,
            prompts=source.prompts.prompts,
            latent_size=self.shape,
            sigmas=(*self.sigmas, 0.0),
            settings={
                "seed": config.seed,
                "num_steps": len(grid) - 1,
                "shift": config.student_schedule.shift,
                "guidance_scale": config.guidance_scale,
                "teacher": str(self.teacher.path),
            },
            rows_per_shard=config.batch_size,
        )
        params = self.load(self.teacher, config.teacher_dtype)
        negative = source.negative
        kept = np.array([int(np.argmin(np.abs(grid - s))) for s in (*self.sigmas, 0.0)])
        sample = jax.jit(lambda *args: self._trajectories(grid, kept, *args))
        pending = list(writer.pending(jax.process_index(), jax.process_count()))
        key = jax.random.key(config.seed)
        for shard, rows in tqdm(pending, desc="trajectories", unit="shard"):
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(np.asarray(rows))
            writer.write(shard, np.asarray(sample(params, source.conditions(rows), negative, keys)))
        writer.finish()

    def _trajectories(
        self, grid: np.ndarray, kept: np.ndarray, params: Params, conditions: Conditions, negative: Any, keys: Any
    ) -> jax.Array:
        """States [B, len(kept), f, h, w, C] at the places `kept` of the grid, by Euler's method."""
        model = merge(self._graph(self.model_config, self.config.teacher_dtype), params)
        both = conditions._replace(
            text=jnp.concatenate([jnp.broadcast_to(negative, conditions.text.shape), conditions.text])
        )

        def step(x: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
            sigma, following = levels
            velocity = velocity_of(model, jnp.concatenate([x, x]), timestep_from_sigma(sigma), both)
            unconditional, conditional = jnp.split(velocity, 2)
            velocity = guided_velocity(unconditional, conditional, self.config.guidance_scale)
            x = x + (following - sigma) * velocity
            return x, x

        start = jax.vmap(lambda key: initial_noise(key, self.shape))(keys)
        levels = jnp.stack([jnp.asarray(grid[:-1], jnp.float32), jnp.asarray(grid[1:], jnp.float32)], axis=1)
        _, states = jax.lax.scan(step, start, levels)
        states = jnp.concatenate([start[None], states])[kept]
        return jnp.moveaxis(states, 0, 1)


def trajectory_grid(sigmas: tuple[float, ...], shift: float, num_steps: int) -> np.ndarray:
    """Noise levels from 1 to 0, float64 [num_steps + 1] with the given shift, on which every one of `sigmas` lies.

    The level nearest to each of them is moved there, but for the ends; for the published lists, which are warped by the
    same shift, and multiples of four steps, nothing moves.

    Raises:
        UserError: there are too few steps for that.
    """
    grid = shift_sigma(np.linspace(1.0, 0.0, num_steps + 1), shift)
    for sigma in sigmas:
        if sigma < 1:
            grid[1 + np.argmin(np.abs(grid[1:-1] - sigma))] = sigma
    if not set(sigmas) <= set(grid.tolist()) or np.any(np.diff(grid) >= 0):
        raise UserError(
            f"config.num_steps is {num_steps}, too few to pass through all {len(sigmas)} levels of the student; give "
            f"{4 * max(12, len(sigmas))}"
        )
    return grid


class OdeRegressionTask(Distillation):
    """A causal student learns where the trajectories end, from states along them.

    Each block has a state of its own along the trajectory, and looks at the blocks before it, whatever state they are
    in. Config, besides `Distillation`'s: pairs, the folder that `OdePairs` made.
    """

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
