"""The networks of a checkpoint and what runs them, each made when it is first needed."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from x2v_jax.checkpoint.lora.arguments import Lora
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.blocks import BlockStreamer
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.denoise import Denoiser
from x2v_jax.generate.image import ImageConditioner
from x2v_jax.generate.network import Network, describe_networks
from x2v_jax.generate.text import PromptEncoder
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.media import tensor_files
from x2v_jax.ops import support
from x2v_jax.request import Request
from x2v_jax.request.options import RunOptions
from x2v_jax.request.resolve import latent_shape


class Components:
    """What one checkpoint's videos are made with.

    Args:
        loras: merged into the transformer when it is loaded.

    Raises:
        UserError: the checkpoint is damaged, a LoRA does not fit it, or the device cannot run what the options name.
    """

    def __init__(self, checkpoint: NativeCheckpoint, options: RunOptions, loras: Sequence[Lora]):
        self.checkpoint = checkpoint
        self.options = options
        kinds = {checkpoint.quantization(name) for name in checkpoint.components if name != "tokenizer"} - {None}
        ops = options.ops
        if ops != type(ops)() or kinds:  # else there is nothing that a device could lack, and none has to be started
            ops = support.supported(ops, [kind for kind in kinds if kind], support.first_device())
        self.networks, self.lora_report = describe_networks(
            checkpoint, loras, dtype=options.dtype, vae_dtype=options.vae_dtype, ops=ops, offload=options.offload
        )
        self._denoiser: Denoiser | None = None
        self._streamer: BlockStreamer | None = None
        self._vae: VaeRunner | None = None
        self._prompts: PromptEncoder | None = None
        self._images: ImageConditioner | None = None

    def network(self, name: str) -> Network:
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
            self._denoiser = Denoiser(graphdef, sequential_guidance=self.options.sequential_guidance)
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
            patch_size = self.network("transformer").config.patch_size
            self._images = ImageConditioner(self.network("image_encoder"), self.vae, patch_size)
        return self._images

    def texts(self, request: Request, clock: Clock) -> list[np.ndarray]:
        """Embeddings [L, D] of a resolved request's texts: with guidance the negative prompt first; then the prompt,
        and those that come later in the video.

        Raises:
            UserError: the file of embeddings or the tokenizer does not fit.
        """
        if request.text_embeddings is None:
            return self.prompts(prompts_of(request), clock)
        transformer = self.network("transformer").config
        given = tensor_files.read_text_embeddings(request.text_embeddings, transformer.text_len, transformer.text_dim)
        if not request.is_guided:
            return [given["text"]]
        negative = given.get("negative_text")
        if negative is None:
            negative = self.prompts([request.negative_prompt or ""], clock)[0]
        return [negative, given["text"]]

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """[frames, height, width, channels] of the latents of a resolved request; see `request.latent_shape`."""
        frames, height, width, channels = latent_shape(request, self.checkpoint)
        if self.checkpoint.task == "i2v":
            assert request.height and request.width  # resolved
            height, width = self.images.latent_size(request.image, request.height * request.width)
        return frames, height, width, channels

    def output_size(self, request: Request) -> tuple[int | None, int, int]:
        """Frames (None: endless), height and width in pixels of the video that a resolved request gives."""
        _, height, width, _ = self.latent_shape(request)
        stride = self.network("vae").config.spatial_stride
        return request.num_frames, height * stride, width * stride

    def release_encoders(self) -> None:
        """Gives back what text and image encoder take of the device, unless they are to be kept."""
        if not self.options.keep_encoders:
            for name in ("text_encoder", "image_encoder"):
                if name in self.networks:
                    self.networks[name].release()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
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


def prompts_of(request: Request) -> list[str]:
    """The texts to encode; see `Components.texts`."""
    first = [request.negative_prompt or "", request.prompt] if request.is_guided else [request.prompt]
    return [*first, *(prompt for _, prompt in request.prompt_schedule)]
