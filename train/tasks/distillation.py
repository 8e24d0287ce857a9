"""What all distillation tasks share: the networks, the student's schedule, evaluation and export."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from x2v_jax.checkpoint.lora.write import DIALECTS, write_lora
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint, save_native
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import UserError
from x2v_jax.generate.network import Network
from x2v_jax.models.config import CausalSchedule, Schedule, VaeConfig, WanConfig
from x2v_jax.models.functional import Params, flatten
from x2v_jax.models.networks import abstract_network

from ..checkpoints import relative_reference
from ..data.open_source import open_source
from ..data.sources import SHAPES, Batch, Conditions, Source
from ..evaluation import evaluate_students
from ..lora import LoraConfig, apply_lora, init_lora
from ..rollouts import BlockByBlock, Rollout, WholeVideo


class Distillation:
    """Base of the tasks that make a student of few steps from a teacher of many.

    Fields of the config; `x2v_jax.config.distillation` has their defaults:

    teacher: a native checkpoint.
    student: the native checkpoint that the student starts from; empty: the teacher.
    student_schedule: how the student is sampled.
        denoising_step_list: its timesteps, falling from at most 1000.
        shift: moves the noise levels towards noise.
        warp_denoising_step: whether the list is still to be shifted.
    causal: for a student that works block by block; empty: it makes whole videos.
        block: latent frames of a block.
        context_timestep: the timestep at which later blocks see a finished one.
        mode: what the student does past its window: "full", "sliding" or "fragments".
    data: what is learnt from; see `train.data.open_source`.
    size: height and width in pixels, and num_frames, of the videos.
    lora: rank, alpha and targets of the pairs that are trained; empty: all weights are.
    dtype: of the student's matmuls. Its trained weights are float32.
    teacher_dtype: of the teacher's weights and matmuls.
    remat: what gradients keep of a block of the network: "none" (all of it), "attention" or "block" (its input alone).
    export_dtype: of the weights that are written.
    """

    roles: Sequence[str] = ("generator",)
    averaged = "generator"
    needs_latents = False
    variant = "distill"

    def __init__(self, config: Any):
        self.config = config
        self.teacher = open_checkpoint(config.teacher)
        self.student = open_checkpoint(config.student) if config.student else self.teacher
        self.model_config = _same_kind(self.teacher, self.student)
        self.vae_config: VaeConfig = self.teacher.config("vae")
        self.shape = latent_shape(config.size, self.vae_config, self.model_config)
        schedule = config.student_schedule
        self.sigmas = tuple(
            float(s)
            for s in step_sigmas(schedule.denoising_step_list, schedule.shift, warp=bool(schedule.warp_denoising_step))
        )
        self.is_causal = bool(config.causal)
        self._check_causal()
        self.graph = self._graph(self.model_config, config.dtype, config.remat)
        self.rollout = self._make_rollout(self.graph)
        self.lora = LoraConfig(**config.lora.to_dict()) if config.lora else None
        self._source: Source | None = None

    @functools.cached_property
    def frozen(self) -> Any:
        """Networks that are used and not trained; read when the run begins."""
        return {} if self.lora is None else {"student": self.load(self.student, self.config.dtype)}

    def init(self, key: jax.Array) -> dict[str, Params]:
        """The student's weights, or with config.lora the pairs beside them."""
        if self.lora is None:
            return {"generator": self.load(self.student, "float32")}
        shapes = abstract_network(self.model_config)[1]
        return {"generator": init_lora(shapes, self.lora, key)}

    def transformer(self, params: Params, frozen: Any) -> Params:
        """The student's whole weights from what is trained of them."""
        return params if self.lora is None else apply_lora(frozen["student"], params, self.lora.scale)

    @property
    def source(self) -> Source:
        """Opened when it is first needed: its caches are kept in the run directory."""
        if self._source is None:
            directory = pathlib.Path(self.config.run_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self._source = open_source(
                self.config.data, self.teacher, directory, self.shape, with_latents=self.needs_latents
            )
        return self._source

    def start_phase(self, params: Params, phase: Any) -> Params:
        return params

    def updates(self, step: int) -> Sequence[str]:
        return self.roles

    def schedule(self) -> Schedule:
        """How the student is sampled."""
        student, size = self.config.student_schedule, self.config.size
        causal = None
        if self.is_causal:
            causal = CausalSchedule(
                block=self.config.causal.block,
                window=self.shape[0],
                mode=self.config.causal.mode,
                context_timestep=self.config.causal.context_timestep,
            )
        return Schedule(
            sampler="step_distill",
            num_inference_steps=len(student.denoising_step_list),
            shift=student.shift,
            guidance_scale=1.0,
            denoising_step_list=tuple(student.denoising_step_list),
            warp_denoising_step=student.warp_denoising_step,
            height=size.height,
            width=size.width,
            num_frames=size.num_frames,
            fps=self.teacher.schedule.fps,
            causal=causal,
        )

    def export(self, params: Params, path: pathlib.Path, *, overwrite: bool = False) -> None:
        """The student's transformer, with a LoRA merged in; everything else is shared with the teacher by reference.

        A LoRA is written beside it, too, in the names that LightX2V, ComfyUI and diffusers look for.
        """
        pairs, params = params, self.transformer(params, self.frozen)
        dtype = jnp.dtype(self.config.export_dtype)
        weights = {name: np.asarray(leaf.astype(dtype)) for name, leaf in flatten(params).items()}
        shared = [name for name in self.teacher.components if name != "transformer"]
        save_native(
            path,
            task=self.model_config.model_type,
            variant=self.variant,
            schedule=self.schedule(),
            components={"transformer": (self.model_config, weights)},
            references={name: relative_reference(self.teacher.path, path) for name in shared},
            overwrite=overwrite,
        )
        if self.lora is not None:
            for dialect in DIALECTS:
                file = path / f"lora_{dialect}.safetensors"
                write_lora(file, pairs, self.model_config, alpha=self.lora.alpha, dialect=dialect)

    def evaluate(self, params: Params, step: int, directory: pathlib.Path) -> dict[str, float]:
        """Videos of fixed prompts and seeds as mp4 and PNG; on Moving Shapes also how many are right."""
        return evaluate_students(self, self.transformer(params, self.frozen), step, directory)

    def sample(self, params: Params, conditions: Conditions, keys: jax.Array) -> jax.Array:
        """Finished latents [B, f, h, w, C] as inference makes them."""
        batch = Batch(conditions, np.arange(len(keys), dtype=np.int32))
        return self._sampler(params, batch, keys, jnp.int32(len(self.sigmas) - 1))

    @functools.cached_property
    def vae(self) -> Network[VaeConfig]:
        """The teacher's VAE, in float32."""
        return Network.of(self.teacher, "vae", dtype="float32", quantized=False)

    @functools.cached_property
    def decode(self) -> Any:
        """latents [B, f, h, w, C] -> video [B, F, H, W, 3] in [-1, 1]."""
        decode = self.vae.jit(lambda vae, latents: vae.decode(latents))
        return lambda latents: decode(self.vae.load(), latents)

    @property
    def on_shapes(self) -> bool:
        return self.config.data.prompts == SHAPES

    def load(self, checkpoint: NativeCheckpoint, dtype: str) -> Params:
        """A checkpoint's transformer, laid out over the devices of the run as it is read."""
        return checkpoint.load("transformer", dtype)

    def _graph(self, config: WanConfig, dtype: str, remat: str = "none") -> nnx.GraphDef:
        return abstract_network(config, dtype=jnp.dtype(dtype), remat=remat)[0]

    def _make_rollout(self, graph: nnx.GraphDef) -> Rollout:
        rollout: Rollout
        if self.is_causal:
            causal = self.config.causal
            rollout = BlockByBlock(
                graph,
                self.model_config,
                self.shape,
                self.sigmas,
                block=causal.block,
                context_timestep=causal.context_timestep,
                cache_dtype=jnp.dtype(self.config.dtype),
            )
        else:
            rollout = WholeVideo(graph, self.shape, self.sigmas)
        self._sampler = jax.jit(rollout.videos)
        return rollout

    def _check_causal(self) -> None:
        if not self.is_causal:
            return
        if self.model_config.model_type != "t2v":
            raise UserError(
                "a causal student is text-to-video; give a text-to-video teacher, or leave config.causal empty"
            )
        if self.shape[0] % self.config.causal.block:
            raise UserError(
                f"size.num_frames {self.config.size.num_frames} is {self.shape[0]} latent frames, which are not whole "
                f"blocks of {self.config.causal.block} (config.causal.block)"
            )


def latent_shape(size: Any, vae: VaeConfig, model: WanConfig) -> tuple[int, int, int, int]:
    """[f, h, w, C] of the latents of config.size.

    Raises:
        UserError: a size that the networks cannot make.
    """
    if size.num_frames < 1 or (size.num_frames - 1) % vae.temporal_stride:
        near = round((size.num_frames - 1) / vae.temporal_stride) * vae.temporal_stride + 1
        raise UserError(
            f"size.num_frames is {size.num_frames}; give {vae.temporal_stride}n + 1, such as {max(1, near)}"
        )
    for name, patch in (("height", model.patch_size[1]), ("width", model.patch_size[2])):
        step, value = vae.spatial_stride * patch, size[name]
        if value < step or value % step:
            raise UserError(
                f"size.{name} is {value}; give a multiple of {step}, such as {max(step, round(value / step) * step)}"
            )
    frames = (size.num_frames - 1) // vae.temporal_stride + 1
    return frames, size.height // vae.spatial_stride, size.width // vae.spatial_stride, vae.z_dim


def _same_kind(teacher: NativeCheckpoint, student: NativeCheckpoint) -> WanConfig:
    """The student's sizes, if the teacher takes the same latents, text and image."""
    ours, theirs = student.config("transformer"), teacher.config("transformer")
    for field in ("model_type", "in_dim", "out_dim", "text_dim", "text_len", "patch_size", "clip_dim"):
        if getattr(ours, field) != getattr(theirs, field):
            raise UserError(
                f"the student {student.path} has {field} {getattr(ours, field)} and the teacher {teacher.path} "
                f"{getattr(theirs, field)}; give a teacher that fits, with --config.teacher"
            )
    return ours
