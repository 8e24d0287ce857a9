"""Trains a transformer and its text encoder (and CLIP tower) together by flow matching, on encoded Moving Shapes.

The latents are made once from a trained VAE and kept beside the run; each has several captions, one of which is drawn
every time it is shown. A share of captions is dropped, so that the model can be guided; the image of image-to-video is
never dropped.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from x2v_jax.checkpoint.native.reader import open_checkpoint, save_native
from x2v_jax.diffusion import unipc
from x2v_jax.diffusion.flow import add_noise, guided_velocity, shift_sigma, timestep_from_sigma, velocity_target
from x2v_jax.diffusion.image_condition import clip_pixels, condition_mask
from x2v_jax.errors import UserError
from x2v_jax.generate.network import Network
from x2v_jax.models.config import ClipConfig, Config, Schedule, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.functional import Params, flatten, merge, split, unflatten
from x2v_jax.models.networks import abstract_network, make_network

from ..checkpoints import relative_reference
from ..evaluation import save_grid, shapes_scores
from ..loop import SingleRoleTask
from ..shapes import world
from ..shapes.latents import (
    CAPTIONS_PER_VIDEO,
    FirstFrames,
    ShapesLatents,
    condition_videos,
    encode_first_frames,
    encode_videos,
)
from ..shapes.world import TEXT_LEN, first_frames, make_tokenizer, write_tokenizer


class ImageBatch(NamedTuple):
    latents: Any  # mask and encoded first frame, [B, f, h, w, 4 + C]
    pixels: Any  # as CLIP takes them, [B, s, s, 3]


class Batch(NamedTuple):
    latents: Any  # [B, f, h, w, C]
    ids: Any  # [B, L]
    mask: Any  # [B, L]
    image: ImageBatch | None = None


class FlowMatchingTask(SingleRoleTask):
    def __init__(self, config: Any):
        self.config = config
        self.tokenizer = _padded_tokenizer()
        self.text_config = Umt5Config(
            vocab_size=self.tokenizer.get_vocab_size(), **{k: v for k, v in config.text_encoder.items()}
        )
        self.model_config = WanConfig(
            text_dim=self.text_config.dim, text_len=TEXT_LEN, **{k: v for k, v in config.model.items()}
        )
        self.with_image = self.model_config.model_type == "i2v"
        self.clip_config = ClipConfig(**config.image_encoder.to_dict()) if self.with_image else None
        self.dtype = jnp.dtype(config.dtype)
        self.graphs = {name: abstract_network(of, dtype=self.dtype)[0] for name, of in self.configs.items()}
        checkpoint = open_checkpoint(config.vae)
        self.vae_config: VaeConfig = checkpoint.config("vae")
        self.vae = Network.of(checkpoint, "vae", dtype="float32", quantized=False)
        self.vae_params = self.vae.load()
        self._sample = jax.jit(self._sample_impl)
        self._encode_video = self.vae.jit(lambda vae, video: vae.encode(video))
        self._data: ShapesLatents | None = None
        self._frames: FirstFrames | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.vae_config
        frames = (world.NUM_FRAMES - 1) // vae.temporal_stride + 1
        return frames, world.SIZE // vae.spatial_stride, world.SIZE // vae.spatial_stride, vae.z_dim

    def init(self, key: jax.Array) -> dict[str, Params]:
        start = self.config.init_from
        return {"model": self._weights_of(start, key) if start else self._new(key)}

    def batch(self, role: str, step: int, phase: Any) -> Batch:
        data = self._dataset()
        rng = np.random.default_rng([self.config.seed, step])
        rows = rng.integers(len(data.latents), size=phase.batch_size)
        caption = rng.integers(CAPTIONS_PER_VIDEO, size=phase.batch_size)
        ids, mask = data.ids[rows, caption], data.mask[rows, caption]
        empty_ids, empty_mask = self.tokenize([""])
        dropped = (rng.random(phase.batch_size) < self.config.caption_dropout)[:, None]
        image = None
        if self.with_image:
            first = self._first_frames()
            image = self._image_batch(first.frames[rows], first.latents[rows])
        return Batch(data.latents[rows], np.where(dropped, empty_ids, ids), np.where(dropped, empty_mask, mask), image)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        time_key, noise_key = jax.random.split(key)
        n = batch.latents.shape[0]
        # One draw from each of n equal strata: the loss of a step varies less.
        uniform = (jnp.arange(n) + jax.random.uniform(time_key, (n,))) / n
        sigma = shift_sigma(uniform, self.config.shift)
        noise = jax.random.normal(noise_key, batch.latents.shape)
        noisy = add_noise(batch.latents, noise, sigma)
        text = self._encode(params, batch.ids, batch.mask)
        velocity = self._velocity(params, noisy, timestep_from_sigma(sigma), text, batch.image)
        losses = jnp.mean(jnp.square(velocity - velocity_target(batch.latents, noise)), axis=(1, 2, 3, 4))
        quarters = {f"loss_sigma_{i}": losses[i * n // 4 : (i + 1) * n // 4].mean() for i in range(4)} if n >= 4 else {}
        return losses.mean(), quarters

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """Prompt accuracy on unseen prompts, sampled with few steps to be quick."""
        settings = self.config.evaluation
        prompts = world.heldout_prompts(settings.prompts, seed=1)
        frames = first_frames(prompts, seed=1) if self.with_image else None
        parts = []
        for i in range(0, len(prompts), 24):
            texts = [p.text for p in prompts[i : i + 24]]
            given = None if frames is None else frames[i : i + 24]
            parts.append(self.sample(params, texts, seed=i, steps=settings.steps, frames=given))
        videos = np.concatenate(parts)
        save_grid(directory / "samples" / f"{step:06d}.png", videos[:12])
        return shapes_scores(videos, prompts, frames)

    def sample(
        self, params: Params, prompts: list[str], *, seed: int, steps: int, frames: np.ndarray | None = None
    ) -> np.ndarray:
        """Videos [N, F, H, W, 3] in [-1, 1] by UniPC with guidance; from first frames uint8 [N, H, W, 3], if given."""
        noise = jax.random.normal(jax.random.key(seed), (len(prompts), *self.latent_shape))
        table = unipc.unipc_table(steps, self.config.sampling_shift)
        image = None
        if frames is not None:
            latents = self._encode_video(self.vae_params, condition_videos(frames))
            image = self._image_batch(frames, np.asarray(latents))
        return np.asarray(self._sample(params, self.vae_params, noise, *self.tokenize(prompts), table, image))

    def tokenize(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer.encode_batch(prompts)
        return np.array([e.ids for e in encoded], np.int32), np.array([e.attention_mask for e in encoded], np.int32)

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        """Everything that `python -m infer` needs, in 16 bits where that costs nothing visible."""
        dtype = jnp.dtype(self.config.export_dtype)
        components: dict[str, tuple[Config, dict[str, np.ndarray]]] = {
            name: (config, _flat_numpy(params[name], dtype)) for name, config in self.configs.items()
        }
        references = {}
        if self.config.share_vae:
            references["vae"] = relative_reference(pathlib.Path(self.config.vae), path)
        else:
            components["vae"] = self.vae_config, _flat_numpy(self.vae_params)
        tokenizer_file = path.with_suffix(".tokenizer.json")
        write_tokenizer(tokenizer_file)
        save_native(
            path,
            task=self.model_config.model_type,
            variant="base",
            schedule=Schedule(
                sampler="unipc",
                num_inference_steps=50,
                shift=self.config.sampling_shift,
                guidance_scale=self.config.guidance_scale,
                height=world.SIZE,
                width=world.SIZE,
                num_frames=world.NUM_FRAMES,
            ),
            components=components,
            references=references,
            tokenizer_file=tokenizer_file,
            overwrite=overwrite,
        )
        tokenizer_file.unlink()

    @property
    def configs(self) -> dict[str, Config]:
        """The sizes of what is trained, by component."""
        configs: dict[str, Config] = {"transformer": self.model_config, "text_encoder": self.text_config}
        if self.clip_config is not None:
            configs["image_encoder"] = self.clip_config
        return configs

    def _new(self, key: jax.Array) -> Params:
        def make(key: jax.Array) -> Params:
            keys = jax.random.split(key, len(self.configs))
            return {
                name: split(make_network(config, rngs=nnx.Rngs(k)))[1]
                for (name, config), k in zip(self.configs.items(), keys, strict=True)
            }

        return jax.jit(make)(key)

    def _weights_of(self, path: str, key: jax.Array) -> Params:
        """The weights of a native checkpoint of the same sizes, to go on from. A text-to-video one may become i2v."""
        checkpoint = open_checkpoint(path)
        params, start = self._new(key), checkpoint.config("transformer")
        widens = self.with_image and start.model_type == "t2v"
        image_sizes = {name: getattr(self.model_config, name) for name in ("model_type", "in_dim", "clip_dim")}
        for name in params:
            if widens and name == "image_encoder":
                continue
            theirs: Config = checkpoint.config(name)
            if widens and name == "transformer":
                theirs = dataclasses.replace(start, **image_sizes)
            if theirs != self.configs[name]:
                raise UserError(f"config.init_from={path} has a {name} of other sizes ({theirs}); give one of the same")
            loaded = checkpoint.load(name, "float32")
            params[name] = add_image_input(params[name], loaded) if widens and name == "transformer" else loaded
        return params

    def _image_batch(self, frames: np.ndarray, latents: np.ndarray) -> ImageBatch:
        """First frames uint8 [B, H, W, 3] and their latents -> what the networks take."""
        assert self.clip_config is not None
        mask = condition_mask(*latents.shape[1:4], channels=self.vae_config.temporal_stride)
        mask = np.broadcast_to(mask, (len(latents), *mask.shape))
        pixels = np.stack([clip_pixels(frame, self.clip_config.image_size) for frame in frames])
        return ImageBatch(np.concatenate([mask, latents.astype(np.float32)], axis=-1), pixels)

    def _encode(self, params: Params, ids: Any, mask: Any) -> jax.Array:
        return merge(self.graphs["text_encoder"], params["text_encoder"])(ids, mask)

    def _velocity(
        self, params: Params, latents: jax.Array, timestep: jax.Array, text: jax.Array, image: ImageBatch | None
    ) -> jax.Array:
        features = None
        if image is not None:
            features = merge(self.graphs["image_encoder"], params["image_encoder"])(image.pixels)
            latents = jnp.concatenate([latents, image.latents], axis=-1)
        return merge(self.graphs["transformer"], params["transformer"])(latents, timestep, text, features)

    def _sample_impl(
        self,
        params: Params,
        vae_params: Params,
        noise: Any,
        ids: Any,
        mask: Any,
        table: unipc.Coefficients,
        image: ImageBatch | None,
    ) -> jax.Array:
        empty_ids, empty_mask = (jnp.broadcast_to(a, ids.shape) for a in self.tokenize([""]))
        text = self._encode(params, jnp.concatenate([ids, empty_ids]), jnp.concatenate([mask, empty_mask]))
        image = jax.tree.map(lambda x: jnp.concatenate([x, x]), image)

        def velocity(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            both = jnp.concatenate([latents, latents])
            answers = self._velocity(params, both, jnp.full(both.shape[:1], timestep), text, image)
            conditional, unconditional = jnp.split(answers, 2)
            return guided_velocity(unconditional, conditional, self.config.guidance_scale)

        return merge(self.vae.graphdef, vae_params).decode(unipc.sample(velocity, noise, table))

    def _dataset(self) -> ShapesLatents:
        if self._data is None:
            path = pathlib.Path(self.config.run_dir) / "latents.npz"
            count, seed = self.config.num_videos, self.config.seed
            self._data = encode_videos(path, count, seed, self._encode_video, self.vae_params, self.tokenize)
        return self._data

    def _first_frames(self) -> FirstFrames:
        if self._frames is None:
            path = pathlib.Path(self.config.run_dir) / "first_frames.npz"
            count, seed = self.config.num_videos, self.config.seed
            self._frames = encode_first_frames(path, count, seed, self._encode_video, self.vae_params)
        return self._frames


def _padded_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(length=TEXT_LEN, pad_id=0, pad_token="<pad>")
    return tokenizer


def add_image_input(params: Params, loaded: Params) -> Params:
    """The weights of a text-to-video transformer in one with image input, which changes nothing of what it says.

    Args:
        params: new, of the image-to-video transformer.
        loaded: of a text-to-video transformer of the same sizes.
    """
    flat = flatten(params)
    for name, value in flatten(loaded).items():
        if name == "patch_embedding.kernel":
            value = jnp.zeros_like(flat[name]).at[:, :, :, : value.shape[3]].set(value)
        flat[name] = value
    # Attention to the image adds nothing until it has learnt to.
    flat["blocks.cross_attn.v_img.kernel"] = jnp.zeros_like(flat["blocks.cross_attn.v_img.kernel"])
    return unflatten(flat)


def _flat_numpy(params: Params, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf.astype(dtype)) for name, leaf in flatten(params).items()}
