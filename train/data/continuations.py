"""Videos that a causal student learns to go on from: their last frames, and the picture that they end with.

A teacher for whole videos expects the first latent frame to be that of a single picture. What follows given frames is
scored as a video that begins with their last picture (Self-Forcing's way with rollouts beyond the trained length).
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.generate.network import Network

from .order import epoch_rows
from .prompts import PromptCache
from .sources import Batch, Conditions, encode
from .trajectories import TrajectoryCache

_AT_ONCE = 16


class Continuations(NamedTuple):
    """latents: [N, f, h, w, C] of whole videos. images: [N, h, w, C], their last pictures encoded. prompts: of what
    follows, and of what follows that, row for row."""

    latents: np.ndarray
    images: np.ndarray
    prompts: tuple[PromptCache, PromptCache]

    def batch(self, seed: int, step: int, size: int, frames: int, stream: int, *, own: int) -> Batch:
        """The last `frames` latent frames of some videos, and the prompts to go on with; `own` videos come between."""
        rows = epoch_rows(seed, step, size, len(self.latents), stream)
        conditions, following = (Conditions(prompts.embeddings(rows)) for prompts in self.prompts)
        sample = np.arange(size, dtype=np.int32)
        given, last_image = self.latents[rows, -frames:], self.images[rows]
        if not own:
            return Batch(conditions, sample, given=given, last_image=last_image)
        return Batch(conditions, sample, None, given, last_image, following, np.full(size, own, np.int32))


def open_continuations(
    pairs: str,
    checkpoint: NativeCheckpoint,
    directory: pathlib.Path,
    shape: Sequence[int],
    follow: Callable[[str], str],
) -> Continuations:
    """From the ends of a teacher's trajectories; pictures and prompts are encoded once and kept in `directory`.

    Args:
        pairs: what `OdePairs` wrote.
        shape: [f, h, w, C] of its videos.
        follow: the prompt of a video -> the prompt of what follows.

    Raises:
        UserError: no such trajectories, or of another size.
    """
    cache = TrajectoryCache.open(pairs, shape)
    latents = np.concatenate(
        [cache.states(range(i, min(i + _AT_ONCE, len(cache))))[:, -1] for i in range(0, len(cache), _AT_ONCE)]
    )
    path = directory / "last_images.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, _last_images(checkpoint, latents))
        part.rename(path)
    first = [follow(text) for text in cache.prompts]
    second = [follow(text) for text in first]
    prompts = (
        encode(directory / "following_prompts", first, checkpoint),
        encode(directory / "following_prompts_2", second, checkpoint),
    )
    return Continuations(latents, np.load(path), prompts)


def _last_images(checkpoint: NativeCheckpoint, latents: np.ndarray) -> np.ndarray:
    network = Network.of(checkpoint, "vae", dtype="float32", quantized=False)
    params = network.load()
    last = network.jit(lambda vae, latents: vae.encode(vae.decode(latents)[:, -1:])[:, 0])
    parts = []
    for i in tqdm(range(0, len(latents), _AT_ONCE), desc="encoding last pictures", unit="batch"):
        rows = np.minimum(np.arange(i, i + _AT_ONCE), len(latents) - 1)
        parts.append(np.asarray(last(params, latents[rows]))[: len(latents) - i])
    return np.concatenate(parts)
