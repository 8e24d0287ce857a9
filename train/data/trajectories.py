"""Trajectories of a teacher (ODE pairs): the states of its sampler from noise to video, for some prompts.

A student that is to start causally learns from them where each noisy state ends (CausVid's ODE initialisation).
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from x2v_jax.errors import UserError

from .cache import Cache, CacheWriter
from .cache_format import Plan, TensorSpec, rows_for
from .latents import LatentSize, require_latent_size


class TrajectoryWriter:
    """Takes trajectories shard by shard. What is there already is not asked for again.

    >>> texts = ["a red circle moves left", "a blue square moves down"]
    >>> writer = TrajectoryWriter("trajectories", prompts=texts, latent_size=(3, 8, 8, 16), sigmas=(1.0, 0.5, 0.0))
    >>> for shard, rows in writer.pending():
    ...     writer.write(shard, np.zeros((len(rows), 3, 3, 8, 8, 16)))
    >>> writer.finish()
    True

    Args:
        path: the folder to make.
        prompts: the texts, one trajectory each; a text may stand there several times.
        latent_size: frames, height, width and channels.
        sigmas: of the kept states, falling, the last one 0 (the clean end).
        settings: JSON values that decide the states too: the teacher's fingerprint, seed, shift, guidance scale, …
        prompt_rows: row of each prompt in the prompt cache; by default 0, 1, 2, …
        rows_per_shard: by default as many as make about 256 MB.

    Raises:
        UserError: sigmas that do not fall to 0, or the folder holds something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prompts: Sequence[str],
        latent_size: Sequence[int],
        sigmas: Sequence[float],
        settings: Mapping[str, Any] | None = None,
        prompt_rows: Sequence[int] | None = None,
        rows_per_shard: int | None = None,
    ):
        check_sigmas(sigmas)
        numbers = range(len(prompts)) if prompt_rows is None else prompt_rows
        items = [{"text": t, "prompt_row": int(r)} for t, r in zip(prompts, numbers, strict=True)]
        spec = TensorSpec("float16", (len(sigmas), *map(int, latent_size)))
        kept = {**(settings or {}), "sigmas": [float(s) for s in sigmas]}
        per_shard = rows_per_shard or rows_for(spec.row_bytes)
        self._writer = CacheWriter(path, Plan("trajectories", kept, {"states": spec}, items, per_shard))
        self.path = self._writer.path
        self.num_shards = self._writer.plan.num_shards

    def pending(self, host: int = 0, hosts: int = 1) -> Iterator[tuple[int, range]]:
        """(shard, its rows) of what host `host` of `hosts` still has to make: shards host, host + hosts, …"""
        for shard in self._writer.pending(host, hosts):
            yield shard, self._writer.plan.rows(shard)

    def write(self, shard: int, states: Float[np.ndarray, "n s f h w c"]) -> None:
        """Writes the trajectories of a shard's rows, noise first, the clean end last; they are stored as float16.

        Raises:
            ValueError: another shape.
            UserError: NaN, infinity or values beyond float16; the disk is full.
        """
        with np.errstate(over="ignore"):
            stored = np.asarray(states).astype(np.float16)
        if not np.isfinite(stored).all():
            rows = self._writer.plan.rows(shard)
            raise UserError(
                f"{self.path}: trajectories {rows.start} to {rows.stop - 1} hold NaN, infinity or values beyond "
                "65504; the teacher's weights are damaged or its guidance scale is far too high"
            )
        self._writer.write(shard, {"states": stored})

    def finish(self) -> bool:
        """Completes the index when all shards are there. False: other hosts still have some to make."""
        return self._writer.finish()


class TrajectoryCache:
    """Trajectories, read by row.

    Attributes:
        path: the folder.
        sigmas: of the states, falling to 0.
        prompts: the text of each trajectory. prompt_rows: its row in the prompt cache, int64.
        latent_size: frames, height, width and channels.
        settings: what the generator noted.
    """

    def __init__(self, cache: Cache):
        """See `open`."""
        self._cache = cache
        self.path = cache.path
        self.settings = cache.settings
        self.sigmas: tuple[float, ...] = tuple(cache.settings["sigmas"])
        self.prompts: list[str] = [item["text"] for item in cache.items]
        self.prompt_rows = np.array([item["prompt_row"] for item in cache.items], np.int64)
        _, f, h, w, c = cache.tensors["states"].shape
        self.latent_size: LatentSize = (f, h, w, c)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        latent_size: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Self:
        """Opens what `TrajectoryWriter` or `python -m train.prepare lmdb` made.

        Args:
            latent_size, sigmas: what the trainer needs; None takes any.

        Raises:
            UserError: no such cache, not complete or damaged, or states of another size or at other sigmas.
        """
        cache = cls(Cache.open(path, "trajectories"))
        require_latent_size(str(path), cache.latent_size, latent_size)
        if sigmas is not None and (
            len(sigmas) != len(cache.sigmas) or not np.allclose(sigmas, cache.sigmas, atol=1e-5)
        ):
            raise UserError(
                f"{path} holds states at the timesteps {_timesteps(cache.sigmas)}, and this student is trained at "
                f"{_timesteps(sigmas)}; make the pairs again with the student's denoising_step_list and shift"
            )
        return cache

    def __len__(self) -> int:
        return len(self._cache)

    def states(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n s f h w c"]:
        """float32 [n, len(sigmas), f, h, w, C], noise first, the clean end last.

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        return self._cache.gather("states", rows).astype(np.float32)


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raises a UserError unless sigmas fall from at most 1 to 0."""
    values = list(map(float, sigmas))
    falling = all(a > b for a, b in itertools.pairwise(values))
    if len(values) < 2 or not falling or values[-1] != 0 or values[0] > 1:
        raise UserError(f"the timesteps {_timesteps(values)} do not fall from at most 1000 to 0; end the list with 0")


def _timesteps(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{1000 * float(s):.5g}" for s in sigmas)
