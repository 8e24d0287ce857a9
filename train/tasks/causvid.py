"""CausVid: a causal student learns from real videos with noise on them, by the scores of a bidirectional teacher.

Source: Yin et al., arXiv:2412.07772. The student never sees its own videos while it learns; Self-Forcing (`dmd` with
config.causal) mends that.
"""

from typing import Any

from x2v_jax.errors import UserError

from ..rollouts import NoisedVideos
from .dmd import DmdTask


class CausVidTask(DmdTask):
    """Config as `DmdTask`'s, with data that have latents."""

    needs_latents = True

    def __init__(self, config: Any):
        super().__init__(config)
        if not self.is_causal:
            raise UserError("config.causal is empty; CausVid's student is causal: set config.causal.block")
        # Evaluation goes on with the cache, as inference does.
        self.rollout = NoisedVideos(self.graph, self.shape, self.sigmas, block=config.causal.block)
        self.variant = "causvid"
