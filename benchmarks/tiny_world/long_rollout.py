"""Long videos of the tiny world in batches, judged horizon by horizon while they are made."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tiny_world.sampling import ShapesModel
from train.shapes.judge import judge, summarize
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import UserError
from x2v_jax.media.pixels import to_uint8
from x2v_jax.models.functional import merge

_SAMPLES = 4


@dataclasses.dataclass
class LongVideos:
    """verdicts[h]: of horizon h, by video. background, chroma: [videos, horizons], means in 0..255.
    samples: frames [4, all, H, W, 3] of the first videos, every 8th."""

    verdicts: list[list[Any]]
    background: np.ndarray
    chroma: np.ndarray
    samples: np.ndarray

    def summary(self, prompts: Sequence[Any], turned: Sequence[Any]) -> dict[str, Any]:
        horizons = [summarize(v, prompts if h % 2 == 0 else turned) for h, v in enumerate(self.verdicts)]
        drift = lambda x: np.abs(x - x[:, :1]).mean(axis=0).round(3).tolist()  # noqa: E731
        return {
            "accuracy": [h["all"] for h in horizons],
            "colour": [h["colour"] for h in horizons],
            "shape": [h["shape"] for h in horizons],
            "direction": [h["direction"] for h in horizons],
            "background_drift": drift(self.background),
            "colour_drift": drift(self.chroma),
        }


class LongModel:
    """A causal checkpoint of the tiny world, run in batches.

    Raises:
        UserError: the checkpoint is not causal.
    """

    def __init__(self, path: pathlib.Path, dtype: str):
        self.checkpoint = open_checkpoint(path)
        schedule = self.checkpoint.schedule
        if schedule.causal is None:
            raise UserError(f"{path} makes whole videos; give a causal checkpoint, such as assets/shapes_causal")
        self.schedule, self.causal = schedule, schedule.causal
        self.shapes = ShapesModel(self.checkpoint, dtype)
        steps = schedule.denoising_step_list or ()
        sigmas = step_sigmas(steps, schedule.shift, warp=schedule.warp_denoising_step)
        self._sigmas = tuple(float(s) for s in sigmas)
        self._decode = jax.jit(
            lambda params, latents, cache: self._decode_fn(params, latents, cache), donate_argnames="cache"
        )

    def roll_out(
        self, mode: Any, prompts: Sequence[Any], turned: Sequence[Any], horizons: int, seed: int, batch: int
    ) -> LongVideos:
        """Videos of `horizons` horizons whose prompt turns at each of them."""
        window = self.causal.window * (horizons if mode == "full" else 1)
        plan = RolloutPlan(self._sigmas, self.causal.block, mode, window, context_timestep=self.causal.context_timestep)
        batch = min(batch, len(prompts))
        size = (self.schedule.height // 8, self.schedule.width // 8)
        config = self.shapes.config("transformer")
        rollout = Rollout(self.shapes.graph("transformer"), config, plan, size, batch=batch, cache_dtype=jnp.float32)
        parts = []
        for first in range(0, len(prompts), batch):
            rows = np.minimum(np.arange(first, first + batch), len(prompts) - 1)
            texts = [self.shapes.encode_text([p[i].text for i in rows]) for p in (prompts, turned)]
            pieces = list(self._horizons(rollout, texts, horizons, seed + first))
            parts.append([piece[: len(prompts) - first] for piece in pieces])
        joined = [np.concatenate([part[h] for part in parts]) for h in range(horizons)]
        return LongVideos(
            [[judge(video) for video in videos] for videos in joined],
            np.stack([_background(videos) for videos in joined], axis=1),
            np.stack([_chroma(videos) for videos in joined], axis=1),
            np.concatenate([videos[:_SAMPLES, ::8] for videos in joined], axis=1),
        )

    def _horizons(self, rollout: Rollout, texts: Sequence[Any], horizons: int, seed: int) -> Iterator[np.ndarray]:
        """uint8 [B, 33 or 36, H, W, 3] of each horizon."""
        params, vae = self.shapes.params("transformer"), self.shapes.params("vae")
        contexts = [rollout.prepare(params, text) for text in texts]
        length = self.causal.window

        def change(made: int) -> Any:
            return contexts[made // length % 2] if made and made % length == 0 else None

        noise, renoise = keyed_noise(jax.random.key(seed))
        cache, frames, made = None, [], 0
        stream = rollout.stream(params, contexts[0], noise, renoise, horizons * length, change=change)
        for latents in stream:
            for i in range(latents.shape[1]):
                video, cache = self._decode(vae, latents[:, i : i + 1], cache)
                frames.append(np.asarray(video))
            made += latents.shape[1]
            if made % length == 0:
                yield np.concatenate(frames, axis=1)
                frames = []

    def _decode_fn(self, params: Any, latents: Any, cache: Any) -> Any:
        video, cache = merge(self.shapes.graph("vae"), params).decode_chunk(latents, cache)
        return to_uint8(video), cache


def _background(videos: np.ndarray) -> np.ndarray:
    """Median brightness of each video's border of two pixels."""
    edges = np.concatenate([videos[:, :, :2].reshape(len(videos), -1), videos[:, :, -2:].reshape(len(videos), -1)], 1)
    return np.median(edges, axis=1)


def _chroma(videos: np.ndarray) -> np.ndarray:
    """Mean over frames of the most saturated pixels' saturation."""
    saturation = (videos.max(-1).astype(np.float32) - videos.min(-1)).reshape(*videos.shape[:2], -1)
    return np.percentile(saturation, 98, axis=2).mean(axis=1)
