"""Moving Shapes as a source for distillation: captions, and where needed encoded first frames and videos."""

import pathlib
from typing import Any

import jax
import numpy as np

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.diffusion.image_condition import clip_pixels, condition_mask
from x2v_jax.generate.network import Network

from ..data.sources import Source, encode
from . import world
from .latents import FirstFrames, condition_videos, encode_first_frames, encode_videos, scenes_of

_IMAGES_AT_ONCE, _SCENES_AT_ONCE = 32, 256


class _Latents:
    """Encoded videos in memory."""

    def __init__(self, path: pathlib.Path, latents: np.ndarray):
        self.path, self._latents = path, latents

    def __len__(self) -> int:
        return len(self._latents)

    def latents(self, rows: Any) -> np.ndarray:
        return self._latents[rows]


class FirstFrameConditions:
    """First frames in memory, as `ImageCache` has them on disk."""

    def __init__(self, path: pathlib.Path, first: FirstFrames, checkpoint: NativeCheckpoint):
        self.path, self._latents = path, first.latents
        self._mask = condition_mask(*first.latents.shape[1:4], channels=checkpoint.config("vae").temporal_stride)
        self._features = image_features(checkpoint, first.frames)

    def __len__(self) -> int:
        return len(self._latents)

    def conditions(self, rows: Any) -> np.ndarray:
        latents = self._latents[rows].astype(np.float32)
        return np.concatenate([np.broadcast_to(self._mask, (len(latents), *self._mask.shape)), latents], axis=-1)

    def features(self, rows: Any) -> np.ndarray:
        return self._features[rows]


def shapes_source(
    config: Any, checkpoint: NativeCheckpoint, directory: pathlib.Path, *, with_images: bool, with_latents: bool
) -> Source:
    """`config.count` rows drawn by `config.seed`, with the networks of `checkpoint`."""
    count, seed = config.count, config.seed
    if not with_images and not with_latents:
        return Source(encode(directory / "prompts", shapes_prompts(count, seed), checkpoint))
    vae, encode_video = _encoder(checkpoint)

    def no_tokens(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # Embeddings are made once, from the captions themselves.
        return np.zeros((len(captions), 1), np.int32), np.zeros((len(captions), 1), np.int32)

    latents = images = None
    if with_latents:
        path = directory / "latents.npz"
        latents = _Latents(path, encode_videos(path, count, seed, encode_video, vae, no_tokens).latents[:count])
    if with_images:
        path = directory / "first_frames.npz"
        images = FirstFrameConditions(path, encode_first_frames(path, count, seed, encode_video, vae), checkpoint)
    texts = video_captions(count, seed)
    return Source(encode(directory / "prompts", texts, checkpoint), images=images, latents=latents)


def encode_frames(checkpoint: NativeCheckpoint, frames: np.ndarray) -> FirstFrames:
    """Frames uint8 [N, H, W, 3] with the latents that condition on them."""
    vae, encode_video = _encoder(checkpoint)
    parts = []
    for i in range(0, len(frames), _IMAGES_AT_ONCE):
        parts.append(np.asarray(encode_video(vae, condition_videos(frames[i : i + _IMAGES_AT_ONCE])), np.float16))
    return FirstFrames(frames, np.concatenate(parts))


def _encoder(checkpoint: NativeCheckpoint) -> tuple[Any, Any]:
    network = Network.of(checkpoint, "vae", dtype="float32", quantized=False)
    return network.load(), network.jit(lambda vae, video: vae.encode(video))


def video_captions(count: int, seed: int) -> list[str]:
    """One caption for each of the videos that `shapes_latents` renders for this seed."""
    texts: list[str] = []
    for i in range(-(-count // 8)):
        texts += world.captions(scenes_of(seed, i), seed=seed + i)
    return texts[:count]


def image_features(checkpoint: NativeCheckpoint, frames: np.ndarray) -> np.ndarray:
    """CLIP features float32 [N, 1 + patches, D] of frames uint8 [N, H, W, 3]."""
    network = Network.of(checkpoint, "image_encoder", dtype="float32", quantized=False)
    params, run, size = network.load(), network.jit(lambda clip, pixels: clip(pixels)), network.config.image_size
    parts = []
    for i in range(0, len(frames), _IMAGES_AT_ONCE):
        pixels = np.stack([clip_pixels(frame, size) for frame in frames[i : i + _IMAGES_AT_ONCE]])
        parts.append(np.asarray(run(params, pixels)))
    return np.concatenate(parts)


def shapes_prompts(count: int, seed: int) -> list[str]:
    """Training captions of `count` scenes; none of them is held out."""
    texts: list[str] = []
    for i in range(0, count, _SCENES_AT_ONCE):
        scenes = world.sample_scenes(jax.random.fold_in(jax.random.key(seed), i), _SCENES_AT_ONCE)
        texts += world.captions(scenes, seed=seed + i)
    return texts[:count]
