"""Prompt or image -> frames: the one place that knows the order of the parts.

tokenizer, text encoder, (CLIP, VAE encoder) -> sampler around the transformer -> VAE decoder -> uint8 frames. Models
that make a video block by block go through `streaming` instead of a sampler.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, UInt8

from x2v_jax import interchange, memory
from x2v_jax.block_inputs import BlockInputs, block_sizes, read_inputs
from x2v_jax.checkpoint import store
from x2v_jax.clock import Clock
from x2v_jax.denoising import Conditions, Denoiser, OnStep
from x2v_jax.diffusion import image_condition, noise, step_distill, unipc
from x2v_jax.errors import UserError
from x2v_jax.image_conditioner import ImageConditioner
from x2v_jax.networks import Lora, Network, describe_networks
from x2v_jax.prompts import PromptEncoder
from x2v_jax.request import Request, latent_shape, resolve
from x2v_jax.streaming import Block, BlockStreamer, collect
from x2v_jax.vae_runner import DecodeMethod, VaeRunner

Frames = UInt8[np.ndarray, "f h w 3"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One video and how it came about.

    frames: uint8 [F, H, W, 3].
    latents: float32 [f, h, w, C], as they were before the VAE.
    request: complete, with the seed that was drawn.
    seconds: wall time of "load", "text", "image", "denoise" and "vae"; the first call of a size includes compiling.
    memory_plan: predicted bytes. peak_bytes: the process's (CPU) or the device's (GPU) highest so far.
    """

    frames: np.ndarray
    latents: np.ndarray
    request: Request
    seconds: dict[str, float]
    memory_plan: memory.MemoryPlan
    peak_bytes: int


class Pipeline:
    """Makes videos with one checkpoint. Build it with `from_checkpoint`.

    >>> pipe = Pipeline.from_checkpoint("assets/shapes")  # doctest: +SKIP
    >>> frames = pipe("a red circle moves left", seed=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        checkpoint: store.NativeCheckpoint,
        *,
        dtype: DTypeLike = "bfloat16",
        loras: Sequence[Lora] = (),
        keep_encoders: bool = False,
        allow_mismatch: bool = False,
        sequential_guidance: bool = False,
        vae_decode: DecodeMethod = "auto",
    ):
        """See `from_checkpoint`."""
        dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        if dtype not in memory.DTYPES:
            raise UserError(f"dtype is {dtype!r}; give {' or '.join(memory.DTYPES)}")
        if vae_decode not in memory.DECODE_METHODS:
            raise UserError(f"vae_decode is {vae_decode!r}; give one of {', '.join(memory.DECODE_METHODS)}")
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.keep_encoders = keep_encoders
        self.allow_mismatch = allow_mismatch
        self.sequential_guidance = sequential_guidance
        self.vae_decode: DecodeMethod = vae_decode
        self._has_loras = bool(loras)
        self._networks, self.lora_report = describe_networks(checkpoint, loras, dtype=dtype)
        self._denoiser: Denoiser | None = None
        self._streamer: BlockStreamer | None = None
        self._vae: VaeRunner | None = None
        self._prompt_encoder: PromptEncoder | None = None
        self._image_conditioner: ImageConditioner | None = None

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """A pipeline on a checkpoint that `python -m convert` made. Weights are read when they are first needed.

        Args:
            path: the checkpoint's folder.
            dtype: "bfloat16" (matmuls and weights; the rest is float32) or "float32" (everything, highest precision).
            loras: files, or (file, strength) pairs, merged into the transformer when it is loaded.
            keep_encoders: leave text and image encoders on the device while denoising.
            allow_mismatch: accept requests that contradict the checkpoint's schedule.
            sequential_guidance: conditional and unconditional pass one after the other: slower, less memory.
            vae_decode: "auto", "whole", "stream" or "tiled"; see `vae_runner.VaeRunner`.

        Raises:
            UserError: no such checkpoint, or a LoRA that does not fit it.
        """
        return cls(store.open_checkpoint(path), **options)

    def __call__(self, prompt: str, **fields: Any) -> Frames:
        """Makes one video; fields are those of `Request` (height, width, num_frames, seed, image, …).

        Returns:
            uint8 [F, H, W, 3].

        Raises:
            UserError: a field that is unknown or that this checkpoint cannot serve.
        """
        return self.generate(Request.of(prompt, fields)).frames

    def stream(self, prompt: str, **fields: Any) -> Generator[Frames]:
        """Makes one video block by block: uint8 [f, H, W, 3], each block as soon as it is there.

        >>> for frames in pipe.stream("a red circle moves left", seconds=10.0): ...  # doctest: +SKIP

        Args:
            fields: those of `Request`.

        Raises:
            UserError: as `stream_blocks`.
        """
        blocks = self.stream_blocks(Request.of(prompt, fields))

        def frames() -> Generator[Frames]:
            with contextlib.closing(blocks):
                for block in blocks:
                    yield block.frames

        return frames()

    def stream_blocks(self, request: Request) -> Generator[Block]:
        """Makes one video block by block. Closing the iterator ends it at any block; latents are then saved up to it.

        Block k is handed out while block k + 1 is being made, and before block k + 2 is begun.

        Args:
            request: resolved or not.

        Raises:
            UserError: at once where the checkpoint does not make videos block by block, the request does not fit, or a
                file that it names does not; on the way where memory does not suffice or a block is not finite.
        """
        request = self.resolve(request)
        inputs = read_inputs(request, self.checkpoint, allow_mismatch=self.allow_mismatch)
        return self._stream_blocks(request, inputs)

    def resolve(self, request: Request) -> Request:
        """`request.resolve` with this pipeline's checkpoint and settings."""
        return resolve(request, self.checkpoint, has_loras=self._has_loras, allow_mismatch=self.allow_mismatch)

    def output_size(self, request: Request) -> tuple[int | None, int, int]:
        """Frames (None: endless), height and width in pixels of the video that a resolved request gives."""
        _, height, width, _ = self._latent_shape(request)
        stride = self._network("vae").config.spatial_stride
        return request.num_frames, height * stride, width * stride

    def plan(self, request: Request) -> memory.MemoryPlan:
        """The memory that a resolved request will take, worked out before anything is loaded."""
        return memory.plan(
            self.checkpoint,
            {name: network.config for name, network in self._networks.items()},
            self._latent_shape(request)[:3],
            guided=request.is_guided,
            dtype=self.dtype,
            keep_encoders=self.keep_encoders,
            sequential_guidance=self.sequential_guidance,
            vae_decode=self.vae_decode,
            with_text_encoder=request.text_embeddings is None,
            on_cpu=jax.default_backend() == "cpu",
            blocks=block_sizes(request, self.checkpoint.schedule.causal, self.dtype),
        )

    def prepare(self, requests: Sequence[Request]) -> float:
        """Encodes the prompts of many requests with the text encoder loaded once. Returns the seconds it took.

        Raises:
            UserError: as `resolve`.
        """
        begin = time.perf_counter()
        clock = Clock()
        with self._precision():
            for request in requests:
                request = self.resolve(request)
                if request.text_embeddings is None:
                    self._texts_of(_prompts(request), clock)
        self._release_encoders()
        return time.perf_counter() - begin

    def generate(self, request: Request, on_step: OnStep | None = None) -> Result:
        """Makes one video.

        Args:
            request: resolved or not.
            on_step: called after each denoising step with (step from 0, number of steps, latents on the device, whose
                memory the next step takes: copy what is to be kept). Without it all steps run as one program. An
                exception from it ends the run. Where a video is made block by block, it is called after each block with
                (block from 0, number of blocks, its latents [1, f, h, w, C]).

        Raises:
            UserError: the request does not fit, the device's memory is too small, or the result is not finite.
        """
        request = self.resolve(request)
        if self.checkpoint.schedule.causal is not None:
            return self._generate_blocks(request, on_step)
        plan = self.plan(request)
        clock = Clock()
        with memory.explained(plan), self._precision():
            latents = self._latents(request, clock, on_step)
            if request.save_latents is not None:
                interchange.write_latents(request.save_latents, np.asarray(latents[0]))
            with clock("load"):
                self._network("vae").load()
            with clock("vae"):
                frames = self._vae_runner().decode(latents)
        peak = memory.peak_bytes()
        return Result(frames, np.asarray(latents[0]), request, dict(clock.seconds), plan, peak)

    def _generate_blocks(self, request: Request, on_step: OnStep | None) -> Result:
        if request.endless:
            raise UserError(
                "endless is True, and there is no end to wait for; use stream, or say seconds or num_frames"
            )
        inputs = read_inputs(request, self.checkpoint, allow_mismatch=self.allow_mismatch)
        frames, latents, seconds = collect(self._stream_blocks(request, inputs), inputs, on_step)
        return Result(frames, latents, request, seconds, self.plan(request), memory.peak_bytes())

    def _stream_blocks(self, request: Request, inputs: BlockInputs) -> Generator[Block]:
        given = None if request.text_embeddings is None else [self._texts_from_file(request)["text"]]

        def blocks() -> Generator[Block]:
            clock = Clock()
            texts = given or self._texts_of(_prompts(request), clock)
            self._release_encoders()
            if self._streamer is None:
                self._streamer = BlockStreamer(self._network("transformer"), self._vae_runner(), self.dtype)
            yield from self._streamer.stream(request, inputs, texts, clock)

        return self._each(blocks, self.plan(request))

    def _each(self, start: Callable[[], Generator[Block]], plan: memory.MemoryPlan) -> Generator[Block]:
        """The blocks of `start()`. The settings of a run hold while it works and not while its caller does."""
        with contextlib.closing(start()) as blocks:
            while True:
                with memory.explained(plan), self._precision():
                    block = next(blocks, None)
                if block is None:
                    return
                yield block

    def _latents(self, request: Request, clock: Clock, on_step: OnStep | None) -> Array:
        initial, renoise = self._noise(request)  # first, so that a file that does not fit costs no loading
        conditions = self._conditions(request, clock)
        self._release_encoders()
        with clock("load"):
            params = self._network("transformer").load()
        with clock("denoise"):
            denoiser = self._denoiser_()
            if request.denoising_step_list is not None:
                assert request.shift is not None  # resolved
                sigmas = step_distill.step_sigmas(
                    request.denoising_step_list, request.shift, warp=bool(request.warp_denoising_step)
                )
                latents = denoiser.sample_step_distill(params, conditions, initial, sigmas, renoise, on_step)
            else:
                assert request.num_inference_steps and request.shift  # resolved
                table = unipc.unipc_table(request.num_inference_steps, request.shift)
                latents = denoiser.sample_unipc(params, conditions, initial, table, on_step)
            if request.pin_first_frame and conditions.image_latents is not None:
                latents = image_condition.pin_first_frame(latents, conditions.image_latents)
            finite = bool(jnp.isfinite(latents).all())
        if not finite:
            raise UserError(
                "the latents hold NaN or infinity after denoising: the checkpoint's weights are damaged, or overflow "
                f"in {self.dtype}; convert it again, or set dtype to 'float32'"
            )
        return latents

    def _noise(self, request: Request) -> tuple[Array, Any]:
        """What to start from, and the noise to add between steps or the key that gives it."""
        shape = self._latent_shape(request)
        assert request.seed is not None  # resolved
        key = jax.random.key(request.seed)
        if request.initial_noise is None:
            return noise.initial_noise(key, (1, *shape)), key
        steps = len(request.denoising_step_list) if request.denoising_step_list is not None else None
        initial, renoise = interchange.read_noise(request.initial_noise, shape, steps)
        return jnp.asarray(initial)[None], key if renoise is None else renoise

    def _conditions(self, request: Request, clock: Clock) -> Conditions:
        if request.text_embeddings is not None:
            texts = self._texts_from_file(request)
            given = [texts["text"]]
            if request.is_guided:
                negative = texts.get("negative_text")
                if negative is None:
                    negative = self._texts_of([request.negative_prompt or ""], clock)[0]
                given.insert(0, negative)
        else:
            given = self._texts_of(_prompts(request), clock)
        text = jnp.asarray(np.stack(given))
        assert request.guidance_scale is not None  # resolved
        conditions = Conditions(text, np.float32(request.guidance_scale))
        if self.checkpoint.task != "i2v":
            return conditions
        frames, height, width = self.output_size(request)
        assert frames is not None  # only block-by-block videos are endless
        features, latents = self._images()(request.image, (frames, height, width), clock)
        return conditions._replace(image_features=features, image_latents=latents)

    def _texts_from_file(self, request: Request) -> dict[str, np.ndarray]:
        assert request.text_embeddings is not None
        transformer = self._network("transformer").config
        return interchange.read_text_embeddings(request.text_embeddings, transformer.text_len, transformer.text_dim)

    def _texts_of(self, prompts: Sequence[str], clock: Clock) -> list[np.ndarray]:
        if self._prompt_encoder is None:
            text_len = self._network("transformer").config.text_len
            self._prompt_encoder = PromptEncoder(self.checkpoint, self._network("text_encoder"), text_len)
        return self._prompt_encoder(prompts, clock)

    def _latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        frames, height, width, channels = latent_shape(request, self.checkpoint)
        if self.checkpoint.task == "i2v":
            assert request.height and request.width  # resolved
            height, width = self._images().latent_size(request.image, request.height * request.width)
        return frames, height, width, channels

    def _network(self, name: str) -> Network:
        if name not in self._networks:
            raise UserError(
                f"{self.checkpoint.path} has no {name}; convert it again with every component of the source"
            )
        return self._networks[name]

    def _denoiser_(self) -> Denoiser:
        if self._denoiser is None:
            graphdef = self._network("transformer").graphdef
            self._denoiser = Denoiser(graphdef, sequential_guidance=self.sequential_guidance)
        return self._denoiser

    def _vae_runner(self) -> VaeRunner:
        if self._vae is None:
            self._vae = VaeRunner(self._network("vae"), self.vae_decode)
        return self._vae

    def _images(self) -> ImageConditioner:
        if self._image_conditioner is None:
            patch_size = self._network("transformer").config.patch_size
            self._image_conditioner = ImageConditioner(self._network("image_encoder"), self._vae_runner(), patch_size)
        return self._image_conditioner

    def _release_encoders(self) -> None:
        if not self.keep_encoders:
            for name in ("text_encoder", "image_encoder"):
                if name in self._networks:
                    self._networks[name].release()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # On GPUs and TPUs float32 matmuls are rounded to fewer bits unless asked otherwise.
        return jax.default_matmul_precision("highest") if self.dtype == "float32" else contextlib.nullcontext()


def _prompts(request: Request) -> list[str]:
    """The texts to encode: with guidance the negative prompt first; then those that come later in the video."""
    first = [request.negative_prompt or "", request.prompt] if request.is_guided else [request.prompt]
    return [*first, *(prompt for _, prompt in request.prompt_schedule)]
