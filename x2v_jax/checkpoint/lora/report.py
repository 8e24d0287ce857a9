"""The account of what every tensor of a LoRA file did to a model, and the likely reason where it did nothing."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from x2v_jax.checkpoint.lora.keys import bare_module

_LISTED = 10

_WIDTHS = {1536: "1.3B", 3072: "Wan2.2 5B", 5120: "14B"}

# Names that other models' LoRAs have and no Wan2.1 transformer has.
_FOREIGN = (
    (r"lora_te\d?_|\Atext_encoder|\Ate\d?[._]", "tensors for a text encoder, which this project does not merge"),
    (r"vace_(?:blocks|patch)", "tensors for a VACE model"),
    (r"face_adapter|motion_encoder|pose_patch|control_adapter|dwpose|audio_", "tensors for a control or audio module"),
    (r"double_blocks|single_blocks", "names of HunyuanVideo or FLUX"),
    (r"transformer_blocks", "names of LTX-Video, CogVideoX or FLUX"),
    (r"(?:input|output|down|up|mid|middle)_blocks?|joint_blocks", "names of Stable Diffusion"),
)


@dataclass(frozen=True)
class Misfit:
    """Tensors (a pair with its alpha, or one difference) whose parameter has another shape in the model.

    `shape` is that of the change which they make, None for a pair whose halves do not even fit each other.
    """

    keys: tuple[str, ...]
    parameter: str
    shape: tuple[int, ...] | None
    expected: tuple[int, ...]

    def __str__(self) -> str:
        made = "its two halves do not fit each other" if self.shape is None else f"changes {list(self.shape)}"
        return f"{self.keys[0]} ({made}; {self.parameter} is {list(self.expected)})"


@dataclass(frozen=True)
class LoraFileReport:
    """What became of the tensors of one file. Keys are the file's own.

    Attributes:
        path: the LoRA file.
        strength: what its changes were multiplied with.
        matched: keys that were used.
        parameters: official names of the parameters that they change.
        unmatched: keys without a parameter in the model, or without their other half in the file.
        misshapen: keys whose parameter has another shape.
    """

    path: pathlib.Path
    strength: float
    matched: tuple[str, ...]
    parameters: tuple[str, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[Misfit, ...]

    @property
    def fits(self) -> bool:
        return not self.unmatched and not self.misshapen

    def reasons(self, model: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Likely reasons for the misfits, the likeliest first.

        Args:
            model: shape of every parameter of the model by official name.
        """
        return _reasons(self, model)

    def __str__(self) -> str:
        misshapen = sum(len(m.keys) for m in self.misshapen)
        total = len(self.matched) + len(self.unmatched) + misshapen
        lines = [
            f"{self.path} at strength {self.strength:g}: {len(self.matched)} of {total} tensors used, "
            f"{len(self.parameters)} parameters changed"
        ]
        if self.unmatched:
            lines.append(f"  {len(self.unmatched)} match no parameter: {_listed(self.unmatched)}")
        if self.misshapen:
            lines.append(f"  {misshapen} have another shape: {_listed(self.misshapen)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class LoraReport:
    """What became of every file, in the order given. notes: sentences about the merge as a whole."""

    files: tuple[LoraFileReport, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*(str(file) for file in self.files), *self.notes])


def requantized(count: int, quantization: str) -> str:
    """The sentence about `count` merged matrices that were 8-bit before and are again."""
    return (
        f"{count} of the changed matrices are {quantization}: they are dequantized, merged in float32 and rounded "
        f"to {quantization} again. Merging into the 16- or 32-bit weights and quantizing the result is more exact"
    )


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(str(item) for item in items[:_LISTED]) + more


def _reasons(file: LoraFileReport, model: Mapping[str, tuple[int, ...]]) -> list[str]:
    keys = [*file.unmatched, *(key for m in file.misshapen for key in m.keys)]
    return [
        reason
        for reason in (
            _task_reason(keys, model),
            _width_reason(file, model),
            _depth_reason(keys, model),
            _channels_reason(file),
            *_name_reasons(file.unmatched),
        )
        if reason
    ]


def _task_reason(keys: Sequence[str], model: Mapping[str, tuple[int, ...]]) -> str | None:
    image = re.compile(r"_img\b|img_emb|add_[kv]_proj|norm_added_k|image_embedder")
    if any(image.search(key) for key in keys) and not any(image.search(key) for key in model):
        return "it was made for an image-to-video model and this one is text-to-video"
    return None


def _width_reason(file: LoraFileReport, model: Mapping[str, tuple[int, ...]]) -> str | None:
    width = next((shape[0] for key, shape in model.items() if key.endswith("self_attn.q.weight")), None)
    for misfit in file.misshapen:
        if re.search(r"_attn\.[a-z_]+\.weight\Z", misfit.parameter) and misfit.shape and misfit.shape[0] != width:
            return f"it was made for a model of width {_named(misfit.shape[0])} and this one has {_named(width)}"
    return None


def _named(width: int | None) -> str:
    return f"{width} ({_WIDTHS[width]})" if width in _WIDTHS else str(width)


def _depth_reason(keys: Sequence[str], model: Mapping[str, tuple[int, ...]]) -> str | None:
    def deepest(names: Sequence[str]) -> int:
        return max((int(m[1]) for m in (re.search(r"\bblocks[._](\d{1,4})[._]", n) for n in names) if m), default=-1)

    bare = [bare_module(key) for key in keys]
    ours, theirs = deepest(list(model)), deepest(bare)
    return f"it has blocks up to {theirs} and the model's last is {ours}" if theirs > ours >= 0 else None


def _channels_reason(file: LoraFileReport) -> str | None:
    for misfit in file.misshapen:
        if misfit.parameter == "patch_embedding.weight":
            return "it changes the model's input channels (an image-to-video or control LoRA, or the reverse)"
    return None


def _name_reasons(keys: Sequence[str]) -> list[str]:
    found = [f"it has {what}" for pattern, what in _FOREIGN if any(re.search(pattern, key) for key in keys)]
    whole = [key for key in keys if re.search(r"(?<!lora_)(?:weight|bias)\Z", key) and ".lora" not in key]
    if whole and not found:
        found.append("it has whole weights beside LoRA tensors, as a checkpoint has")
    return found
