"""How much memory a run takes: predicted from sizes before anything is loaded, read afterwards.

Weights are counted exactly. Activations are estimated with factors that were fitted to what XLA reports for compiled
programs (`tests/memory/test_memory.py` holds the prediction against such reports); they are a guide, not a promise.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict, runtime_checkable

import ml_dtypes
import numpy as np

from x2v_jax.errors import UserError
from x2v_jax.memory.activations import (
    clip_bytes,
    decode_bytes,
    decode_method,
    decoder_cache_bytes,
    denoise_bytes,
    encode_bytes,
    encode_method,
    text_bytes,
)
from x2v_jax.models.config import QUANTIZABLE, QUANTIZATIONS, ClipConfig, Config, Umt5Config, VaeConfig, WanConfig

# What the process takes on a CPU without any model: Python, jax, compiling.
_PROCESS = 400 << 20
# Blocks on the device at one time where the others wait in the host's memory: the one at work, the one that is coming.
_BLOCKS_AT_ONCE = 2

# Of the transformer: matmuls whose inputs must keep float32 (time, patches, output), so their weights do too.
_EXACT = ("patch_embedding.", "time_embedding.", "time_projection.", "head.")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = {np.dtype(t) for t in (np.float16, np.float32, np.float64)} | {_BFLOAT16}
_EIGHT_BIT = {np.dtype(name) for name in QUANTIZATIONS}


@runtime_checkable
class Weight(Protocol):
    """A tensor's size and type; its values are not asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


@runtime_checkable
class Weights(Protocol):
    """What `plan` asks of a checkpoint; `checkpoint.native.reader.NativeCheckpoint` answers it."""

    def has(self, component: str) -> bool: ...
    def tensors(self, component: str) -> Mapping[str, Weight]: ...


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes on the device.

    weights: by component, as loaded, wherever they are.
    parts: of "text", "image", "denoise" and "vae", what is on the device then: weights by component, "activations",
        and of block-by-block models "keys and values" and "decoder's frames".
    host: bytes of weights that stay in the host's memory (offload "blocks").
    """

    weights: dict[str, int]
    parts: dict[str, dict[str, int]]
    host: int = 0

    @property
    def phases(self) -> dict[str, int]:
        return {name: sum(parts.values()) for name, parts in self.parts.items()}

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def kv_cache(self) -> int:
        """Of block-by-block models, what the phases "denoise" and "vae" hold of it."""
        return self.parts["denoise"].get("keys and values", 0)

    @property
    def weights_at_once(self) -> int:
        """The most bytes of weights, which are counted exactly, that are on the device at one time."""
        return max(sum(n for part, n in parts.items() if part in self.weights) for parts in self.parts.values())


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What the memory of a block-by-block video depends on; its length is not among it. Counts are of latent frames.

    block, window: as in `rollout_plan.RolloutPlan`.
    kv_cache: "bfloat16", "float32", "int8" or "int8_e4m3".
    encoded: given frames that the VAE encodes first, of an image or a video.
    originals: frames of the sink whose keys are kept a second time, because they move on (relative positions).
    """

    block: int
    window: int
    kv_cache: str
    encoded: int = 0
    originals: int = 0


class PlanChanges(TypedDict, total=False):
    """Arguments of `plan` that are changed to see what it would say then."""

    latent_size: tuple[int, int, int]
    guided: bool
    dtype: str
    vae_dtype: str
    keep_encoders: bool
    sequential_guidance: bool
    vae_decode: str
    offload: str
    quantized: Sequence[str]
    with_text_encoder: bool
    on_cpu: bool
    available: int | None
    blocks: BlockSizes | None


def config_of[C: Config](configs: Mapping[str, Config], component: str, kind: type[C]) -> C:
    """The config of a component, which is of the kind that the component has."""
    config = configs[component]
    if not isinstance(config, kind):
        raise TypeError(f"the config of {component} is a {type(config).__name__}, not a {kind.__name__}")
    return config


def device_dtype(component: str, name: str, stored: np.dtype | type[object], dtype: str) -> np.dtype:
    """The type in which a weight is kept on the device.

    Args:
        component, name: of the weight.
        stored: its type in the file.
        dtype: "bfloat16" or "float32", of the run; of the VAE, of its own.

    Raises:
        UserError: the file holds something that is neither a plain float nor an 8-bit matrix of the blocks.
    """
    stored = np.dtype(stored)
    if stored in _EIGHT_BIT and component in QUANTIZABLE and name.endswith(".weight"):
        return stored
    if stored not in _FLOATS:
        raise UserError(
            f"{component}: {name} is stored as {stored.name}, which this pipeline does not run; convert the checkpoint "
            "from its bfloat16 or float32 weights"
        )
    if dtype == "float32":
        return np.dtype(np.float32)
    exact = component == "transformer" and name.startswith(_EXACT)
    is_matrix = name.endswith(".kernel") or name == "token_embedding.embedding"
    return _BFLOAT16 if is_matrix and not exact else _at_most_float32(stored)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run and a video ask of a device, besides the networks.

    latent_size: frames, height and width of the latents.
    guided: whether there are two passes a step.
    dtype, vae_dtype, keep_encoders, sequential_guidance, vae_decode: as in `request.options.RunOptions`.
    offload: "blocks" leaves the transformer's blocks in the host's memory.
    quantized: components to be counted as if their matrices were in 8 bits, whatever they are.
    with_text_encoder: False where text embeddings are given.
    on_cpu: count the process itself, as `peak_bytes` does there.
    available: bytes that the device has, which decide what vae_decode "auto" means; None: not known.
    blocks: for models that make a video block by block.
    """

    latent_size: Sequence[int]
    guided: bool
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    keep_encoders: bool = False
    sequential_guidance: bool = False
    vae_decode: str = "auto"
    offload: str = "none"
    quantized: Sequence[str] = ()
    with_text_encoder: bool = True
    on_cpu: bool = False
    available: int | None = None
    blocks: BlockSizes | None = None


def plan(checkpoint: Weights, configs: Mapping[str, Config], work: Workload) -> MemoryPlan:
    """Predicts the memory of one video.

    Args:
        checkpoint: its tensors' shapes and types are read, not their values.
        configs: of the components it has.
    """
    dtypes = {name: work.vae_dtype if name == "vae" else work.dtype for name in configs if checkpoint.has(name)}
    weights = {name: weight_bytes(checkpoint, name, dtypes[name], quantized=name in work.quantized) for name in dtypes}
    if not work.with_text_encoder:
        weights.pop("text_encoder", None)
    encoders = {name: weights[name] for name in ("text_encoder", "image_encoder") if name in weights}
    kept = encoders if work.keep_encoders else {}
    host = 0
    transformer = {"transformer": weights.get("transformer", 0)}
    wan, vae_config = config_of(configs, "transformer", WanConfig), config_of(configs, "vae", VaeConfig)
    latent_size = work.latent_size
    if work.offload == "blocks" and "transformer" in weights:
        quantized = "transformer" in work.quantized
        host = weight_bytes(checkpoint, "transformer", work.dtype, quantized=quantized, within="blocks.")
        held = min(_BLOCKS_AT_ONCE, wan.num_layers) * host // wan.num_layers
        transformer = {"transformer": weights["transformer"] - host + held}
    vae = {"vae": weights.get("vae", 0)}
    size, vae_size = _itemsize(work.dtype), _itemsize(work.vae_dtype)
    base = {"process": _PROCESS} if work.on_cpu else {}
    parts: dict[str, dict[str, int]] = {}
    if "text_encoder" in weights:
        activations = text_bytes(config_of(configs, "text_encoder", Umt5Config), wan.text_len, size)
        parts["text"] = base | {"text_encoder": weights["text_encoder"], "activations": activations}

    def encode(latent_size: Sequence[int]) -> int:
        method = encode_method(vae_config, latent_size, vae_size)
        return encode_bytes(vae_config, latent_size, method, vae_size)

    if wan.model_type == "i2v":
        activations = max(clip_bytes(config_of(configs, "image_encoder", ClipConfig), size), encode(latent_size))
        parts["image"] = base | encoders | vae | {"activations": activations}
    if work.blocks is None:
        before = vae if wan.model_type == "i2v" else {}  # loaded for the image already
        return MemoryPlan(weights, parts | _whole_phases(configs, work, base | kept | transformer, vae, before), host)
    if work.blocks.encoded:
        # In pieces, each of which is given the convolutions' frames of the one before.
        activations = encode((work.blocks.encoded, *latent_size[1:]))
        activations += decoder_cache_bytes(vae_config, latent_size, vae_size)
        parts["image"] = base | kept | vae | {"activations": activations}
    return MemoryPlan(weights, parts | _block_phases(configs, work, work.blocks, base | kept | transformer | vae), host)


def _whole_phases(
    configs: Mapping[str, Config], work: Workload, held: dict[str, int], vae: dict[str, int], before: dict[str, int]
) -> dict[str, dict[str, int]]:
    """What is on the device while a whole video is denoised and decoded.

    Args:
        held: what is there in both phases. vae: the VAE's weights. before: what of them is there while it is denoised.
    """
    vae_config, vae_size = config_of(configs, "vae", VaeConfig), _itemsize(work.vae_dtype)
    batch = 2 if work.guided and not work.sequential_guidance else 1
    size = _itemsize(work.dtype)
    activations = denoise_bytes(
        config_of(configs, "transformer", WanConfig), work.latent_size, batch, size, on_cpu=work.on_cpu
    )
    resident, method = held | vae, work.vae_decode
    if method == "auto":
        method = decode_method(vae_config, work.latent_size, _less(work.available, resident), vae_size)
    decode = decode_bytes(vae_config, work.latent_size, method, vae_size)
    return {"denoise": held | before | {"activations": activations}, "vae": resident | {"activations": decode}}


def _block_phases(
    configs: Mapping[str, Config], work: Workload, blocks: BlockSizes, held: dict[str, int]
) -> dict[str, dict[str, int]]:
    """What is on the device while a block is denoised and decoded. held: what is there in both phases."""
    wan, vae_config = config_of(configs, "transformer", WanConfig), config_of(configs, "vae", VaeConfig)
    latent_size, vae_size = work.latent_size, _itemsize(work.vae_dtype)
    size = _itemsize(work.dtype)
    own = denoise_bytes(wan, (blocks.block, *latent_size[1:]), 1, size, on_cpu=work.on_cpu, window=blocks.window)
    resident = held | {"keys and values": kv_cache_bytes(wan, latent_size, blocks)}
    frames = decoder_cache_bytes(vae_config, latent_size, vae_size)
    decoded = (2, *latent_size[1:])
    method = decode_method(vae_config, decoded, _less(work.available, resident), vae_size)
    method = "tiled" if "tiled" in (work.vae_decode, method if work.vae_decode == "auto" else "") else "stream"
    decode = decode_bytes(vae_config, decoded, method, vae_size)
    return {
        "denoise": resident | {"activations": own, "decoder's frames": frames},
        "vae": resident | {"activations": decode, "decoder's frames": frames},
    }


def weight_bytes(checkpoint: Weights, component: str, dtype: str, *, quantized: bool = False, within: str = "") -> int:
    """Bytes of a component's weights as loaded.

    Args:
        quantized: count matrices of the blocks as 8-bit with a float32 scale an output, whatever they are.
        within: only the weights whose names begin so.
    """
    total = 0
    for name, tensor in checkpoint.tensors(component).items():
        if not name.startswith(within):
            continue
        shape, itemsize = tensor.shape, device_dtype(component, name, tensor.dtype, dtype).itemsize
        if quantized and component in QUANTIZABLE and name.startswith("blocks.") and name.endswith(".kernel"):
            total += math.prod(shape) + 4 * math.prod(shape) // shape[-2]
        else:
            total += math.prod(shape) * itemsize
    return total


def kv_cache_bytes(config: WanConfig, latent_size: Sequence[int], blocks: BlockSizes) -> int:
    """The cache of `diffusion.kv_cache`: keys and values of a window in every layer, and those of the prompt.

    Args:
        latent_size: frames, height, width; the frames do not matter.
    """
    tokens = math.prod(n // p for n, p in zip(latent_size[1:], config.patch_size[1:], strict=True))
    eight_bit = 1.0 + 4 / config.head_dim  # a float32 scale for each head of each row
    widths = {"float32": 4.0, "bfloat16": 2.0, "int8": eight_bit, "int8_e4m3": eight_bit}
    floating = 4.0 if blocks.kv_cache == "float32" else 2.0
    rows = config.num_layers * config.dim
    window = 2 * blocks.window * tokens * widths[blocks.kv_cache]
    return int(rows * (window + blocks.originals * tokens * floating + 2 * config.text_len * floating))


def _less(available: int | None, parts: Mapping[str, int]) -> int | None:
    return None if available is None else available - sum(parts.values())


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _at_most_float32(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.itemsize > 4 else dtype
