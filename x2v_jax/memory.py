"""How much memory a run takes: predicted from sizes before anything is loaded, read afterwards.

Weights are counted exactly. Activations are estimated with factors that were fitted to what XLA reports for compiled
programs (`tests/test_memory.py` holds the prediction against such reports); they are a guide, not a promise.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from x2v_jax.errors import UserError
from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.vae_tiling import TILE

DTYPES = ("bfloat16", "float32")
DECODE_METHODS = ("auto", "whole", "stream", "tiled")
# The VAE works in pieces where the whole would take more activations than this.
WHOLE_LIMIT = 1 << 30
# Pictures (see _picture_bytes) per frame that the VAE holds at once. In pieces it also holds the convolutions' caches,
# of the piece before and of the next.
_WHOLE_PICTURES, _PIECE_PICTURES = 6, 20
# Attention without a fused kernel makes scores in chunks of at most this size.
_MAX_SCORES = 1 << 28
# What the process takes on a CPU without any model: Python, jax, compiling.
_PROCESS = 400 << 20

# Of the transformer: matmuls whose inputs must keep float32 (time, patches, output), so their weights do too.
_EXACT = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = {np.dtype(t) for t in (np.float16, np.float32, np.float64)} | {_BFLOAT16}


class Weights(Protocol):
    """What `plan` asks of a checkpoint; `checkpoint.store.NativeCheckpoint` answers it."""

    def has(self, component: str) -> bool: ...
    def tensors(self, component: str) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes on the device.

    weights: by component, as loaded.
    phases: weights and activations together, of "text", "image", "denoise" and "vae".
    kv_cache: of block-by-block models, what the phases "denoise" and "vae" hold of it.
    """

    weights: dict[str, int]
    phases: dict[str, int]
    kv_cache: int = 0

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What the memory of a block-by-block video depends on; its length is not among it. Counts are of latent frames.

    block, window: as in `rollout_plan.RolloutPlan`.
    kv_cache: "bfloat16", "float32" or "int8".
    encoded: given frames that the VAE encodes first, of an image or a video.
    """

    block: int
    window: int
    kv_cache: str
    encoded: int = 0


def device_dtype(component: str, name: str, stored: Any, dtype: str) -> np.dtype:
    """The type in which a weight is kept on the device.

    Args:
        component, name: of the weight.
        stored: its type in the file.
        dtype: "bfloat16" or "float32", of the run.

    Raises:
        UserError: the file holds something that is not a plain float, such as 8-bit weights.
    """
    stored = np.dtype(stored)
    if stored not in _FLOATS:
        raise UserError(
            f"{component}: {name} is stored as {stored.name}, which this pipeline does not run; convert the checkpoint "
            "from its bfloat16 or float32 weights"
        )
    if dtype == "float32" or component == "vae":
        return np.dtype(np.float32)
    exact = component == "transformer" and name.startswith(_EXACT)
    is_matrix = name.endswith(".kernel") or name == "token_embedding.embedding"
    return _BFLOAT16 if is_matrix and not exact else _at_most_float32(stored)


def plan(
    checkpoint: Weights,
    configs: Mapping[str, Any],
    latents: Sequence[int],
    *,
    guided: bool,
    dtype: str = "bfloat16",
    keep_encoders: bool = False,
    sequential_guidance: bool = False,
    vae_decode: str = "auto",
    with_text_encoder: bool = True,
    on_cpu: bool = False,
    blocks: BlockSizes | None = None,
) -> MemoryPlan:
    """Predicts the memory of one video.

    Args:
        checkpoint: its tensors' shapes are read, not their values.
        configs: of the components it has.
        latents: frames, height and width of the latents.
        guided: whether there are two passes a step.
        with_text_encoder: False where text embeddings are given.
        on_cpu: count the process itself, as `peak_bytes` does there.
        blocks: for models that make a video block by block.
    """
    weights = {name: weight_bytes(checkpoint, name, dtype) for name in configs if checkpoint.has(name)}
    if not with_text_encoder:
        weights.pop("text_encoder", None)
    encoders = sum(weights.get(name, 0) for name in ("text_encoder", "image_encoder"))
    kept = encoders if keep_encoders else 0
    transformer, vae = weights.get("transformer", 0), weights.get("vae", 0)
    wan, vae_config = configs["transformer"], configs["vae"]
    size = 4 if dtype == "float32" else 2
    phases = {}
    if "text_encoder" in weights:
        phases["text"] = weights["text_encoder"] + text_bytes(configs["text_encoder"], wan.text_len, size)
    if wan.model_type == "i2v":
        encode = encode_bytes(vae_config, latents, encode_method(vae_config, latents))
        work = max(clip_bytes(configs["image_encoder"], size), encode)
        phases["image"] = encoders + vae + work
    if blocks is not None and blocks.encoded:
        given = (blocks.encoded, *latents[1:])
        phases["image"] = kept + vae + encode_bytes(vae_config, given, encode_method(vae_config, given))
    cache = 0
    if blocks is not None:
        cache = kv_cache_bytes(wan, latents, blocks)
        own = denoise_bytes(wan, (blocks.block, *latents[1:]), 1, size, on_cpu=on_cpu, window=blocks.window)
        resident = kept + transformer + vae + cache
        phases["denoise"] = resident + own + decoder_cache_bytes(vae_config, latents)
        method = "tiled" if vae_decode == "tiled" else "stream"
        phases["vae"] = resident + decode_bytes(vae_config, (2, *latents[1:]), method)
    else:
        batch = 2 if guided and not sequential_guidance else 1
        phases["denoise"] = kept + transformer + denoise_bytes(wan, latents, batch, size, on_cpu=on_cpu)
        if wan.model_type == "i2v":
            phases["denoise"] += vae  # loaded for the image already
        method = decode_method(vae_config, latents, None) if vae_decode == "auto" else vae_decode
        phases["vae"] = kept + transformer + vae + decode_bytes(vae_config, latents, method)
    base = _PROCESS if on_cpu else 0
    return MemoryPlan(weights, {name: base + value for name, value in phases.items()}, cache)


def weight_bytes(checkpoint: Weights, component: str, dtype: str) -> int:
    """Bytes of a component's weights as loaded."""
    return sum(
        math.prod(tensor.shape) * device_dtype(component, name, tensor.dtype, dtype).itemsize
        for name, tensor in checkpoint.tensors(component).items()
    )


def denoise_bytes(
    config: WanConfig, latents: Sequence[int], batch: int, size: int, *, on_cpu: bool = False, window: int | None = None
) -> int:
    """Activations of one pass of the transformer.

    Args:
        latents: frames, height, width.
        batch: 2 with guidance in one pass.
        size: bytes of an element in matmuls.
        on_cpu: scores of attention are not counted: there they are made in blocks that the cache holds.
        window: latent frames that are attended to, where these are not `latents`' own.
    """
    length = math.prod(n // p for n, p in zip(latents, config.patch_size, strict=True))
    keys = length if window is None else length // latents[0] * window
    tokens, scores = batch * length, batch * config.num_heads * length * keys * 4
    # Residual stream, its normalised copy, and the gated sum in float32; q, k, v and the attention's result.
    per_token = config.dim * (3 * 4 + 3 * 4 + 4 * size) + config.ffn_dim * 2 * size
    elements = math.prod(latents) * config.in_dim * batch
    return tokens * per_token + (0 if on_cpu else min(scores, _MAX_SCORES)) + 6 * 4 * elements


def kv_cache_bytes(config: WanConfig, latents: Sequence[int], blocks: BlockSizes) -> int:
    """The cache of `diffusion.kv_cache`: keys and values of a window in every layer, and those of the prompt.

    Args:
        latents: frames, height, width; the frames do not matter.
    """
    tokens = math.prod(n // p for n, p in zip(latents[1:], config.patch_size[1:], strict=True))
    width = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / config.head_dim}[blocks.kv_cache]
    rows = 2 * config.num_layers * config.dim
    return int(rows * (blocks.window * tokens * width + config.text_len * min(width, 2.0)))


def text_bytes(config: Umt5Config, length: int, size: int) -> int:
    """Activations of the text encoder on one prompt."""
    scores = config.num_heads * length * length * 4 * 3
    return scores + length * (config.dim * 12 + config.dim_ffn * 3 * size)


def clip_bytes(config: ClipConfig, size: int) -> int:
    """Activations of CLIP's visual tower on one image."""
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return tokens * config.dim * (12 + 6 * size) + config.num_heads * tokens * tokens * 8


def decode_bytes(config: VaeConfig, latents: Sequence[int], method: str) -> int:
    """Activations of the VAE's decoder, float32, for "whole", "stream" or "tiled"."""
    frames, height, width = latents
    if method == "tiled":
        height, width = min(height, TILE), min(width, TILE)
    picture = _picture_bytes(config, height, width)
    if method == "whole" or frames == 1:
        return (config.temporal_stride * (frames - 1) + 1) * picture * _WHOLE_PICTURES
    return config.temporal_stride * picture * _PIECE_PICTURES


def decoder_cache_bytes(config: VaeConfig, latents: Sequence[int]) -> int:
    """What the VAE's decoder keeps from one chunk of frames to the next, float32. latents: frames, height, width."""
    pixels = latents[1] * latents[2]
    return sum(4 * 2 * channels * pixels * scale**2 for channels, _, scale in _decoder_caches(config))


def decoder_reach(config: VaeConfig) -> int:
    """How many latent frames before a frame have an influence on how it is decoded."""
    return math.ceil(sum(2 / rate for _, rate, _ in _decoder_caches(config)))


def _decoder_caches(config: VaeConfig) -> list[tuple[int, int, int]]:
    """(channels, frames a latent frame, pixels a latent's side) of each convolution in time, which keeps two frames."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    rate = scale = 1
    caches = [(config.z_dim, 1, 1)] + [(widths[0], 1, 1)] * 4
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        first = width if i == 0 else width // 2
        caches += [(first, rate, scale)] + [(out, rate, scale)] * (2 * config.num_res_blocks + 1)
        if i < len(config.dim_mult) - 1:
            if config.temporal_downsample[-1 - i]:
                caches.append((out, rate, scale))
                rate *= 2
            scale *= 2
    return [*caches, (widths[-1], rate, scale)]


def encode_bytes(config: VaeConfig, latents: Sequence[int], method: str = "whole") -> int:
    """Activations of the VAE's encoder, float32, for "whole" or "stream". latents: frames, height, width."""
    return decode_bytes(config, latents, method)


def encode_method(config: VaeConfig, latents: Sequence[int]) -> str:
    """ "whole" where that takes little memory, else "stream", which gives the same latents."""
    return "whole" if encode_bytes(config, latents) <= WHOLE_LIMIT else "stream"


def decode_method(config: VaeConfig, latents: Sequence[int], free: int | None) -> str:
    """What vae_decode "auto" means for latents of (frames, height, width), with `free` bytes left (None: not known)."""
    if decode_bytes(config, latents, "whole") <= WHOLE_LIMIT:
        return "whole"
    return "tiled" if free is not None and decode_bytes(config, latents, "stream") > free else "stream"


@contextlib.contextmanager
def explained(plan: MemoryPlan) -> Iterator[None]:
    """Turns jax's error on full memory into a UserError that says what to change."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "height, width or num_frames, set vae_decode to 'tiled', or set sequential_guidance"
        if plan.kv_cache:
            fix = "height, width or rollout_window, set vae_decode to 'tiled', or set kv_cache to 'int8'"
        raise UserError(
            f"the device's memory does not suffice ({plan.peak / 1e9:.1f} GB predicted); ask for a smaller {fix}"
        ) from error


def peak_bytes() -> int:
    """The most memory held so far: on a GPU by jax on the first device, on a CPU by this process."""
    statistics = _device_statistics()
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def device_bytes_free() -> int | None:
    """Bytes that the first device could still give; None where that is not known, as on CPU."""
    statistics = _device_statistics()
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)


def _picture_bytes(config: VaeConfig, height: int, width: int) -> int:
    # One frame of the stage at full size, float32; nearly all memory is held in a few arrays of this size.
    return height * width * config.spatial_stride**2 * config.dim * 4


def _at_most_float32(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.itemsize > 4 else dtype


def _device_statistics() -> dict[str, int]:
    import jax

    return jax.local_devices()[0].memory_stats() or {}
