"""The networks of a checkpoint and what runs them, each made when it is first needed."""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.blocks import BlockStreamer
from x2v_jax.generate.denoise import Denoiser
from x2v_jax.generate.image import ImageConditioner
from x2v_jax.generate.network import Network, describe_networks
from x2v_jax.generate.text import PromptEncoder
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.models.config import ClipConfig, Config, Umt5Config, VaeConfig, WanConfig
from x2v_jax.ops import devices
from x2v_jax.request.options import RunOptions


class Components:
    """What one checkpoint's videos are made with.

    Args:
        loras: files and strengths, merged into the transformer when it is loaded.

    Raises:
        UserError: the checkpoint is damaged, a LoRA does not fit it, or the device cannot run what the options name.
    """

    def __init__(self, checkpoint: NativeCheckpoint, options: RunOptions, loras: Sequence[tuple[str, float]]):
        self.checkpoint = checkpoint
        self.options = options
        kinds = {checkpoint.quantization(name) for name in checkpoint.components if name != "tokenizer"} - {None}
        ops = options.ops
        if ops != type(ops)() or kinds:  # else there is nothing that a device could lack, and none has to be started
            ops = devices.supported(ops, [kind for kind in kinds if kind], devices.first_device())
        self.networks, self.lora_report = describe_networks(
            checkpoint,
            loras,
            dtype=options.dtype,
            vae_dtype=options.vae_dtype,
            ops=ops,
            offload=options.offload,
            allow_partial=options.allow_partial,
        )
        self._denoiser: Denoiser | None = None
        self._streamer: BlockStreamer | None = None
        self._vae: VaeRunner | None = None
        self._prompts: PromptEncoder | None = None
        self._images: ImageConditioner | None = None

    @overload
    def network(self, name: Literal["transformer"]) -> Network[WanConfig]: ...
    @overload
    def network(self, name: Literal["vae"]) -> Network[VaeConfig]: ...
    @overload
    def network(self, name: Literal["text_encoder"]) -> Network[Umt5Config]: ...
    @overload
    def network(self, name: Literal["image_encoder"]) -> Network[ClipConfig]: ...
    @overload
    def network(self, name: str) -> Network[Config]: ...
    def network(self, name: str) -> Network[Any]:
        """
        Raises:
            UserError: the checkpoint lacks it.
        """
        if name not in self.networks:
            raise UserError(
                f"{self.checkpoint.path} has no {name}; convert it again with every component of the source"
            )
        return self.networks[name]

    @property
    def denoiser(self) -> Denoiser:
        if self._denoiser is None:
            graphdef = self.network("transformer").graphdef
            self._denoiser = Denoiser(
                graphdef, sequential_guidance=self.options.sequential_guidance, loop=self.options.loop
            )
        return self._denoiser

    @property
    def streamer(self) -> BlockStreamer:
        if self._streamer is None:
            self._streamer = BlockStreamer(self.network("transformer"), self.vae, self.not_finite)
        return self._streamer

    @property
    def vae(self) -> VaeRunner:
        if self._vae is None:
            method: Any = self.options.vae_decode
            self._vae = VaeRunner(self.network("vae"), method, self.options.memory_limit_bytes)
        return self._vae

    @property
    def prompts(self) -> PromptEncoder:
        if self._prompts is None:
            text_len = self.network("transformer").config.text_len
            self._prompts = PromptEncoder(self.checkpoint, self.network("text_encoder"), text_len)
        return self._prompts

    @property
    def images(self) -> ImageConditioner:
        if self._images is None:
            self._images = ImageConditioner(self.network("image_encoder"), self.vae)
        return self._images

    def release_encoders(self) -> None:
        """Gives back what text and image encoder take of the device, unless they are to be kept."""
        if not self.options.keep_encoders:
            for name in ("text_encoder", "image_encoder"):
                if name in self.networks:
                    self.networks[name].release()

    def precision(self) -> contextlib.AbstractContextManager[object]:
        # On GPUs and TPUs float32 matmuls are rounded to fewer bits unless asked otherwise.
        is_exact = self.options.dtype == "float32"
        return jax.default_matmul_precision("highest") if is_exact else contextlib.nullcontext()

    def not_finite(self, where: str) -> UserError:
        """What to say where latents are NaN or infinite. where: "after step 2 of 4" or "of block 0"."""
        options, fixes = self.options, []
        quantization = self.network("transformer").quantization
        if options.attention_precision != "full":
            fixes.append(f"attention_precision to 'full' (it is {options.attention_precision!r})")
        if quantization and options.linear_activations == "8bit":
            fixes.append("linear_activations to '16bit'")
        if options.dtype != "float32":
            fixes.append("dtype to 'float32'")
        advice = "convert it again"
        if quantization:
            advice += f" (without --quantize: its weights are {quantization})"
        if fixes:
            advice += f", or set {' or '.join(fixes)}"
        return UserError(
            f"the latents {where} hold NaN or infinity: the checkpoint's weights are damaged, or "
            f"overflow in {options.dtype}; {advice}"
        )
