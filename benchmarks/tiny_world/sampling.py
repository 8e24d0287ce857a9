"""Many videos of the tiny world at once: prompts are encoded together and sampled in batches of one compiled size.

The Pipeline makes one video a request, which leaves a device idle at this size. Here video i has the noise that the
Pipeline draws for seed `seed + i`, so that any video of a measurement can be made again alone.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.data.sources import Batch, Conditions
from train.rollouts import BlockByBlock, velocity_of
from train.shapes.source import FirstFrameConditions, encode_frames
from x2v_jax.diffusion import step_distill, unipc
from x2v_jax.diffusion.flow import guided_velocity
from x2v_jax.diffusion.noise import initial_noise, step_noise
from x2v_jax.generate.tokenizer import Tokenizer
from x2v_jax.media.pixels import to_uint8
from x2v_jax.models.functional import Params, merge
from x2v_jax.models.networks import abstract_network
from x2v_jax.request.resolve import ResolvedRequest, WholePlan


class ShapesModel:
    """A text-to-video checkpoint on the device, all of it at once: it is small.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: of weights and matmuls; the autoencoder always computes in float32.
        only: load no other components than these.
    """

    COMPONENTS = ("transformer", "text_encoder", "vae")

    def __init__(self, checkpoint: Any, dtype: str = "float32", only: Sequence[str] = COMPONENTS):
        self.checkpoint = checkpoint
        self._params: dict[str, Params] = {}
        self._graphs: dict[str, nnx.GraphDef] = {}
        self._seconds: list[tuple[float, float, int]] = []  # denoising, decoding, videos
        for name in only:
            component_dtype = "float32" if name == "vae" else dtype
            self._params[name] = checkpoint.load(name, component_dtype)
            self._graphs[name] = abstract_network(checkpoint.config(name), dtype=jnp.dtype(component_dtype))[0]
        self._encode_text = jax.jit(lambda params, ids, mask: self._merge("text_encoder", params)(ids, mask))
        self._decode = jax.jit(lambda params, latents: self._merge("vae", params).decode(latents))
        self._reconstruct = jax.jit(self._reconstruct_fn)

    def params(self, name: str) -> Params:
        return self._params[name]

    def graph(self, name: str) -> nnx.GraphDef:
        return self._graphs[name]

    def config(self, name: str) -> Any:
        return self.checkpoint.config(name)

    def generate(
        self, prompts: Sequence[str], request: ResolvedRequest, batch_size: int, frames: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Videos of the prompts, a batch at a time: uint8 [up to batch_size, F, H, W, 3].

        Args:
            prompts: one a video.
            request: its prompt is not used; video i has the seed `request.seed + i`.
            batch_size: videos that are sampled together. The last batch is filled up, so that one program serves all.
            frames: first frames uint8 [N, H, W, 3], image-to-video only.
        """
        texts = np.asarray(self.encode_text([*prompts, request.negative_prompt]))
        images = None if frames is None else first_frame_conditions(self.checkpoint, frames)
        sample = jax.jit(self._sampler(request))
        for rows in _batches(len(prompts), batch_size):
            seeds = (request.seed + rows) % 2**32
            keys = jax.vmap(jax.random.key)(jnp.asarray(seeds.astype(np.uint32)))
            given = Conditions(texts[rows])
            if images is not None:
                given = Conditions(texts[rows], images.conditions(rows), images.features(rows))
            begin = time.perf_counter()
            latents = jax.block_until_ready(sample(self._params["transformer"], keys, given, texts[-1]))
            middle = time.perf_counter()
            videos = np.asarray(to_uint8(self._decode(self._params["vae"], latents)))
            self._seconds.append((middle - begin, time.perf_counter() - middle, len(rows)))
            yield videos[: len(prompts) - rows[0]]

    def seconds_per_video(self) -> dict[str, float]:
        """Of "denoise" and "decode", the median over batches; the first one, which compiles, counts only if alone."""
        timed = self._seconds[1:] or self._seconds
        denoise, decode = (float(np.median([t[i] / t[2] for t in timed])) for i in (0, 1))
        return {"denoise": denoise, "decode": decode}

    def encode_text(self, prompts: Sequence[str]) -> jax.Array:
        """Prompts -> float32 [N, text_len, text_dim], zero past each prompt's end."""
        text_len = self.checkpoint.config("transformer").text_len
        ids, mask = Tokenizer.from_file(self.checkpoint.tokenizer_file(), text_len)(list(prompts))
        return self._encode_text(self._params["text_encoder"], ids, mask)

    def reconstruct(self, videos: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Videos [N, F, H, W, 3] in [-1, 1] through the autoencoder and back, a batch at a time: uint8."""
        for rows in _batches(len(videos), batch_size):
            again = np.asarray(to_uint8(self._reconstruct(self._params["vae"], videos[rows])))
            yield again[: len(videos) - rows[0]]

    def _sampler(self, request: ResolvedRequest) -> Any:
        graph, schedule = self.graph("transformer"), self.checkpoint.schedule
        if isinstance(request.plan, WholePlan):
            return make_sampler(graph, request, request.plan)
        config, causal = self.config("transformer"), schedule.causal
        vae = self.config("vae")
        shape = (
            (request.num_frames - 1) // vae.temporal_stride + 1,
            schedule.height // vae.spatial_stride,
            schedule.width // vae.spatial_stride,
            vae.z_dim,
        )
        rollout = BlockByBlock(
            graph,
            config,
            shape,
            request.plan.sigmas,
            block=causal.block,
            context_timestep=causal.context_timestep or 0.0,
        )

        def sample(params: Params, keys: jax.Array, conditions: Conditions, negative: jax.Array) -> jax.Array:
            batch = Batch(conditions, jnp.arange(len(keys)))
            return rollout.videos(params, batch, keys, jnp.int32(request.num_inference_steps - 1))

        return sample

    def _reconstruct_fn(self, params: Params, videos: jax.Array) -> jax.Array:
        vae = self._merge("vae", params)
        return vae.decode(vae.encode(videos))

    def _merge(self, name: str, params: Params) -> Any:
        return merge(self._graphs[name], params)


def first_frame_conditions(checkpoint: Any, frames: np.ndarray) -> FirstFrameConditions:
    """What an image-to-video model of the tiny world is given of first frames uint8 [N, H, W, 3]."""
    return FirstFrameConditions(checkpoint.path, encode_frames(checkpoint, frames), checkpoint)


def make_sampler(graphdef: nnx.GraphDef, request: ResolvedRequest, plan: WholePlan) -> Any:
    """The request's sampler as a pure function (params, keys [B], conditions, negative text [L, D]) -> latents.

    Args:
        graphdef: of a WanModel.
        request: says size and guidance.
        plan: the request's, says the sampler.
    """
    guidance, shape = request.guidance_scale, request.latent_shape

    def sample(params: Params, keys: jax.Array, conditions: Conditions, negative: jax.Array) -> jax.Array:
        model = merge(graphdef, params)
        if request.uses_guidance:
            without = conditions._replace(text=jnp.broadcast_to(negative, conditions.text.shape))
            conditions = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), without, conditions)

        def velocity(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            if request.uses_guidance:
                latents = jnp.concatenate([latents, latents])
            answer = velocity_of(model, latents, timestep, conditions)
            if not request.uses_guidance:
                return answer
            unconditional, conditional = jnp.split(answer, 2)
            return guided_velocity(unconditional, conditional, guidance)

        noise = jax.vmap(lambda key: initial_noise(key, shape))(keys)
        if plan.sampler == "unipc":
            return unipc.sample(velocity, noise, unipc.unipc_table(len(plan.sigmas), plan.shift))
        sigmas = np.asarray(plan.sigmas, np.float32)
        return step_distill.sample(
            velocity, noise, sigmas, lambda step: jax.vmap(lambda key: step_noise(key, step, shape))(keys)
        )

    return sample


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Rows 0..count-1 in pieces of exactly `size`; the last one goes on with the last row."""
    size = min(size, count)
    for first in range(0, count, size):
        yield np.minimum(np.arange(first, first + size), count - 1)
