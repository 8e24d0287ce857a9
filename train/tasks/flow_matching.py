"""Trains a text-to-video transformer and its text encoder together by flow matching, on encoded Moving Shapes.

The latents are made once from a trained VAE and kept beside the run; each has several captions, one of which is drawn
every time it is shown. A share of captions is dropped, so that the model can be guided.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from train.data import shapes
from train.data.shapes_tokenizer import TEXT_LEN, make_tokenizer, write_tokenizer
from train.pictures import save_grid
from x2v_jax.checkpoint.store import open_checkpoint, save_native
from x2v_jax.diffusion import unipc
from x2v_jax.diffusion.flow import add_noise, guided_velocity, shift_sigma, timestep_from_sigma, velocity_target
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.functional import Params, abstract, flatten, merge, split
from x2v_jax.models.umt5 import Umt5Encoder
from x2v_jax.models.vae import WanVae
from x2v_jax.models.wan import WanModel
from x2v_jax.pixels import to_uint8

_CAPTIONS_PER_VIDEO = 6
_ENCODE_BATCH = 8


class Batch(NamedTuple):
    latents: Any  # [B, f, h, w, C]
    ids: Any  # [B, L]
    mask: Any  # [B, L]


class FlowMatchingTask:
    def __init__(self, config: Any):
        self.config = config
        self.tokenizer = _padded_tokenizer()
        self.text_config = Umt5Config(
            vocab_size=self.tokenizer.get_vocab_size(), **{k: v for k, v in config.text_encoder.items()}
        )
        self.model_config = WanConfig(
            text_dim=self.text_config.dim, text_len=TEXT_LEN, **{k: v for k, v in config.model.items()}
        )
        self.dtype = jnp.dtype(config.dtype)
        self.graphs = _graphs(self.model_config, self.text_config, self.dtype)
        checkpoint = open_checkpoint(config.vae)
        self.vae_config: VaeConfig = checkpoint.config("vae")
        self.vae_graph, _ = abstract(lambda: WanVae(self.vae_config, rngs=nnx.Rngs(0)))
        self.vae_params = checkpoint.load("vae", "float32")
        self._sample = jax.jit(self._sample_impl)
        self._data: Batch | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.vae_config
        frames = (shapes.NUM_FRAMES - 1) // vae.temporal_stride + 1
        return frames, shapes.SIZE // vae.spatial_stride, shapes.SIZE // vae.spatial_stride, vae.z_dim

    def init(self, key: jax.Array) -> Params:
        if self.config.init_from:
            return self._weights_of(self.config.init_from)

        def make(key: jax.Array) -> Params:
            keys = jax.random.split(key)
            transformer = WanModel(self.model_config, rngs=nnx.Rngs(keys[0]))
            text_encoder = Umt5Encoder(self.text_config, rngs=nnx.Rngs(keys[1]))
            return {"transformer": split(transformer)[1], "text_encoder": split(text_encoder)[1]}

        return jax.jit(make)(key)

    def start_phase(self, params: Params, phase: Any) -> Params:
        return params

    def batch(self, step: int, phase: Any) -> Batch:
        data = self._dataset()
        rng = np.random.default_rng([self.config.seed, step])
        rows = rng.integers(len(data.latents), size=phase.batch_size)
        caption = rng.integers(_CAPTIONS_PER_VIDEO, size=phase.batch_size)
        ids, mask = data.ids[rows, caption], data.mask[rows, caption]
        empty_ids, empty_mask = self.tokenize([""])
        dropped = (rng.random(phase.batch_size) < self.config.caption_dropout)[:, None]
        return Batch(data.latents[rows], np.where(dropped, empty_ids, ids), np.where(dropped, empty_mask, mask))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        time_key, noise_key = jax.random.split(key)
        n = batch.latents.shape[0]
        # One draw from each of n equal strata: the loss of a step varies less.
        uniform = (jnp.arange(n) + jax.random.uniform(time_key, (n,))) / n
        sigma = shift_sigma(uniform, self.config.shift)
        noise = jax.random.normal(noise_key, batch.latents.shape)
        noisy = add_noise(batch.latents, noise, sigma)
        velocity = self._velocity(
            params, noisy, timestep_from_sigma(sigma), self._encode(params, batch.ids, batch.mask)
        )
        losses = jnp.mean(jnp.square(velocity - velocity_target(batch.latents, noise)), axis=(1, 2, 3, 4))
        quarters = {f"loss_sigma_{i}": losses[i * n // 4 : (i + 1) * n // 4].mean() for i in range(4)} if n >= 4 else {}
        return losses.mean(), quarters

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """Prompt accuracy on unseen prompts, sampled with few steps to be quick."""
        from benchmarks.shapes_judge import score

        settings = self.config.evaluation
        prompts = shapes.heldout_prompts(settings.prompts, seed=1)
        videos = np.concatenate(
            [
                self.sample(params, [p.text for p in prompts[i : i + 24]], seed=i, steps=settings.steps)
                for i in range(0, len(prompts), 24)
            ]
        )
        save_grid(directory / "samples" / f"{step:06d}.png", videos[:12])
        results = score(to_uint8(videos), prompts)
        return {name: value for name, value in results.items() if isinstance(value, float)}

    def sample(self, params: Params, prompts: list[str], *, seed: int, steps: int) -> np.ndarray:
        """Videos [N, F, H, W, 3] in [-1, 1] by UniPC with guidance."""
        noise = jax.random.normal(jax.random.key(seed), (len(prompts), *self.latent_shape))
        table = unipc.unipc_table(steps, self.config.sampling_shift)
        return np.asarray(self._sample(params, self.vae_params, noise, *self.tokenize(prompts), table))

    def tokenize(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer.encode_batch(prompts)
        return np.array([e.ids for e in encoded], np.int32), np.array([e.attention_mask for e in encoded], np.int32)

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        """Everything that `python -m infer` needs, in 16 bits where that costs nothing visible."""
        plain = {name: _flat_numpy(params[name]) for name in ("transformer", "text_encoder")}
        tokenizer_file = path.with_suffix(".tokenizer.json")
        write_tokenizer(tokenizer_file)
        save_native(
            path,
            task="t2v",
            variant="base",
            schedule=Schedule(
                sampler="unipc",
                num_inference_steps=50,
                shift=self.config.sampling_shift,
                guidance_scale=self.config.guidance_scale,
                height=shapes.SIZE,
                width=shapes.SIZE,
                num_frames=shapes.NUM_FRAMES,
            ),
            components={
                "transformer": (self.model_config, plain["transformer"]),
                "text_encoder": (self.text_config, plain["text_encoder"]),
                "vae": (self.vae_config, _flat_numpy(self.vae_params)),
            },
            tokenizer_file=tokenizer_file,
            overwrite=overwrite,
        )
        tokenizer_file.unlink()

    def _weights_of(self, path: str) -> Params:
        """The weights of a native checkpoint of the same sizes, to go on from."""
        checkpoint = open_checkpoint(path)
        for name, ours in (("transformer", self.model_config), ("text_encoder", self.text_config)):
            theirs = checkpoint.config(name)
            if theirs != ours:
                raise UserError(f"config.init_from={path} has a {name} of other sizes ({theirs}); give one of the same")
        return {name: checkpoint.load(name, "float32") for name in ("transformer", "text_encoder")}

    def _encode(self, params: Params, ids: Any, mask: Any) -> jax.Array:
        return merge(self.graphs["text_encoder"], params["text_encoder"])(ids, mask)

    def _velocity(self, params: Params, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> jax.Array:
        return merge(self.graphs["transformer"], params["transformer"])(latents, timestep, text)

    def _sample_impl(
        self, params: Params, vae_params: Params, noise: Any, ids: Any, mask: Any, table: unipc.Coefficients
    ) -> jax.Array:
        empty_ids, empty_mask = (jnp.broadcast_to(a, ids.shape) for a in self.tokenize([""]))
        text = self._encode(params, jnp.concatenate([ids, empty_ids]), jnp.concatenate([mask, empty_mask]))

        def velocity(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            both = jnp.concatenate([latents, latents])
            answers = self._velocity(params, both, jnp.full(both.shape[:1], timestep), text)
            conditional, unconditional = jnp.split(answers, 2)
            return guided_velocity(unconditional, conditional, self.config.guidance_scale)

        return merge(self.vae_graph, vae_params).decode(unipc.sample(velocity, noise, table))

    def _dataset(self) -> Batch:
        """Latents and captions of config.num_videos scenes; encoded once and kept in the run directory."""
        if self._data is not None:
            return self._data
        path = pathlib.Path(self.config.run_dir) / "latents.npz"
        if not path.exists():
            encode = jax.jit(
                lambda params, key: merge(self.vae_graph, params).encode(
                    shapes.render(shapes.sample_scenes(key, _ENCODE_BATCH))
                )
            )
            latents, ids, mask = [], [], []
            for i in tqdm(range(self.config.num_videos // _ENCODE_BATCH), desc="encoding videos", unit="batch"):
                key = jax.random.fold_in(jax.random.key(self.config.seed + 2), i)
                latents.append(np.asarray(encode(self.vae_params, key)))
                scenes = shapes.sample_scenes(key, _ENCODE_BATCH)
                texts = [
                    self.tokenize(shapes.captions(scenes, seed=_CAPTIONS_PER_VIDEO * i + j))
                    for j in range(_CAPTIONS_PER_VIDEO)
                ]
                ids.append(np.stack([t[0] for t in texts], axis=1))
                mask.append(np.stack([t[1] for t in texts], axis=1))
            part = path.with_suffix(".part.npz")
            np.savez(part, latents=np.concatenate(latents), ids=np.concatenate(ids), mask=np.concatenate(mask))
            part.rename(path)
        with np.load(path) as stored:
            self._data = Batch(stored["latents"], stored["ids"], stored["mask"])
        return self._data


def _padded_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(length=TEXT_LEN, pad_id=0, pad_token="<pad>")
    return tokenizer


def _graphs(model: WanConfig, text: Umt5Config, dtype: Any) -> dict[str, Any]:
    return {
        "transformer": abstract(lambda: WanModel(model, rngs=nnx.Rngs(0), dtype=dtype))[0],
        "text_encoder": abstract(lambda: Umt5Encoder(text, rngs=nnx.Rngs(0), dtype=dtype))[0],
    }


def _flat_numpy(params: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
