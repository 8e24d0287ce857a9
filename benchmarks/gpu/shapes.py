"""The shapes of Wan2.1's large operations, for the measurements and for compilation without a GPU. No jax import."""

import dataclasses
from typing import Literal

# Tokens of 81 frames: 21 latent frames of 30 x 52 (480 x 832) or 45 x 80 (720 x 1280) patches; and of 3 latent frames.
TOKENS_480P, TOKENS_720P, TOKENS_CHUNK = 32_760, 75_600, 4_680
HEAD_DIM = 128

Epilogue = Literal["bias", "gelu", "residual"]


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """queries x keys of `heads` heads of 128. With `ragged`, only a part of the keys counts, known at run time."""

    name: str
    queries: int
    keys: int
    heads: int
    ragged: bool = False
    head_dim: int = HEAD_DIM

    @property
    def flops(self) -> int:
        """Of the two products, over all keys."""
        return 4 * self.queries * self.keys * self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """x [m, k] times a weight [n, k], and what happens to the product before it is written."""

    name: str
    m: int
    n: int
    k: int
    epilogue: Epilogue = "bias"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclasses.dataclass(frozen=True)
class NormShape:
    """Rows of `dim` channels, which are `heads` heads."""

    name: str
    rows: int
    dim: int

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


SELF_ATTENTION = (
    AttentionShape("14B 480P", TOKENS_480P, TOKENS_480P, 40),
    AttentionShape("14B 720P", TOKENS_720P, TOKENS_720P, 40),
    AttentionShape("1.3B 480P", TOKENS_480P, TOKENS_480P, 12),
    AttentionShape("14B chunk, 480P cache", TOKENS_CHUNK, TOKENS_480P, 40, ragged=True),
    AttentionShape("1.3B chunk, 480P cache", TOKENS_CHUNK, TOKENS_480P, 12, ragged=True),
)
CROSS_ATTENTION = (
    AttentionShape("14B 480P, text", TOKENS_480P, 512, 40),
    AttentionShape("14B 480P, image", TOKENS_480P, 257, 40),
)
_MATRICES: tuple[tuple[str, int, int, Epilogue], ...] = (
    ("14B projection", 5120, 5120, "bias"),
    ("14B output", 5120, 5120, "residual"),
    ("14B ffn 1", 13824, 5120, "gelu"),
    ("14B ffn 2", 5120, 13824, "residual"),
    ("1.3B projection", 1536, 1536, "bias"),
    ("1.3B output", 1536, 1536, "residual"),
    ("1.3B ffn 1", 8960, 1536, "gelu"),
    ("1.3B ffn 2", 1536, 8960, "residual"),
)
_ROWS = (("480P", TOKENS_480P), ("720P", TOKENS_720P), ("chunk", TOKENS_CHUNK))
LINEAR = tuple(
    LinearShape(f"{matrix} {size}", m, n, k, epilogue) for size, m in _ROWS for matrix, n, k, epilogue in _MATRICES
)
NORMS = tuple(
    NormShape(f"{model} {size}", m, dim) for size, m in _ROWS for model, dim in (("14B", 5120), ("1.3B", 1536))
)

# The same, so small that a test on a CPU runs them.
TINY_SELF_ATTENTION = (
    AttentionShape("tiny", 256, 256, 1),
    AttentionShape("tiny chunk", 128, 256, 1, ragged=True),
)
TINY_LINEAR = (
    LinearShape("tiny projection", 128, 256, 128),
    LinearShape("tiny ffn 1", 128, 256, 128, "gelu"),
    LinearShape("tiny ffn 2", 128, 128, 256, "residual"),
)
TINY_NORMS = (NormShape("tiny", 128, 256),)
