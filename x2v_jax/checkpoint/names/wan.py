"""Names and layouts of tensors: the official Wan2.1 files <-> this project's parameter trees.

One table a network. A row says which official key a parameter is, how the array's axes move, and its shape. Layers that
the networks stack are one row: `blocks.{}.ffn.0.weight` of every layer goes to one array with a leading layer axis.
Every transform only drops axes of length one and permutes the rest, so both directions are exact to the bit.

Of a quantized network the matrices of the blocks are two parameters, under the names that LightX2V gives them: `weight`
in 8 bits, which keeps the official axes [out, in], and `scale` [out], float32.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import einops
import numpy as np

from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Foreign array -> ours: axes by names, as einops writes them; the foreign axes written 1 have length one.

    >>> Transform("o i t 1 1", "t i o").forward_shape((8, 4, 3, 1, 1))
    (3, 4, 8)
    """

    foreign: str
    ours: str

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Foreign -> ours, a view."""
        return einops.rearrange(array, f"{self.foreign} -> {self.ours}")

    def backward(self, array: np.ndarray) -> np.ndarray:
        """Ours -> foreign, a view."""
        return einops.rearrange(array, f"{self.ours} -> {self.foreign}")

    def forward_shape(self, shape: Shape) -> Shape:
        sizes = dict(zip(self.foreign.split(), shape, strict=True))
        return tuple(sizes[axis] for axis in self.ours.split())

    def backward_shape(self, shape: Shape) -> Shape:
        sizes = {"1": 1, **dict(zip(self.ours.split(), shape, strict=True))}
        return tuple(sizes[axis] for axis in self.foreign.split())

    @property
    def rank(self) -> int:
        """How many axes ours has."""
        return len(self.ours.split())


def same(rank: int) -> Transform:
    axes = " ".join(f"axis_{i}" for i in range(rank))
    return Transform(axes, axes)


LINEAR = Transform("o i", "i o")
CONV2D = Transform("o i kh kw", "kh kw i o")
CONV3D = Transform("o i kt kh kw", "kt kh kw i o")
TIME_CONV = Transform("o i kt 1 1", "kt i o")
POINTWISE2D = Transform("o i 1 1", "i o")
POINTWISE3D = Transform("o i 1 1 1", "i o")
SCALE = Transform("o 1", "o")
DROP_FIRST = Transform("1 n d", "n d")
CLS_TOKEN = Transform("1 1 d", "d")
GAMMA2D = Transform("c 1 1", "c")
GAMMA3D = Transform("c 1 1 1", "c")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter. `official` holds `{}` for the layer number when `layers` is set; `shape` is one layer's, ours."""

    native: str
    official: str
    transform: Transform
    shape: Shape
    layers: int | None = None

    @property
    def native_shape(self) -> Shape:
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def official_shape(self) -> Shape:
        return self.transform.backward_shape(self.shape)

    @property
    def official_keys(self) -> tuple[str, ...]:
        """The official key of each layer, in order; one key where layers are not stacked."""
        if self.layers is None:
            return (self.official,)
        return tuple(self.official.format(layer) for layer in range(self.layers))

    @property
    def size(self) -> int:
        return math.prod(self.native_shape)

    @property
    def is_quantizable(self) -> bool:
        """Whether it is a matrix of a block: what LightX2V's converter brings to 8 bits, 98 % of a transformer."""
        return self.layers is not None and self.transform == LINEAR

    def quantized(self) -> tuple["Row", "Row"]:
        """What stands for a matrix in 8 bits: the weight, and its scales."""
        inputs, outputs = self.shape
        name = self.native.removesuffix(".kernel")
        weight = dataclasses.replace(self, native=f"{name}.weight", transform=same(2), shape=(outputs, inputs))
        scale = dataclasses.replace(
            self, native=f"{name}.scale", official=f"{self.official}_scale", transform=SCALE, shape=(outputs,)
        )
        return weight, scale


def table(component: str, config: object, quantization: str | None = None) -> tuple[Row, ...]:
    """All parameters of a network of the given sizes.

    Args:
        quantization: one of `QUANTIZATIONS` where the matrices of its blocks are 8-bit.
    """
    make = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder, "image_encoder": _image_encoder}
    rows = make[component](config)
    if quantization is None:
        return tuple(rows)
    return tuple(part for row in rows for part in (row.quantized() if row.is_quantizable else (row,)))


def official_shapes(component: str, config: object) -> dict[str, Shape]:
    """Official key -> shape, for every tensor that a published file of these sizes holds."""
    return {key: row.official_shape for row in table(component, config) for key in row.official_keys}


def native_shapes(component: str, config: object, quantization: str | None = None) -> dict[str, Shape]:
    """Parameter name -> shape. What smoothing adds is in `names_smoothing`."""
    return {row.native: row.native_shape for row in table(component, config, quantization)}


def parameter_count(component: str, config: object) -> int:
    return sum(row.size for row in table(component, config))


def _layer(rows: Iterator[Row], layers: int, native: str, official: str) -> Iterator[Row]:
    """Rows of one block -> rows of the stack of blocks."""
    for row in rows:
        yield dataclasses.replace(row, native=native + row.native, official=official + row.official, layers=layers)


def _weight(native: str, official: str, transform: Transform, shape: Shape) -> Iterator[Row]:
    """Kernel and bias."""
    yield Row(f"{native}.kernel", f"{official}.weight", transform, shape)
    yield Row(f"{native}.bias", f"{official}.bias", same(1), shape[-1:])


def _linear(native: str, official: str, inputs: int, outputs: int) -> Iterator[Row]:
    yield from _weight(native, official, LINEAR, (inputs, outputs))


def _layer_norm(native: str, official: str, dim: int) -> Iterator[Row]:
    yield Row(f"{native}.scale", f"{official}.weight", same(1), (dim,))
    yield Row(f"{native}.bias", f"{official}.bias", same(1), (dim,))


def _rms_norm(native: str, official: str, dim: int) -> Iterator[Row]:
    yield Row(f"{native}.scale", f"{official}.weight", same(1), (dim,))


def _transformer(c: WanConfig) -> Iterator[Row]:
    yield from _weight("patch_embedding", "patch_embedding", CONV3D, (*c.patch_size, c.in_dim, c.dim))
    yield from _linear("text_embedding.linear_1", "text_embedding.0", c.text_dim, c.dim)
    yield from _linear("text_embedding.linear_2", "text_embedding.2", c.dim, c.dim)
    yield from _linear("time_embedding.linear_1", "time_embedding.0", c.freq_dim, c.dim)
    yield from _linear("time_embedding.linear_2", "time_embedding.2", c.dim, c.dim)
    yield from _linear("time_projection", "time_projection.1", c.dim, 6 * c.dim)
    yield from _layer(_transformer_block(c), c.num_layers, "blocks.", "blocks.{}.")
    yield from _linear("head.linear", "head.head", c.dim, math.prod(c.patch_size) * c.out_dim)
    yield Row("head.modulation", "head.modulation", DROP_FIRST, (2, c.dim))
    if c.model_type == "i2v":
        yield from _layer_norm("img_emb.norm_1", "img_emb.proj.0", c.clip_dim)
        yield from _linear("img_emb.linear_1", "img_emb.proj.1", c.clip_dim, c.clip_dim)
        yield from _linear("img_emb.linear_2", "img_emb.proj.3", c.clip_dim, c.dim)
        yield from _layer_norm("img_emb.norm_2", "img_emb.proj.4", c.dim)


def _transformer_block(c: WanConfig) -> Iterator[Row]:
    yield Row("modulation", "modulation", DROP_FIRST, (6, c.dim))
    for name in ("self_attn", "cross_attn"):
        image = c.model_type == "i2v" and name == "cross_attn"
        for linear in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
            yield from _linear(f"{name}.{linear}", f"{name}.{linear}", c.dim, c.dim)
        for norm in ("norm_q", "norm_k", *(("norm_k_img",) if image else ())):
            yield from _rms_norm(f"{name}.{norm}", f"{name}.{norm}", c.dim)
    yield from _layer_norm("norm3", "norm3", c.dim)
    yield from _linear("ffn.linear_1", "ffn.0", c.dim, c.ffn_dim)
    yield from _linear("ffn.linear_2", "ffn.2", c.ffn_dim, c.dim)


def _text_encoder(c: Umt5Config) -> Iterator[Row]:
    yield Row("token_embedding.embedding", "token_embedding.weight", same(2), (c.vocab_size, c.dim))
    yield from _layer(_text_encoder_block(c), c.num_layers, "blocks.", "blocks.{}.")
    yield from _rms_norm("norm", "norm", c.dim)


def _text_encoder_block(c: Umt5Config) -> Iterator[Row]:
    yield from _rms_norm("norm1", "norm1", c.dim)
    for name in ("q", "k", "v"):
        yield Row(f"attn.{name}.kernel", f"attn.{name}.weight", LINEAR, (c.dim, c.dim_attn))
    yield Row("attn.o.kernel", "attn.o.weight", LINEAR, (c.dim_attn, c.dim))
    yield from _rms_norm("norm2", "norm2", c.dim)
    yield Row("ffn.gate.kernel", "ffn.gate.0.weight", LINEAR, (c.dim, c.dim_ffn))
    yield Row("ffn.fc1.kernel", "ffn.fc1.weight", LINEAR, (c.dim, c.dim_ffn))
    yield Row("ffn.fc2.kernel", "ffn.fc2.weight", LINEAR, (c.dim_ffn, c.dim))
    yield Row("pos_embedding.embedding", "pos_embedding.embedding.weight", same(2), (c.num_buckets, c.num_heads))


def _image_encoder(c: ClipConfig) -> Iterator[Row]:
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    yield Row("cls_embedding", "visual.cls_embedding", CLS_TOKEN, (c.dim,))
    yield Row("pos_embedding", "visual.pos_embedding", DROP_FIRST, (tokens, c.dim))
    yield Row("patch_embedding.kernel", "visual.patch_embedding.weight", CONV2D, (c.patch_size, c.patch_size, 3, c.dim))
    yield from _layer_norm("pre_norm", "visual.pre_norm", c.dim)
    yield from _layer(_image_encoder_block(c), c.num_layers, "blocks.", "visual.transformer.{}.")
    yield from _layer_norm("post_norm", "visual.post_norm", c.dim)
    yield Row("head", "visual.head", same(2), (c.dim, c.out_dim))


def _image_encoder_block(c: ClipConfig) -> Iterator[Row]:
    yield from _layer_norm("norm1", "norm1", c.dim)
    yield from _linear("attn.to_qkv", "attn.to_qkv", c.dim, 3 * c.dim)
    yield from _linear("attn.proj", "attn.proj", c.dim, c.dim)
    yield from _layer_norm("norm2", "norm2", c.dim)
    yield from _linear("mlp.linear_1", "mlp.0", c.dim, c.mlp_ratio * c.dim)
    yield from _linear("mlp.linear_2", "mlp.2", c.mlp_ratio * c.dim, c.dim)


def _vae(c: VaeConfig) -> Iterator[Row]:
    yield from _weight("conv1", "conv1", POINTWISE3D, (2 * c.z_dim, 2 * c.z_dim))
    yield from _weight("conv2", "conv2", POINTWISE3D, (c.z_dim, c.z_dim))
    yield from _vae_encoder(c)
    yield from _vae_decoder(c)


def _vae_encoder(c: VaeConfig) -> Iterator[Row]:
    widths = [c.dim * m for m in (1, *c.dim_mult)]
    yield from _conv3d("encoder.conv1", "encoder.conv1", 3, widths[0])
    index = 0
    for stage, (width, out) in enumerate(itertools.pairwise(widths)):
        for block in range(c.num_res_blocks):
            yield from _residual(f"encoder.downsamples.{index}", width if block == 0 else out, out)
            index += 1
        if stage < len(c.dim_mult) - 1:
            name = f"encoder.downsamples.{index}"
            yield from _weight(f"{name}.conv", f"{name}.resample.1", CONV2D, (3, 3, out, out))
            if c.temporal_downsample[stage]:
                yield from _weight(f"{name}.time_conv", f"{name}.time_conv", TIME_CONV, (3, out, out))
            index += 1
    yield from _middle_and_head("encoder", widths[-1], widths[-1], 2 * c.z_dim)


def _vae_decoder(c: VaeConfig) -> Iterator[Row]:
    widths = [c.dim * m for m in (c.dim_mult[-1], *reversed(c.dim_mult))]
    doubles_time = tuple(reversed(c.temporal_downsample))
    yield from _conv3d("decoder.conv1", "decoder.conv1", c.z_dim, widths[0])
    index = 0
    for stage, (width, out) in enumerate(itertools.pairwise(widths)):
        inputs = width if stage == 0 else width // 2  # each upsampling halves the channels
        for block in range(c.num_res_blocks + 1):
            yield from _residual(f"decoder.upsamples.{index}", inputs if block == 0 else out, out)
            index += 1
        if stage < len(c.dim_mult) - 1:
            name = f"decoder.upsamples.{index}"
            yield from _weight(f"{name}.conv", f"{name}.resample.1", CONV2D, (3, 3, out, out // 2))
            if doubles_time[stage]:
                yield from _weight(f"{name}.time_conv", f"{name}.time_conv", TIME_CONV, (3, out, 2 * out))
            index += 1
    yield from _middle_and_head("decoder", widths[0], widths[-1], 3)


def _conv3d(native: str, official: str, inputs: int, outputs: int) -> Iterator[Row]:
    yield from _weight(native, official, CONV3D, (3, 3, 3, inputs, outputs))


def _residual(name: str, inputs: int, outputs: int) -> Iterator[Row]:
    yield Row(f"{name}.norm1.gamma", f"{name}.residual.0.gamma", GAMMA3D, (inputs,))
    yield from _conv3d(f"{name}.conv1", f"{name}.residual.2", inputs, outputs)
    yield Row(f"{name}.norm2.gamma", f"{name}.residual.3.gamma", GAMMA3D, (outputs,))
    yield from _conv3d(f"{name}.conv2", f"{name}.residual.6", outputs, outputs)
    if inputs != outputs:
        yield from _weight(f"{name}.shortcut", f"{name}.shortcut", POINTWISE3D, (inputs, outputs))


def _middle_and_head(name: str, middle: int, last: int, outputs: int) -> Iterator[Row]:
    yield from _residual(f"{name}.middle.0", middle, middle)
    yield Row(f"{name}.middle.1.norm.gamma", f"{name}.middle.1.norm.gamma", GAMMA2D, (middle,))
    for conv, width in (("to_qkv", 3 * middle), ("proj", middle)):
        yield from _weight(f"{name}.middle.1.{conv}", f"{name}.middle.1.{conv}", POINTWISE2D, (middle, width))
    yield from _residual(f"{name}.middle.2", middle, middle)
    yield Row(f"{name}.head.norm.gamma", f"{name}.head.0.gamma", GAMMA3D, (last,))
    yield from _conv3d(f"{name}.head.conv", f"{name}.head.2", last, outputs)
