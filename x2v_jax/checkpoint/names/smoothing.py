"""Which matrices of a transformer's block are smoothed together, and the names of what a smoothed checkpoint holds.

Matrices that read one input form a group, with one factor a channel of that input. Where its inverse goes differs:

    group         matrices                  input                     its inverse goes to
    self_attn.q   self_attn.q, k, v         LayerNorm and modulation  blocks.self_attn.smooth, which the block reads
    ffn.linear_1  ffn.linear_1              LayerNorm and modulation  blocks.ffn.smooth, likewise
    cross_attn.q  cross_attn.q              norm3                     norm3's scale and bias
    self_attn.o   self_attn.o               attention of self_attn.v  self_attn.v, rows and bias
    cross_attn.o  cross_attn.o              attention of v and v_img  cross_attn.v and v_img, rows and bias

Keys and values of cross attention read the text and the image, which are embedded once for all blocks: a factor of one
block has no weights to go into. ffn.linear_2 reads GELU's result, which is not linear in what comes before it. These
are left alone.
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from x2v_jax.checkpoint.names.wan import Shape


@dataclasses.dataclass(frozen=True)
class Group:
    """matrices: those that read the input, by their names in a block. into: whose rows or values take the inverse;
    empty where the block takes it. stored: the parameter that holds the inverse [layers, D]."""

    matrices: tuple[str, ...]
    into: tuple[str, ...]
    stored: str


# By the name that the input has in a recording; `models.wan_blocks` says the same names to who listens.
GROUPS: Mapping[str, Group] = {
    "self_attn.q": Group(("self_attn.q", "self_attn.k", "self_attn.v"), (), "blocks.self_attn.smooth"),
    "self_attn.o": Group(("self_attn.o",), ("self_attn.v",), "smoothing.self_attn.o"),
    "cross_attn.q": Group(("cross_attn.q",), ("norm3",), "smoothing.cross_attn.q"),
    "cross_attn.o": Group(("cross_attn.o",), ("cross_attn.v", "cross_attn.v_img"), "smoothing.cross_attn.o"),
    "ffn.linear_1": Group(("ffn.linear_1",), (), "blocks.ffn.smooth"),
}
# What the network never reads: with it, everything that was folded into weights can be undone.
ASIDE = "smoothing."

GROUP_OF_COLUMNS = {matrix: name for name, group in GROUPS.items() for matrix in group.matrices}
GROUP_OF_ROWS = {module: name for name, group in GROUPS.items() for module in group.into}


def smoothing_shapes(config: Any) -> dict[str, Shape]:
    """Name -> shape of what a smoothed transformer of these sizes has besides."""
    return {group.stored: (config.num_layers, config.dim) for group in GROUPS.values()}


def is_smoothed(names: Container[str]) -> bool:
    """Whether the network of these parameter names multiplies its modulation by factors."""
    return GROUPS["self_attn.q"].stored in names


def module_of(parameter: str) -> str:
    """blocks.self_attn.v.kernel, or blocks.7.self_attn.v.weight by its official name -> self_attn.v.

    >>> module_of("blocks.7.cross_attn.v_img.bias"), module_of("blocks.norm3.scale"), module_of("head.linear.bias")
    ('cross_attn.v_img', 'norm3', '')
    """
    first, *parts = parameter.split(".")
    if first != "blocks" or len(parts) < 2:
        return ""
    return ".".join(parts[1:-1] if parts[0].isdecimal() else parts[:-1])
