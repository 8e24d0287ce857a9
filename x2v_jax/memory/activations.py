"""How much memory networks take at work, and in how many pieces the VAE works. From sizes alone; no jax import.

Activations are estimated with factors that were fitted to what XLA reports for compiled programs.
"""

import math
from collections.abc import Sequence

from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.vae_pieces import TILE, decoder_caches

# Attention without a fused kernel makes scores in chunks of at most this size.
_MAX_SCORES = 1 << 28
# The VAE works in pieces where the whole would take more activations than this.
WHOLE_LIMIT = 1 << 30
# Pictures (see _picture_bytes) per frame that the VAE holds at once. In pieces it also holds the convolutions' caches.
_WHOLE_PICTURES, _PIECE_PICTURES, _ENCODE_PICTURES = 6, 15, 11


def text_bytes(config: Umt5Config, length: int, size: int) -> int:
    """Activations of the text encoder on one prompt."""
    scores = config.num_heads * length * length * 4 * 3
    return scores + length * (config.dim * 14 + config.dim_ffn * 3 * size)


def clip_bytes(config: ClipConfig, size: int) -> int:
    """Activations of CLIP's visual tower on one image."""
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return tokens * config.dim * (12 + 6 * size) + config.num_heads * tokens * tokens * 8


def denoise_bytes(
    config: WanConfig,
    latent_size: Sequence[int],
    batch: int,
    size: int,
    *,
    on_cpu: bool = False,
    window: int | None = None,
) -> int:
    """Activations of one pass of the transformer.

    Args:
        latent_size: frames, height, width.
        batch: 2 with guidance in one pass.
        size: bytes of an element in matmuls.
        on_cpu: scores of attention are not counted: there they are made in blocks that the cache holds.
        window: latent frames that are attended to, where these are not `latent_size`' own.
    """
    length = math.prod(n // p for n, p in zip(latent_size, config.patch_size, strict=True))
    keys = length if window is None else length // latent_size[0] * window
    tokens, scores = batch * length, batch * config.num_heads * length * keys * 4
    # Residual stream, its normalised copy and the gated sum in float32; q, k, v and the attention's result.
    per_token = config.dim * (3 * 4 + 4 * size) + config.ffn_dim * size
    if config.model_type == "i2v":
        per_token += config.dim * (size + 1)  # attention to the image beside that to the text; fitted
    elements = math.prod(latent_size) * config.in_dim * batch
    return tokens * per_token + (0 if on_cpu else min(scores, _MAX_SCORES)) + 6 * 4 * elements


def decode_bytes(config: VaeConfig, latent_size: Sequence[int], method: str, size: int = 4) -> int:
    """Activations of the VAE's decoder for "whole", "stream" or "tiled".

    Args:
        latent_size: frames, height, width.
        size: bytes of an element in convolutions.
    """
    frames, height, width = latent_size
    if method == "tiled":
        height, width = min(height, TILE), min(width, TILE)
    picture = _picture_bytes(config, height, width, size)
    if method == "whole" or frames == 1:
        return (config.temporal_stride * (frames - 1) + 1) * picture * _WHOLE_PICTURES
    return config.temporal_stride * picture * _PIECE_PICTURES


def decoder_cache_bytes(config: VaeConfig, latent_size: Sequence[int], size: int = 4) -> int:
    """What the VAE's decoder keeps from one chunk of frames to the next. latent_size: frames, height, width."""
    pixels = latent_size[1] * latent_size[2]
    return sum(size * 2 * channels * pixels * scale**2 for channels, _, scale in decoder_caches(config))


def encode_bytes(config: VaeConfig, latent_size: Sequence[int], method: str = "whole", size: int = 4) -> int:
    """Activations of the VAE's encoder for "whole" or "stream". latent_size: frames, height, width."""
    if method == "whole":
        return decode_bytes(config, latent_size, method, size)
    return config.temporal_stride * _picture_bytes(config, latent_size[1], latent_size[2], size) * _ENCODE_PICTURES


def encode_method(config: VaeConfig, latent_size: Sequence[int], size: int = 4) -> str:
    """ "whole" where that takes little memory, else "stream", which gives the same latents."""
    return "whole" if encode_bytes(config, latent_size, size=size) <= WHOLE_LIMIT else "stream"


def decode_method(config: VaeConfig, latent_size: Sequence[int], free: int | None, size: int = 4) -> str:
    """What vae_decode "auto" means for latents of (frames, height, width), with `free` bytes left (None: not known)."""
    if decode_bytes(config, latent_size, "whole", size) <= WHOLE_LIMIT:
        return "whole"
    return "tiled" if free is not None and decode_bytes(config, latent_size, "stream", size) > free else "stream"


def _picture_bytes(config: VaeConfig, height: int, width: int, size: int) -> int:
    # One frame of the stage at full size; nearly all memory is held in a few arrays of this size.
    return height * width * config.spatial_stride**2 * config.dim * size
