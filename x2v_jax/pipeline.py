"""Prompt or image -> frames: the one place that knows the order of the parts.

tokenizer, text encoder, (CLIP, VAE encoder) -> sampler around the transformer -> VAE decoder -> uint8 frames: see
`whole_video`. Models that make a video block by block go through `streaming` instead of a sampler.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import UInt8

from x2v_jax.checkpoint.native import reader
from x2v_jax.errors import UserError
from x2v_jax.generate import whole
from x2v_jax.generate.block_inputs import BlockInputs, read_inputs
from x2v_jax.generate.blocks import Block, collect
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.components import Components, prompts_of
from x2v_jax.generate.denoise import OnStep
from x2v_jax.generate.network import Lora
from x2v_jax.generate.programs import Program, compile_all
from x2v_jax.media import tensor_files
from x2v_jax.memory import advice, device, need, predict
from x2v_jax.request import Request
from x2v_jax.request.options import RunOptions
from x2v_jax.request.resolve import resolve

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
    memory_plan: predict.MemoryPlan
    peak_bytes: int


class Pipeline:
    """Makes videos with one checkpoint. Build it with `from_checkpoint`.

    >>> pipe = Pipeline.from_checkpoint("assets/shapes")  # doctest: +SKIP
    >>> frames = pipe("a red circle moves left", seed=1)  # doctest: +SKIP
    """

    def __init__(self, checkpoint: reader.NativeCheckpoint, *, loras: Sequence[Lora] = (), **options: Any):
        """See `from_checkpoint`."""
        self.checkpoint = checkpoint
        self.options = RunOptions.of(options)
        self._has_loras = bool(loras)
        self._parts = Components(checkpoint, self.options, loras)
        self.lora_report = self._parts.lora_report

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """A pipeline on a checkpoint that `python -m convert` made. Weights are read when they are first needed.

        Args:
            path: the checkpoint's folder.
            loras: files, or (file, strength) pairs, merged into the transformer when it is loaded.
            options: fields of `request.options.RunOptions`: dtype, vae_dtype, vae_decode, keep_encoders,
                sequential_guidance, offload, memory_limit, attention, attention_precision, linear, linear_activations
                and allow_mismatch.

        Raises:
            UserError: no such checkpoint, a LoRA that does not fit it, or an option that cannot be.
        """
        return cls(reader.open_checkpoint(path), **options)

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
        return self._stream_blocks(request, self._inputs(request))

    def resolve(self, request: Request) -> Request:
        """`request.resolve` with this pipeline's checkpoint and settings."""
        allow_mismatch = self.options.allow_mismatch
        return resolve(request, self.checkpoint, has_loras=self._has_loras, allow_mismatch=allow_mismatch)

    def output_size(self, request: Request) -> tuple[int | None, int, int]:
        """Frames (None: endless), height and width in pixels of the video that a resolved request gives."""
        return self._parts.output_size(request)

    def plan(self, request: Request) -> predict.MemoryPlan:
        """The memory that a resolved request will take, worked out before anything is loaded."""
        return self._memory(request).plan()

    def check_memory(self, request: Request) -> predict.MemoryPlan:
        """The memory that a resolved request will take, compared with what there is. Warns where it may be too little.

        Raises:
            UserError: it is beyond memory_limit, or the weights alone are more than the device has.
        """
        needs = self._memory(request)
        plan, limit = needs.plan(), self.options.memory_limit_bytes
        advice.check(plan, device.device_bytes_free(), device.device_bytes(), limit, needs.explain)
        return plan

    def prepare(self, requests: Sequence[Request]) -> float:
        """Encodes the prompts of many requests with the text encoder loaded once. Returns the seconds it took.

        Raises:
            UserError: as `resolve`.
        """
        begin = time.perf_counter()
        clock = Clock()
        with self._parts.precision():
            for request in requests:
                request = self.resolve(request)
                if request.text_embeddings is None:
                    self._parts.prompts(prompts_of(request), clock)
        self._parts.release_encoders()
        return time.perf_counter() - begin

    def warm_up(
        self, request: Request, *, watched: bool = False, on_start: Callable[[str], None] | None = None
    ) -> Iterator[tuple[str, float]]:
        """Compiles what a request's video needs, with nothing loaded and nothing made: (name, seconds) of each program.

        What is compiled lies in jax's persistent cache afterwards, if there is one (jax_compilation_cache_dir), and the
        video then starts without compiling.

        Args:
            request: resolved or not.
            watched: for `generate` with an on_step, where each step is a program of its own.
            on_start: called with each program's name before it is compiled.

        Raises:
            UserError: the request does not fit.
        """
        request = self.resolve(request)
        with self._parts.precision():
            yield from compile_all(self._programs(request, watched), on_start)

    def _programs(self, request: Request, watched: bool) -> Iterator[Program]:
        if self.checkpoint.schedule.causal is None:
            yield from whole.programs(self._parts, request, watched=watched)
            return
        if request.text_embeddings is None:
            yield from self._parts.prompts.programs()
        yield from self._parts.streamer.programs(request, self._inputs(request))

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
        plan = self.check_memory(request)
        clock, parts = Clock(), self._parts
        with self._explained(request), parts.precision():
            latents = whole.make_latents(parts, request, clock, on_step)
            if request.save_latents is not None:
                tensor_files.write_latents(request.save_latents, np.asarray(latents)[0])
            with clock("load"):
                parts.network("vae").load()
            with clock("vae"):
                frames = parts.vae.decode(latents)
        return Result(frames, np.asarray(latents)[0], request, dict(clock.seconds), plan, device.peak_bytes())

    def _generate_blocks(self, request: Request, on_step: OnStep | None) -> Result:
        if request.endless:
            raise UserError(
                "endless is True, and there is no end to wait for; use stream, or say seconds or num_frames"
            )
        inputs = self._inputs(request)
        frames, latents, seconds = collect(self._stream_blocks(request, inputs), inputs, on_step)
        return Result(frames, latents, request, seconds, self.plan(request), device.peak_bytes())

    def _stream_blocks(self, request: Request, inputs: BlockInputs) -> Generator[Block]:
        def blocks() -> Generator[Block]:
            clock = Clock()
            texts = self._parts.texts(request, clock)
            self._parts.release_encoders()
            yield from self._parts.streamer.stream(request, inputs, texts, clock)

        self.check_memory(request)
        return self._each(blocks, request)

    def _each(self, start: Callable[[], Generator[Block]], request: Request) -> Generator[Block]:
        """The blocks of `start()`. The settings of a run hold while it works and not while its caller does."""
        with contextlib.closing(start()) as blocks:
            while True:
                with self._explained(request), self._parts.precision():
                    block = next(blocks, None)
                if block is None:
                    return
                yield block

    def _inputs(self, request: Request) -> BlockInputs:
        return read_inputs(request, self.checkpoint, allow_mismatch=self.options.allow_mismatch)

    def _explained(self, request: Request) -> contextlib.AbstractContextManager[None]:
        return advice.explained(lambda: self._memory(request).explain(device.device_bytes()))

    def _memory(self, request: Request) -> need.MemoryNeed:
        return need.MemoryNeed(
            self.checkpoint,
            {name: network.config for name, network in self._parts.networks.items()},
            self._parts.latent_shape(request)[:3],
            request,
            self.options,
            on_cpu=jax.default_backend() == "cpu",
            available=self.options.memory_limit_bytes or device.device_bytes(),
        )
