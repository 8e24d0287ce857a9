"""Block-by-block videos: frames appear while the rest is still being made, and memory does not grow with the length.

The device is never idle between blocks, and its queue is short: when block k is handed out, block k + 1 is being
denoised, and block k + 2 has not been asked for.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from x2v_jax.diffusion.noise import seed_key
from x2v_jax.diffusion.rollout import ChangeFn, NoiseFn, RenoiseFn, Rollout, draw_between, draw_initial, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.programs import Program
from x2v_jax.generate.vae import StreamDecoder, VaeRunner
from x2v_jax.media.tensor_files import LatentsFile
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import Params
from x2v_jax.request import earlier_video
from x2v_jax.request.causal import pixel_frames
from x2v_jax.request.inputs import BlockInputs
from x2v_jax.request.resolve import ResolvedRequest

Given = Float[Array, "1 f h w c"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of a video, in order.

    frames: uint8 [f, H, W, 3].
    latents: float32 [f, h, w, C] of these frames, as they were before the VAE.
    index: from 0, in this video.
    seconds: the device's time for "denoise" and "vae"; in the first block compiling is part of it, and what came before
        is there too: "load", "text", "image".
    state: what a file of latents that ends with this block says about itself. `media.tensor_files.write_latents` with
        the latents of all blocks so far and this state makes a file that `continue_from` takes.
    """

    frames: np.ndarray
    latents: np.ndarray
    index: int
    seconds: Mapping[str, float]
    state: Mapping[str, str]


class BlockStreamer:
    """Makes block-by-block videos with a transformer and a VAE.

    Args:
        transformer: of a causal text-to-video model. Its dtype is the cache's too unless the request says otherwise.
        not_finite: where ("of block 3") -> the error for latents that are NaN or infinite there.
    """

    def __init__(self, transformer: Network[WanConfig], vae: VaeRunner, not_finite: Callable[[str], UserError]):
        self._transformer, self._vae, self._not_finite = transformer, vae, not_finite
        self._rollouts: dict[tuple[RolloutPlan, tuple[int, int], str], Rollout] = {}
        self._is_finite = jax.jit(lambda latents: jnp.isfinite(latents).all())

    def rollout(self, plan: RolloutPlan, latent_size: tuple[int, int], kv_cache: str) -> Rollout:
        """The compiled functions of a plan and size; a later request of the same kind takes them again."""
        key = (plan, latent_size, kv_cache)
        if key not in self._rollouts:
            network = self._transformer
            self._rollouts[key] = Rollout(network.graphdef, network.config, plan, latent_size, cache_dtype=kv_cache)
        return self._rollouts[key]

    def stream(
        self, request: ResolvedRequest, inputs: BlockInputs, texts: Sequence[np.ndarray], clock: Clock
    ) -> Generator[Block]:
        """The blocks of a video.

        Args:
            inputs: what the request starts from.
            texts: embeddings [L, D] of the prompt and of those of prompt_schedule.
            clock: has the time of what came before; takes that of "load" and "image".

        Raises:
            UserError: a block is not finite, or save_latents cannot be written.
        """
        with clock("load"):
            self._vae.network.load()
        with clock("image"):
            before = self._before(inputs)
        with clock("load"):
            params = self._transformer.load()
        decoder = self._vae.stream(inputs.latent_size)
        if inputs.earlier is not None and before is not None:
            decoder(before)  # so that the first new frame is decoded as any later one
        queue = self._queue(request, inputs, texts, params, before)
        blocks = self._decoded(queue, decoder, inputs, clock)
        file = self._latents_file(request, inputs, before)
        with contextlib.closing(queue), file or contextlib.nullcontext(), contextlib.closing(blocks):
            for block in blocks:
                if file is not None:
                    file.append(block.latents, block.state)
                yield block

    def programs(self, request: ResolvedRequest, inputs: BlockInputs) -> Iterator[Program]:
        """What making a video compiles, apart from its text and picture."""
        rollout = self.rollout(inputs.plan, inputs.latent_size, request.kv_cache or self._transformer.dtype)
        params, config = self._transformer.shapes, self._transformer.config
        text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.float32)
        yield Program("prompt's keys and values", rollout.prepare, (params, text))
        context, cache = jax.eval_shape(rollout.prepare, params, text), jax.eval_shape(rollout.empty_cache)
        key = jax.eval_shape(jax.random.key, 0)
        number, timestep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        for frames in sorted({inputs.plan.block, 1 if inputs.plan.independent_first_frame else inputs.plan.block}):
            latents = jax.ShapeDtypeStruct(rollout.shape(frames), jnp.float32)
            added = jax.eval_shape(lambda latents=latents: rollout.no_noise(latents.shape))
            drawn = {"shape": latents.shape}
            yield Program("noise", draw_initial, (key, number), drawn)
            if inputs.plan.num_steps > 1:
                yield Program(
                    "noise between steps", draw_between, (key, number), drawn | {"steps": inputs.plan.num_steps}
                )
            arguments = (params, context, cache, latents, added, number, number, number, timestep)
            yield Program(f"block of {frames} latent frames", rollout.block, arguments)
            yield Program("check", self._is_finite, (latents,))
            yield from self._vae.stream_programs(latents.shape)

    def _before(self, inputs: BlockInputs) -> Given | None:
        """The latents that the video starts from: of the picture, or all that matters of the earlier video."""
        if inputs.picture is not None:
            stride = self._vae.network.config.temporal_stride
            still = np.repeat(inputs.picture[None], pixel_frames(inputs.given, stride, follows=False), axis=0)
            return self._encoded(still)
        if inputs.earlier is None:
            return None
        tail = inputs.earlier.tail
        return jnp.asarray(tail)[None] if inputs.earlier.is_encoded else self._encoded(tail)

    def _encoded(self, frames: np.ndarray) -> Given:
        video = frames[None].astype(np.float32) / np.float32(127.5) - 1
        return jax.block_until_ready(jnp.asarray(self._vae.encode(video), jnp.float32))

    def _queue(
        self,
        request: ResolvedRequest,
        inputs: BlockInputs,
        texts: Sequence[np.ndarray],
        params: Params,
        before: Given | None,
    ) -> Generator[Array]:
        """Latents of the blocks of the video in order; they may still be in the making when they come."""
        rollout = self.rollout(inputs.plan, inputs.latent_size, request.kv_cache or self._transformer.dtype)
        given = None if before is None else before[:, before.shape[1] - inputs.given :]
        if inputs.picture is not None and given is not None:
            yield given
        context = rollout.prepare(params, jnp.asarray(texts[0])[None])
        noise, renoise = _noises(request, inputs)
        change = self._changes(request, inputs, rollout, params, texts[1:])
        yield from rollout.stream(params, context, noise, renoise, inputs.num_frames, given=given, change=change)

    def _changes(
        self,
        request: ResolvedRequest,
        inputs: BlockInputs,
        rollout: Rollout,
        params: Params,
        texts: Sequence[np.ndarray],
    ) -> ChangeFn | None:
        if not request.prompt_schedule:
            return None
        due = deque((second, text) for (second, _), text in zip(request.prompt_schedule, texts, strict=True))
        stride, follows = self._vae.network.config.temporal_stride, inputs.earlier is not None
        fps = request.fps

        def change(latent_frames: int) -> Any:
            made = latent_frames - inputs.given if follows else latent_frames
            first_frame = pixel_frames(made, stride, follows=follows)
            text = None
            while due and first_frame >= due[0][0] * fps:
                _, text = due.popleft()
            return None if text is None else rollout.prepare(params, jnp.asarray(text)[None])

        return change

    def _latents_file(self, request: ResolvedRequest, inputs: BlockInputs, before: Given | None) -> LatentsFile | None:
        if not request.save_latents:
            return None
        context = None if inputs.earlier is None or before is None else np.asarray(before[0])
        keep = earlier_video.tail_frames(inputs.plan, self._vae.network.config) if request.endless else None
        return LatentsFile(request.save_latents, context=context, keep=keep)

    def _decoded(
        self, queue: Iterator[Array], decoder: StreamDecoder, inputs: BlockInputs, clock: Clock
    ) -> Generator[Block]:
        blocks = 0 if inputs.earlier is None else inputs.earlier.num_blocks
        # The device's clock: a thread waits for each piece of work, because the caller may come back late.
        with _Watch() as watch:
            free = asked = time.perf_counter()
            latents = next(queue, None)
            for index in itertools.count():
                if latents is None:
                    return
                finite, denoised = self._is_finite(latents), watch.end_of(latents)
                pieces = decoder(latents)
                decoded = watch.end_of(pieces)
                asked_next = time.perf_counter()
                following = next(queue, None)
                frames = np.concatenate([np.asarray(piece)[0] for piece in pieces])
                values = np.asarray(latents[0])
                if not finite:  # worked out on the device, and there before the frames
                    raise self._not_finite(f"of block {index}")
                seconds = {"denoise": denoised.result() - max(asked, free), "vae": decoded.result() - denoised.result()}
                free, asked = decoded.result(), asked_next
                if index == 0:
                    seconds = clock.seconds | seconds
                state = inputs.header | {"blocks": str(blocks + index + 1)}
                latents = following
                del pieces, following, finite
                yield Block(frames, values, index, seconds, state)


class _Watch:
    """Tells when work on the device is done, as a context."""

    def __enter__(self) -> "_Watch":
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "x2v_jax device clock")
        return self

    def end_of(self, arrays: object) -> "concurrent.futures.Future[float]":
        def wait() -> float:
            jax.block_until_ready(arrays)
            return time.perf_counter()

        return self._pool.submit(wait)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def in_context(
    start: Callable[[], Generator[Block]], context: Callable[[], contextlib.AbstractContextManager[None]]
) -> Generator[Block]:
    """The blocks of `start()`. The context holds while it works and not while its caller does."""
    with contextlib.closing(start()) as blocks:
        while True:
            with context():
                block = next(blocks, None)
            if block is None:
                return
            yield block


def collect(
    blocks: Generator[Block], inputs: BlockInputs, on_block: Callable[[int, int, Array], None] | None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """All blocks of a video: frames uint8 [F, H, W, 3], latents float32 [f, h, w, C], seconds added up.

    Args:
        on_block: called after each with (block from 0, number of blocks, its latents [1, f, h, w, C]).
    """
    count = (inputs.num_blocks or 0) + (inputs.picture is not None)
    frames, latents, seconds = [], [], {}
    with contextlib.closing(blocks):
        for block in blocks:
            frames.append(block.frames)
            latents.append(block.latents)
            for name, value in block.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
            if on_block is not None:
                on_block(block.index, count, jnp.asarray(block.latents)[None])
    return np.concatenate(frames), np.concatenate(latents), seconds


def _noises(request: ResolvedRequest, inputs: BlockInputs) -> tuple[NoiseFn, RenoiseFn]:
    """Noise by the block's number in the rollout. The seed's noise goes on where that of the earlier video ended."""
    initial, between = keyed_noise(seed_key(request.seed))
    given = inputs.blocks_of(inputs.given)
    ahead = 0 if inputs.earlier is None else inputs.earlier.num_blocks - given
    file = inputs.noise

    def noise(block: int, shape: tuple[int, ...]) -> Array:
        if file is not None:
            return jnp.asarray(file.noise(block - given)[None, : shape[1]])
        return initial(block + ahead, shape)

    def renoise(block: int, steps: int, shape: tuple[int, ...]) -> Array:
        if file is not None and file.has_renoise:
            return jnp.asarray(file.renoise(block - given)[:, None, : shape[1]])
        return between(block + ahead, steps, shape)

    return noise, renoise
