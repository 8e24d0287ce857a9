"""The order of a block-by-block video: which block comes where, what it starts from and what it leaves in the cache.

No jax import, so wrong settings are named fast. `rollout.py` carries a plan out.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from x2v_jax.diffusion.schedules import timestep_from_sigma
from x2v_jax.errors import UserError
from x2v_jax.models.causal import MAX_FRAMES, check_whole, check_window

Mode = Literal["full", "sliding", "fragments"]
Positions = Literal["relative", "absolute"]


class BlockStep(NamedTuple):
    """One visit to the network's cache.

    block: number of the block in the video; with `seed`, of the block whose keys and values are computed again.
    frames: how many.
    start_frame: its position in the cache and for the rotary embedding.
    seed: whether this is the last block of the fragment before, which refills an empty cache and gives no new frames.
    keep: whether later blocks look at this one.
    """

    block: int
    frames: int
    start_frame: int
    seed: bool
    keep: bool


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """How a causal model goes from block to block. Counts are of latent frames.

    sigmas: the noise levels of each block's steps, falling; `schedules.step_sigmas` gives them.
    timesteps: what the network is asked at in each step, where that is not 1000 * sigma; see
        `schedules.step_timesteps`.
    block: frames that are made together.
    mode: what happens past the window. "full": the video ends. "sliding": it has no end, and the oldest frames are
        forgotten. "fragments" (CausVid): it has no end, and starts again from its last block.
    window: frames in the cache at most, those of the present block included.
    sink: so many first frames are never forgotten ("sliding" only).
    positions: of the sink. "relative": it moves with the window. "absolute" (as published): it stays at the start, and
        its distance grows beyond what was trained.
    context_timestep: the timestep at which later blocks see a finished one; one more pass writes it to the cache, and
        no noise is added. None (LightX2V): they see it as its last step left it, noisy.
    independent_first_frame: whether the first frame is a block of its own.
    """

    sigmas: tuple[float, ...]
    block: int = 3
    mode: Mode = "full"
    window: int = 21
    sink: int = 0
    positions: Positions = "relative"
    context_timestep: float | None = 0.0
    independent_first_frame: bool = False
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self):
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("positions", self.positions, get_args(Positions))
        check_whole("block", self.block, 1)
        check_whole("sink", self.sink, 0)
        check_window(self.window, self.sink, self.block)
        if not self.sigmas or any(not 0 < s <= 1 for s in self.sigmas):
            raise UserError(f"sigmas is {self.sigmas}; give noise levels above 0 and at most 1, e.g. from step_sigmas")
        if any(after >= before for before, after in itertools.pairwise(self.sigmas)):
            raise UserError(f"sigmas is {self.sigmas}; noise levels must fall")
        if self.timesteps is not None and len(self.timesteps) != len(self.sigmas):
            raise UserError(f"timesteps is {self.timesteps} for {len(self.sigmas)} sigmas; give one for each")
        noise = self.context_timestep
        if noise is not None and not (math.isfinite(noise) and 0 <= noise <= 1000):
            raise UserError(f"context_timestep is {noise!r}; give a timestep from 0 (clean) to 1000, or None")
        if self.sink and self.mode != "sliding":
            raise UserError(
                f"sink is {self.sink} in mode {self.mode!r}, which evicts nothing; give 0, or mode 'sliding'"
            )
        if self.mode == "fragments":
            self._check_fragments()

    def _check_fragments(self) -> None:
        if self.independent_first_frame:
            raise UserError(
                "independent_first_frame with mode 'fragments': a fragment starts with a whole block; drop one"
            )
        if self.window % self.block or self.window < 2 * self.block:
            raise UserError(
                f"window is {self.window} frames; a fragment has two or more blocks of {self.block}, the first "
                "from the fragment before"
            )

    @property
    def asked_timesteps(self) -> tuple[float, ...]:
        """What the network is asked at in each step."""
        return tuple(map(timestep_from_sigma, self.sigmas)) if self.timesteps is None else self.timesteps

    @property
    def num_steps(self) -> int:
        return len(self.sigmas)

    def check_frames(self, num_frames: int) -> int:
        """Returns `num_frames` if a video can have so many latent frames.

        Raises:
            UserError: it is not whole blocks, or more than the mode can make.
        """
        check_whole("num_frames", num_frames, 1)
        first = 1 if self.independent_first_frame else 0
        if num_frames < first or (num_frames - first) % self.block:
            lower = first + (num_frames - first) // self.block * self.block
            near = [n for n in (lower, lower + self.block) if n >= max(1, first)]
            form = f"1 + a multiple of {self.block}" if first else f"a multiple of {self.block}"
            raise UserError(
                f"num_frames is {num_frames} latent frames; this model makes {form}: "
                f"give {' or '.join(str(n) for n in near)}"
            )
        if self.mode == "full" and num_frames > self.window:
            raise UserError(
                f"num_frames is {num_frames} latent frames, and mode 'full' keeps {self.window}; give at most that, or "
                "mode 'sliding' or 'fragments'"
            )
        if self.mode == "sliding" and num_frames > MAX_FRAMES:
            raise UserError(f"num_frames is {num_frames}; positions are exact up to {MAX_FRAMES} latent frames")
        return num_frames

    def steps(self, num_frames: int | None = None) -> Iterator[BlockStep]:
        """The blocks of a video of `num_frames` in order; None: as many as the caller takes, where the mode has no end.

        Raises:
            UserError: see `check_frames`; or no end is asked for and the mode has one.
        """
        if num_frames is not None:
            self.check_frames(num_frames)
        elif self.mode == "full":
            raise UserError(
                f"mode 'full' ends after {self.window} latent frames; say num_frames, or choose another mode"
            )
        return self._steps(num_frames)

    def _steps(self, num_frames: int | None) -> Iterator[BlockStep]:
        made = start = 0
        for block in itertools.count():
            frames = 1 if block == 0 and self.independent_first_frame else self.block
            if self.mode == "fragments" and start == self.window:
                yield BlockStep(block - 1, self.block, 0, seed=True, keep=True)
                start = self.block
            made += frames
            if made > MAX_FRAMES and self.mode == "sliding":
                raise UserError(
                    f"the video has {MAX_FRAMES} latent frames, and positions are exact no farther; start anew"
                )
            ends = made == num_frames or (self.mode == "fragments" and start + frames == self.window)
            yield BlockStep(block, frames, start, seed=False, keep=not ends)
            if made == num_frames:
                return
            start += frames


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} is {value!r}; choose {', '.join(repr(c) for c in choices)}")
