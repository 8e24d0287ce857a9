"""Moving Shapes as latents: videos encoded once by a trained autoencoder, kept beside the run and read by row."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from x2v_jax.media.pixels import to_uint8
from x2v_jax.models.functional import Params

from . import world

CAPTIONS_PER_VIDEO = 6
_ENCODE_BATCH = 8
# The scenes' key lies apart from those of weights (seed) and steps (seed + 1).
_SEED_OFFSET = 2

# (parameters of the VAE, video [B, F, H, W, 3] in [-1, 1]) -> latents
Encode = Callable[[Params, Any], Any]
Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class ShapesLatents(NamedTuple):
    """Encoded videos and their captions.

    latents: float32 [N, f, h, w, C]. ids, mask: int32 [N, 6, L], six captions a video.
    """

    latents: np.ndarray
    ids: np.ndarray
    mask: np.ndarray


class FirstFrames(NamedTuple):
    """What image-to-video conditions on: frames uint8 [N, 64, 64, 3], and the latents of the frame followed by grey
    ones, float16 [N, f, h, w, C]."""

    frames: np.ndarray
    latents: np.ndarray


def encode_videos(path: pathlib.Path, num_videos: int, seed: int, encode: Encode, vae: Params, tokenize: Tokenize):
    """The latents in `path` (npz), which are made if it does not exist. `num_videos` is a multiple of 8."""

    def batch(i: int, scenes: world.Scene, video: jax.Array) -> tuple[np.ndarray, ...]:
        seeds = range(CAPTIONS_PER_VIDEO * i, CAPTIONS_PER_VIDEO * (i + 1))
        texts = [tokenize(world.captions(scenes, seed=s)) for s in seeds]
        ids, mask = (np.stack([text[part] for text in texts], axis=1) for part in (0, 1))
        return np.asarray(encode(vae, video)), ids, mask

    return ShapesLatents(*_stored(path, ("latents", "ids", "mask"), num_videos, seed, batch, "encoding videos"))


def encode_first_frames(path: pathlib.Path, num_videos: int, seed: int, encode: Encode, vae: Params) -> FirstFrames:
    """The first frames of the same videos as `encode_videos` gives, made if `path` does not exist."""

    def batch(i: int, scenes: world.Scene, video: jax.Array) -> tuple[np.ndarray, ...]:
        # As a picture file would give it: 256 levels.
        frames = to_uint8(np.asarray(video[:, 0]))
        return frames, np.asarray(encode(vae, condition_videos(frames)), np.float16)

    return FirstFrames(*_stored(path, ("frames", "latents"), num_videos, seed, batch, "encoding first frames"))


def scenes_of(seed: int, batch: int) -> world.Scene:
    """The scenes of videos 8 * batch to 8 * batch + 7."""
    return world.sample_scenes(jax.random.fold_in(jax.random.key(seed + _SEED_OFFSET), batch), _ENCODE_BATCH)


def condition_videos(frames: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, 64, 64, 3] -> the videos that the VAE encodes as conditions, the rest of them grey."""
    video = np.zeros((len(frames), world.NUM_FRAMES, *frames.shape[1:]), np.float32)
    video[:, 0] = frames.astype(np.float32) / 127.5 - 1.0
    return video


def _stored(
    path: pathlib.Path, names: tuple[str, ...], num_videos: int, seed: int, batch: Any, what: str
) -> list[np.ndarray]:
    if not path.exists():
        parts = []
        for i in tqdm(range(num_videos // _ENCODE_BATCH), desc=what, unit="batch"):
            scenes = scenes_of(seed, i)
            parts.append(batch(i, scenes, _render(scenes)))
        arrays = {name: np.concatenate([part[j] for part in parts]) for j, name in enumerate(names)}
        part = path.with_suffix(".part.npz")
        np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
        part.rename(path)
    with np.load(path) as stored:
        return [stored[name] for name in names]


_render = jax.jit(world.render)
