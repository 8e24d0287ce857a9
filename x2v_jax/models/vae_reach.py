"""How far the VAE's decoder looks back: its convolutions in time and what they keep."""

import itertools
import math

from x2v_jax.models.config import VaeConfig


def decoder_reach(config: VaeConfig) -> int:
    """How many latent frames before a frame have an influence on how it is decoded."""
    return math.ceil(sum(2 / rate for _, rate, _ in decoder_caches(config)))


def decoder_caches(config: VaeConfig) -> list[tuple[int, int, int]]:
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
