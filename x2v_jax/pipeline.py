"""Prompt or image -> frames: the one place that knows the order of the stages.

Videos whose frames are made all together: `Pipeline.generate`. Models that make a video block by block go through
`generate.blocks` instead of a sampler.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

import jax
import numpy as np
from jaxtyping import Array, Float

from x2v_jax.checkpoint.lora.arguments import distilling
from x2v_jax.checkpoint.native import reader
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.generate import whole
from x2v_jax.generate.blocks import Block, collect, in_context
from x2v_jax.generate.call import PipelineFields, StartOptions, describe, output, split, watcher, with_display
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.components import Components
from x2v_jax.generate.denoise import Conditions, NotFinite, OnStep, Start
from x2v_jax.generate.programs import Program, compile_all, start_cache
from x2v_jax.generate.progress import Progress, expect, shown
from x2v_jax.generate.result import Frames, Result
from x2v_jax.generate.text import texts
from x2v_jax.media import tensor_files
from x2v_jax.memory import device, need, predict
from x2v_jax.request.calls import Call, CallFields, CallOptions
from x2v_jax.request.diffusers_names import refuse_methods
from x2v_jax.request.inputs import BlockInputs, InputFiles
from x2v_jax.request.options import RunOptions, show_fields
from x2v_jax.request.request import Request, RequestFields
from x2v_jax.request.resolve import ResolvedRequest, WholePlan, resolve

if TYPE_CHECKING:
    import PIL.Image

    AnyRequest = Request | ResolvedRequest
else:
    AnyRequest = object  # so that what is none is told in a sentence


class Pipeline:
    """Makes videos with one checkpoint. Build it with `from_checkpoint`.

    >>> pipe = Pipeline.from_checkpoint("assets/shapes_t2v_4step")
    >>> pipe("a red circle moves left", num_frames=1, seed=1).shape
    (1, 64, 64, 3)
    """

    def __init__(self, checkpoint: reader.NativeCheckpoint, **options: Unpack[PipelineFields]):
        """See `from_checkpoint`."""
        start, run = split(options)
        pairs = start.lora_pairs()
        start_cache(start.cache())
        self._shows = bool(start.progress)
        self.checkpoint = checkpoint
        self.options = RunOptions.of(run)
        self._loras = pairs
        self._files = InputFiles()
        self._components = Components(checkpoint, self.options, pairs)
        self.lora_report = self._components.lora_report

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], **options: Unpack[PipelineFields]) -> Self:
        """A pipeline on a checkpoint that `python -m convert` made. Weights are read when they are first needed.

        Args:
            path: the checkpoint's folder.
            options: fields of `generate.call.StartOptions`, LoRAs above all, and of `request.options.RunOptions`.

        Raises:
            UserError: no such checkpoint, a LoRA that does not fit it, or an option that cannot be.
        """
        return cls(reader.open_checkpoint(path), **options)

    def __repr__(self) -> str:
        return describe(self.checkpoint, self.options, self._loras)

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *, output_type: Literal["np"] = "np", **fields: Unpack[CallFields]
    ) -> np.ndarray: ...
    @overload
    def __call__(
        self, prompt: str | Sequence[str], *, output_type: Literal["pil"], **fields: Unpack[CallFields]
    ) -> "list[PIL.Image.Image] | list[list[PIL.Image.Image]]": ...
    def __call__(self, prompt: object, **fields: object) -> object:
        """Makes a video, or several of a size.

        Args:
            prompt: one, or a list.
            fields: those of `Request`: height, width, num_frames, seed, image and so on; and those of
                `request.calls.CallOptions`.

        Returns:
            uint8 [F, H, W, 3]; [N, F, H, W, 3] of a list of prompts, or of num_videos_per_prompt above 1. As PIL images
            a list, or a list of lists.

        Raises:
            UserError: a field that is unknown or that this checkpoint cannot serve.
        """
        call = Call.of(prompt, fields)
        requests = [self.resolve(request) for request in call.requests]
        if len(requests) > 1:
            self.prepare(requests)
        shows = self._shows if call.options.progress is None else bool(call.options.progress)
        videos = []
        for number, request in enumerate(requests, 1):
            with shown(shows, f"{number}/{len(requests)} " if len(requests) > 1 else "") as display:
                on_step = watcher(self, request.plan.sigmas, call.options)
                videos.append(self.generate(request, on_step, progress=display or False).frames)
        return output(videos, call)

    def generate(
        self, request: AnyRequest, on_step: OnStep | None = None, *, progress: bool | Progress | None = None
    ) -> Result:
        """Makes one video.

        Args:
            on_step: called after each denoising step with (step from 0, number of steps, latents on the device, whose
                memory the next step takes: copy what is to be kept). An exception from it ends the run. Where a video
                is made block by block, it is called after each block with (block from 0, number of blocks, its latents
                [1, f, h, w, C]).
            progress: a display to use, or whether there is one; None: as the pipeline was made.

        Raises:
            UserError: the request does not fit, the device's memory is too small, or the result is not finite.
        """
        request = self.resolve(request)
        with shown(self._shows if progress is None else progress) as display, self._entered(request):
            clock, on_step = Clock(display and display.begin), with_display(on_step, display)
            if display is not None:
                expect(display, request, self._components.networks)
            if isinstance(request.plan, RolloutPlan):
                return self._generate_blocks(request, request.plan, on_step)
            memory = self.check_memory(request)
            shape, denoiser = request.latent_shape, self._components.denoiser
            # First, so that a file of noise that does not fit costs no loading.
            noise = whole.noise(denoiser, request.seed, shape, request.plan, request.inputs)
            conditions = self._conditions(request, clock)
            latents = self._denoised(request, request.plan, noise, conditions, clock, on_step)
            values = np.asarray(latents)[0]
            if request.save_latents:
                tensor_files.write_latents(request.save_latents, values)
            frames = self._components.vae.timed(latents, clock)
        return Result(frames, values, request, dict(clock.seconds), memory, device.peak_bytes())

    def stream(self, prompt: str, **fields: Unpack[RequestFields]) -> Generator[Frames]:
        """Makes one video block by block: uint8 [f, H, W, 3], each block as soon as it is there.

        >>> pipe = Pipeline.from_checkpoint("assets/shapes_causal")
        >>> [frames.shape for frames in pipe.stream("a red circle moves left", num_frames=9)]
        [(9, 64, 64, 3)]

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

    def stream_blocks(self, request: Request | ResolvedRequest) -> Generator[Block]:
        """Makes one video block by block. Closing the iterator ends it at any block; latents are then saved up to it.

        Block k is handed out while block k + 1 is being made, and before block k + 2 is begun.

        Raises:
            UserError: at once where the checkpoint does not make videos block by block, the request does not fit, or a
                file that it names does not; on the way where memory does not suffice or a block is not finite.
        """
        request = self.resolve(request)
        if not isinstance(request.plan, RolloutPlan):
            raise UserError(f"{self.checkpoint.path} does not make videos block by block; use a causal checkpoint")
        return self._stream_blocks(request, request.block_inputs(request.plan))

    def resolve(self, request: AnyRequest) -> ResolvedRequest:
        """What is asked -> what is decided, by this pipeline's checkpoint and settings. What is decided stays."""
        if isinstance(request, ResolvedRequest):
            return request
        return resolve(
            request,
            self.checkpoint,
            files=self._files,
            has_loras=bool(self._loras),
            distilled_by=distilling(self._loras),
            allow_mismatch=self.options.allow_mismatch,
        )

    def output_size(self, request: Request | ResolvedRequest) -> tuple[int | None, int, int]:
        """Frames (None: endless), height and width in pixels of the video that a request gives."""
        request = self.resolve(request)
        stride = self._components.network("vae").config.spatial_stride
        _, height, width, _ = request.latent_shape
        return request.num_frames or None, height * stride, width * stride

    def plan(self, request: Request | ResolvedRequest) -> predict.MemoryPlan:
        """The memory that a request will take, worked out before anything is loaded."""
        return self._memory(self.resolve(request)).plan()

    def check_memory(self, request: Request | ResolvedRequest) -> predict.MemoryPlan:
        """The memory that a request will take, compared with what there is. Warns where it may be too little.

        Raises:
            UserError: it is beyond memory_limit, or the weights alone are more than the device has.
        """
        needs = self._memory(self.resolve(request))
        plan, limit = needs.plan(), self.options.memory_limit_bytes
        need.check(plan, device.device_bytes_free(), device.device_bytes(), limit, needs.explain)
        return plan

    def prepare(self, requests: Sequence[Request | ResolvedRequest]) -> float:
        """Encodes the prompts of many requests with the text encoder loaded once. Returns the seconds it took.

        Raises:
            UserError: as `resolve`.
        """
        begin = time.perf_counter()
        clock = Clock()
        with self._components.precision():
            for request in map(self.resolve, requests):
                if not request.inputs.replaces_text_encoder:
                    self._components.prompts(request.prompts, clock)
        self._components.release_encoders()
        return time.perf_counter() - begin

    def warm_up(
        self,
        request: Request | ResolvedRequest,
        *,
        watched: bool = False,
        on_start: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Compiles what a request's video needs, with nothing loaded and nothing made: (name, seconds) of each program.

        What is compiled lies in jax's persistent cache afterwards, if there is one (jax_compilation_cache_dir), and the
        video then starts without compiling.

        Args:
            watched: for `generate` with an on_step, where each step is a program of its own.
            on_start: called with each program's name before it is compiled.

        Raises:
            UserError: the request does not fit.
        """
        request = self.resolve(request)
        with self._components.precision():
            yield from compile_all(self._programs(request, watched), on_start)

    def _programs(self, request: ResolvedRequest, watched: bool) -> Iterator[Program]:
        if not request.inputs.replaces_text_encoder:
            yield from self._components.prompts.programs()
        if isinstance(request.plan, WholePlan):
            yield from whole.programs(self._components, request, request.plan, watched=watched)
        else:
            yield from self._components.streamer.programs(request, request.block_inputs(request.plan))

    def _conditions(self, request: ResolvedRequest, clock: Clock) -> Conditions:
        text = jax.device_put(np.stack(texts(request, lambda: self._components.prompts, clock)))
        conditions = Conditions(text, np.float32(request.guidance_scale))
        if self.checkpoint.task == "i2v":
            _, height, width = self.output_size(request)
            size = request.num_frames, height, width
            features, latents = self._components.images(request.inputs.picture(), size, clock)
            conditions = conditions._replace(image_features=features, image_latents=latents)
        self._components.release_encoders()
        return conditions

    def _denoised(
        self,
        request: ResolvedRequest,
        plan: WholePlan,
        noise: tuple[Start, whole.Renoise],
        conditions: Conditions,
        clock: Clock,
        on_step: OnStep | None,
    ) -> Float[Array, "1 f h w c"]:
        with clock("load"):
            params = self._components.network("transformer").load()
        with clock("denoise"):
            try:
                latents = self._components.denoiser.sample(params, conditions, *noise, whole.schedule(plan), on_step)
            except NotFinite as error:
                raise self._components.not_finite(f"after {error}") from None
            if request.pin_first_frame and conditions.image_latents is not None:
                latents = whole.pin_first_frame(latents, conditions.image_latents)
        return latents

    def _generate_blocks(self, request: ResolvedRequest, plan: RolloutPlan, on_step: OnStep | None) -> Result:
        if request.endless:
            raise UserError(
                "endless is True, and there is no end to wait for; use stream, or say seconds or num_frames"
            )
        inputs = request.block_inputs(plan)
        frames, latents, seconds = collect(self._stream_blocks(request, inputs), inputs, on_step)
        return Result(frames, latents, request, seconds, self.plan(request), device.peak_bytes())

    def _stream_blocks(self, request: ResolvedRequest, inputs: BlockInputs) -> Generator[Block]:
        def blocks() -> Generator[Block]:
            clock = Clock()
            found = texts(request, lambda: self._components.prompts, clock)
            self._components.release_encoders()
            yield from self._components.streamer.stream(request, inputs, found, clock)

        self.check_memory(request)
        return in_context(blocks, lambda: self._entered(request))

    @contextlib.contextmanager
    def _entered(self, request: ResolvedRequest) -> Iterator[None]:
        """The settings of a run, and a sentence where memory runs out."""
        explain = lambda: self._memory(request).explain(device.device_bytes())  # noqa: E731
        with need.explained(explain), self._components.precision():
            yield

    def _memory(self, request: ResolvedRequest) -> need.MemoryNeed:
        blocks = None
        if isinstance(request.plan, RolloutPlan):
            kv_cache = request.kv_cache or self.options.dtype
            blocks = need.block_sizes(request.plan, kv_cache, request.inputs.encoded_frames_from)
        return need.MemoryNeed(
            self.checkpoint,
            {name: network.config for name, network in self._components.networks.items()},
            request.latent_shape[:3],
            request.uses_guidance,
            not request.inputs.replaces_text_encoder,
            blocks,
            self.options,
            on_cpu=jax.default_backend() == "cpu",
            available=self.options.memory_limit_bytes or device.device_bytes(),
        )


show_fields(Pipeline.__init__, StartOptions, RunOptions)
show_fields(Pipeline.from_checkpoint.__func__, StartOptions, RunOptions)  # type: ignore[attr-defined]
show_fields(Pipeline.__call__, Request, CallOptions)
show_fields(Pipeline.stream, Request)
refuse_methods(Pipeline)
