"""Names of tensors: diffusers' and transformers' folders <-> the official Wan2.1 files.

Facts from diffusers' WanTransformer3DModel and AutoencoderKLWan and transformers' UMT5EncoderModel and CLIPVisionModel.
The official key is the common tongue of this package: names.py takes it on to parameter names.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from x2v_jax.checkpoint.names.wan import CLS_TOKEN, DROP_FIRST, LINEAR, Transform


@dataclasses.dataclass(frozen=True)
class Rename:
    """One official tensor and the diffusers tensors that hold it. `{}` stands for a layer number, the same in all.

    others: concatenated along axis 0 they give the official tensor. transform: official array -> diffusers array.
    """

    official: str
    others: tuple[str, ...]
    transform: Transform | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """What a diffusers key is: part `index` of `count` of an official tensor."""

    official: str
    index: int = 0
    count: int = 1
    transform: Transform | None = None


def _modules(pairs: Iterable[tuple[str, str]], leaves: tuple[str, ...]) -> Iterator[Rename]:
    for official, other in pairs:
        for leaf in leaves:
            yield Rename(f"{official}.{leaf}", (f"{other}.{leaf}",))


_BOTH = ("weight", "bias")


def _transformer() -> Iterator[Rename]:
    embedder = "condition_embedder"
    yield from _modules(
        (
            ("patch_embedding", "patch_embedding"),
            ("text_embedding.0", f"{embedder}.text_embedder.linear_1"),
            ("text_embedding.2", f"{embedder}.text_embedder.linear_2"),
            ("time_embedding.0", f"{embedder}.time_embedder.linear_1"),
            ("time_embedding.2", f"{embedder}.time_embedder.linear_2"),
            ("time_projection.1", f"{embedder}.time_proj"),
            ("img_emb.proj.0", f"{embedder}.image_embedder.norm1"),
            ("img_emb.proj.1", f"{embedder}.image_embedder.ff.net.0.proj"),
            ("img_emb.proj.3", f"{embedder}.image_embedder.ff.net.2"),
            ("img_emb.proj.4", f"{embedder}.image_embedder.norm2"),
            ("head.head", "proj_out"),
            # diffusers numbers the norms in the order of use; only the one before cross attention has parameters.
            ("blocks.{}.norm3", "blocks.{}.norm2"),
            ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
            ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
            ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
            ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
        ),
        _BOTH,
    )
    yield Rename("blocks.{}.cross_attn.norm_k_img.weight", ("blocks.{}.attn2.norm_added_k.weight",))
    yield Rename("head.modulation", ("scale_shift_table",))
    yield Rename("blocks.{}.modulation", ("blocks.{}.scale_shift_table",))
    for official, other in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        linears = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
        yield from _modules(((f"blocks.{{}}.{official}.{a}", f"blocks.{{}}.{other}.{b}") for a, b in linears), _BOTH)
        norms = ("norm_q", "norm_k")
        yield from _modules(((f"blocks.{{}}.{official}.{n}", f"blocks.{{}}.{other}.{n}") for n in norms), ("weight",))


def _text_encoder() -> Iterator[Rename]:
    block = "encoder.block.{}.layer"
    yield from _modules(
        (
            ("token_embedding", "shared"),
            ("norm", "encoder.final_layer_norm"),
            *((f"blocks.{{}}.attn.{x}", f"{block}.0.SelfAttention.{x}") for x in "qkvo"),
            ("blocks.{}.pos_embedding.embedding", f"{block}.0.SelfAttention.relative_attention_bias"),
            ("blocks.{}.norm1", f"{block}.0.layer_norm"),
            ("blocks.{}.ffn.gate.0", f"{block}.1.DenseReluDense.wi_0"),
            ("blocks.{}.ffn.fc1", f"{block}.1.DenseReluDense.wi_1"),
            ("blocks.{}.ffn.fc2", f"{block}.1.DenseReluDense.wo"),
            ("blocks.{}.norm2", f"{block}.1.layer_norm"),
        ),
        ("weight",),
    )


def _image_encoder() -> Iterator[Rename]:
    tower, layer = "vision_model", "vision_model.encoder.layers.{}"
    yield Rename("visual.cls_embedding", (f"{tower}.embeddings.class_embedding",), CLS_TOKEN)
    yield Rename("visual.pos_embedding", (f"{tower}.embeddings.position_embedding.weight",), DROP_FIRST)
    yield Rename("visual.patch_embedding.weight", (f"{tower}.embeddings.patch_embedding.weight",))
    yield Rename("visual.head", ("visual_projection.weight",), LINEAR)
    yield from _modules(
        (
            ("visual.pre_norm", f"{tower}.pre_layrnorm"),  # their spelling
            ("visual.post_norm", f"{tower}.post_layernorm"),
            ("visual.transformer.{}.norm1", f"{layer}.layer_norm1"),
            ("visual.transformer.{}.norm2", f"{layer}.layer_norm2"),
            ("visual.transformer.{}.attn.proj", f"{layer}.self_attn.out_proj"),
            ("visual.transformer.{}.mlp.0", f"{layer}.mlp.fc1"),
            ("visual.transformer.{}.mlp.2", f"{layer}.mlp.fc2"),
        ),
        _BOTH,
    )
    for leaf in _BOTH:
        parts = tuple(f"{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv")
        yield Rename(f"visual.transformer.{{}}.attn.to_qkv.{leaf}", parts)


_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    *((f"residual.2.{leaf}", f"conv1.{leaf}") for leaf in _BOTH),
    ("residual.3.gamma", "norm2.gamma"),
    *((f"residual.6.{leaf}", f"conv2.{leaf}") for leaf in _BOTH),
    *((f"shortcut.{leaf}", f"conv_shortcut.{leaf}") for leaf in _BOTH),
)
_RESAMPLE = tuple((f"{name}.{leaf}", f"{name}.{leaf}") for name in ("resample.1", "time_conv") for leaf in _BOTH)


def _vae() -> Iterator[Rename]:
    yield from _modules((("conv1", "quant_conv"), ("conv2", "post_quant_conv")), _BOTH)
    for half in ("encoder", "decoder"):
        middle = f"{half}.mid_block"
        yield from _modules(((f"{half}.conv1", f"{half}.conv_in"), (f"{half}.head.2", f"{half}.conv_out")), _BOTH)
        yield Rename(f"{half}.head.0.gamma", (f"{half}.norm_out.gamma",))
        yield Rename(f"{half}.middle.1.norm.gamma", (f"{middle}.attentions.0.norm.gamma",))
        for name in ("to_qkv", "proj"):
            yield from _modules(((f"{half}.middle.1.{name}", f"{middle}.attentions.0.{name}"),), _BOTH)
        for index, resnet in ((0, 0), (2, 1)):
            for official, other in _RESIDUAL:
                yield Rename(f"{half}.middle.{index}.{official}", (f"{middle}.resnets.{resnet}.{other}",))
    for official, other in _RESIDUAL + _RESAMPLE:
        yield Rename(f"encoder.downsamples.{{}}.{official}", (f"encoder.down_blocks.{{}}.{other}",))


_TABLES = {
    "transformer": tuple(_transformer()),
    "vae": tuple(_vae()),
    "text_encoder": tuple(_text_encoder()),
    "image_encoder": tuple(_image_encoder()),
}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(0|[1-9]\d*)"))


def _with_number(template: str, match: re.Match[str]) -> str:
    return template.format(*match.groups())


class DiffusersNames:
    """Translates the keys of one component, both ways.

    Args:
        component: transformer, vae, text_encoder or image_encoder.
        num_res_blocks: of the VAE: diffusers groups the decoder's layers by stage, the official file counts on.
    """

    def __init__(self, component: str, num_res_blocks: int = 2):
        self._vae = component == "vae"
        self._per_stage = num_res_blocks + 2  # residual blocks of a decoder stage, and its upsampling
        self._rows = [
            (_pattern(row.official), [_pattern(other) for other in row.others], row) for row in _TABLES[component]
        ]

    def parse(self, key: str) -> Part | None:
        """What a diffusers key holds; None when no published file has such a key."""
        if self._vae and key.startswith("decoder.up_blocks."):
            return self._parse_up_block(key)
        for _, others, row in self._rows:
            for index, pattern in enumerate(others):
                if match := pattern.fullmatch(key):
                    return Part(_with_number(row.official, match), index, len(others), row.transform)
        return None

    def format(self, official: str) -> tuple[tuple[str, ...], Transform | None]:
        """The diffusers keys that hold an official tensor, and the transform from the official array to each.

        Raises:
            KeyError: no official file has such a key.
        """
        if self._vae and official.startswith("decoder.upsamples."):
            return (self._format_up_block(official),), None
        for pattern, _, row in self._rows:
            if match := pattern.fullmatch(official):
                return tuple(_with_number(other, match) for other in row.others), row.transform
        raise KeyError(official)

    def _parse_up_block(self, key: str) -> Part | None:
        match = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", key)
        if not match:
            return None
        stage, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
        names = dict((b, a) for a, b in (_RESIDUAL if kind == "resnets" else _RESAMPLE))
        if rest not in names or (index >= self._per_stage - 1 if kind == "resnets" else index):
            return None
        layer = stage * self._per_stage + (index if kind == "resnets" else self._per_stage - 1)
        return Part(f"decoder.upsamples.{layer}.{names[rest]}")

    def _format_up_block(self, official: str) -> str:
        match = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", official)
        if not match:
            raise KeyError(official)
        stage, index = divmod(int(match[1]), self._per_stage)
        resnet = index < self._per_stage - 1
        name = dict(_RESIDUAL if resnet else _RESAMPLE)[match[2]]
        return f"decoder.up_blocks.{stage}.{f'resnets.{index}' if resnet else 'upsamplers.0'}.{name}"


def res_blocks_of(keys: Iterable[str]) -> int:
    """num_res_blocks of a diffusers VAE, read from its keys: a decoder stage has one residual block more."""
    found = [int(m[1]) for key in keys if (m := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", key))]
    return max(found, default=2)
