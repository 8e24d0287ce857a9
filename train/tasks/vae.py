"""Trains the causal VAE on Moving Shapes, images first, then longer and longer clips.

Loss: foreground-weighted squared and absolute error, and a light KL term. Unweighted losses are content with the plain
background (9 pixels of 10) and lose the shape.
"""

import dataclasses
import pathlib
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from x2v_jax.checkpoint.native.reader import save_native
from x2v_jax.models.config import Schedule, VaeConfig
from x2v_jax.models.functional import Params, flatten, merge, split
from x2v_jax.models.networks import abstract_network
from x2v_jax.models.vae import WanVae

from ..evaluation import save_grid
from ..loop import SingleRoleTask
from ..shapes import world


class VaeTask(SingleRoleTask):
    def __init__(self, config: Any):
        self.config = config
        # Latents are normalised by statistics that are only known after training (`export`).
        plain = (0.0,) * config.model.z_dim, (1.0,) * config.model.z_dim
        self.vae_config = VaeConfig.from_dict(
            {**config.model.to_dict(), "latents_mean": plain[0], "latents_std": plain[1]}
        )
        self.graphdef, _ = abstract_network(self.vae_config)
        self._reconstruct = jax.jit(
            lambda params, video: self._module(params).decode(self._module(params).encode(video))
        )

    def init(self, key: jax.Array) -> dict[str, Params]:
        new = jax.jit(lambda key: split(WanVae(self.vae_config, rngs=nnx.Rngs(key)))[1])(key)
        return {"model": inflate_start(new)}

    def batch(self, role: str, step: int, phase: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(self.config.seed + 1), step)
        return _clips(key, phase.batch_size, phase.num_frames)

    def loss(self, params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = self._module(params)
        mean, logvar = vae.moments(batch)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        # Not clamped: a pixel beyond the range still has to come back.
        video = decode_unclamped(vae, z)
        error = video - batch
        background = batch[:, :, :1, :1]
        foreground = jnp.max(jnp.abs(batch - background), axis=-1, keepdims=True) > 0.1
        weight = jnp.where(foreground, self.config.foreground_weight, 1.0)
        weight = weight / jnp.mean(weight)
        squared = jnp.mean(weight * error**2)
        absolute = jnp.mean(weight * jnp.abs(error))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
        psnr = 10 * jnp.log10(4.0 / jnp.mean(error**2))
        total = squared + self.config.l1_weight * absolute + self.config.kl_weight * kl
        return total, {"psnr": psnr, "kl": kl}

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """PSNR of whole 33-frame videos, over all frames and over the last one (drift shows there)."""
        count = self.config.eval_videos
        videos = world.render(world.sample_scenes(jax.random.key(12345), count))
        decoded = jnp.concatenate([self._reconstruct(params, videos[i : i + 4]) for i in range(0, count, 4)])
        error = np.square(np.asarray(decoded - videos, np.float64))
        psnr = 10 * np.log10(4.0 / error.mean(axis=(1, 2, 3, 4))).mean()
        last = 10 * np.log10(4.0 / error[:, -1].mean(axis=(1, 2, 3))).mean()
        rows = einops.rearrange([np.asarray(videos), np.asarray(decoded)], "kind n ... -> (n kind) ...")
        save_grid(directory / "samples" / f"{step:06d}.png", rows[:16])
        return {"psnr": float(psnr), "psnr_last_frame": float(last)}

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        config = dataclasses.replace(
            self.vae_config, **latent_statistics(self.graphdef, params, self.config.seed, self.config.statistics_videos)
        )
        weights = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
        schedule = Schedule(height=world.SIZE, width=world.SIZE, num_frames=world.NUM_FRAMES)
        save_native(
            path,
            task=None,
            variant="base",
            schedule=schedule,
            components={"vae": (config, weights)},
            overwrite=overwrite,
        )

    def _module(self, params: Params) -> WanVae:
        return merge(self.graphdef, params)


def decode_unclamped(vae: WanVae, z: jax.Array) -> jax.Array:
    first, cache = vae.decoder(vae.conv2(z[:, :1]), None)
    if z.shape[1] == 1:
        return first
    rest, _ = vae.decoder(vae.conv2(z[:, 1:]), cache)
    return jnp.concatenate([first, rest], axis=1)


def inflate_start(params: Params) -> Params:
    """A start that treats every frame as an image: taps on the past are zero, time is doubled and halved by copying.

    What is learnt from images then holds for video at once.
    """

    def of_leaf(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[-1] != "kernel":
            return leaf
        if "time_conv" in names:
            features, out = leaf.shape[1:]
            return jnp.zeros_like(leaf).at[2].set(jnp.tile(jnp.eye(features), (1, out // features)))
        return leaf.at[:2].set(0.0) if leaf.ndim == 5 else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def latent_statistics(graphdef: Any, params: Params, seed: int, num_videos: int) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over rendered videos."""
    encode = jax.jit(lambda params, video: merge(graphdef, params).moments(video)[0])
    latents = [
        np.asarray(encode(params, world.render(world.sample_scenes(jax.random.key(seed + 7 + i), 8))))
        for i in range(num_videos // 8)
    ]
    flat = np.concatenate(latents).reshape(-1, latents[0].shape[-1]).astype(np.float64)
    rounded = lambda values: tuple(round(float(v), 6) for v in values)  # noqa: E731
    return {"latents_mean": rounded(flat.mean(0)), "latents_std": rounded(flat.std(0))}


def _clips_impl(key: jax.Array, n: int, num_frames: int) -> jax.Array:
    scene_key, frame_key = jax.random.split(key)
    first = jax.random.randint(frame_key, (n,), 0, world.NUM_FRAMES - num_frames + 1)
    return world.render(world.sample_scenes(scene_key, n), num_frames, first)


_clips = jax.jit(_clips_impl, static_argnums=(1, 2))
