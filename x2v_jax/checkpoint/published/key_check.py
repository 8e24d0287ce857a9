"""Compares the tensors that a file holds with those of a network of its sizes; says every difference at once."""

import itertools
import re
from collections.abc import Iterable, Sequence

from x2v_jax.checkpoint.names.wan import official_shapes
from x2v_jax.checkpoint.published.read import OfficialTensors
from x2v_jax.models.config import Config

# Of tensors that are each wrong in a way of their own, so many are named.
_LISTED = 8

# Names that only models outside this project's scope have.
_OTHER_MODELS = (
    ("vace_", "VACE (video editing)"),
    ("img_emb.emb_pos", "first-and-last-frame-to-video"),
    ("image_embedder.pos_embed", "first-and-last-frame-to-video"),
    ("to_gate_compress", "FastWan (FastVideo's few-step Wan)"),
    ("cfg_cond_proj.", "a model distilled for a variable guidance scale"),
    ("affine_norm", "LightX2V's advanced_ptq"),
    ("_cls_pred_branch", "a GAN critic"),
    ("_gan_ca_blocks", "a GAN critic"),
    ("control_adapter", "camera control"),
    ("ref_conv", "reference-image control"),
    ("motion_encoder", "Wan-Animate"),
    ("audio_", "an audio-driven model"),
)


def differences(component: str, config: Config, found: OfficialTensors) -> list[str]:
    """Sentences about tensors that are missing, unexpected, of another shape or type; empty when all is well."""
    expected = official_shapes(component, config)
    tensors = found.tensors
    unusable = {key for key in found.origin if key not in tensors}
    missing = [key for key in expected if key not in tensors and key not in unusable]
    unexpected = [*found.unknown, *(k for key in tensors if key not in expected for k in found.origin[key])]
    misshapen = [
        f"{_own(found, key)} has shape {list(tensors[key].shape)} and needs {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    integers = [
        f"{_own(found, key)} has type {tensor.dtype.name}, not a floating one"
        for key, tensor in tensors.items()
        if tensor.dtype.kind in "iubc"
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {', '.join(ranges(missing))}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {', '.join(ranges(unexpected))}{_hint(unexpected)}")
    for kind, items in (("misshapen", misshapen), ("of the wrong type", integers), ("unusable", list(found.problems))):
        if items:
            more = f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
            problems.append(f"{len(items)} {kind}: {'; '.join(items[:_LISTED])}{more}")
    return problems


def _own(found: OfficialTensors, key: str) -> str:
    return " + ".join(found.origin.get(key, (key,)))


def _hint(keys: Iterable[str]) -> str:
    kinds = other_models(keys)
    return f" (of {' and '.join(kinds)}, which this project does not run)" if kinds else ""


def other_models(keys: Iterable[str]) -> list[str]:
    """The models outside this project's scope that some of the keys belong to.

    >>> other_models(["vace_blocks.0.before_proj.weight", "head.head.bias"])
    ['VACE (video editing)']
    """
    return sorted({kind for key in keys for sign, kind in _OTHER_MODELS if sign in key})


def ranges(keys: Sequence[str]) -> list[str]:
    """Shortens runs of layers; every key stays recognisable.

    >>> ranges(["blocks.0.norm3.bias", "blocks.1.norm3.bias", "blocks.2.norm3.bias", "head.head.bias"])
    ['blocks.{0-2}.norm3.bias', 'head.head.bias']
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        match = re.match(r"(.*?\.)(\d+)(\..*)", key)
        if match:
            layers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            layers[(key, "")] = []
    shown: list[str] = []
    for (before, after), numbers in layers.items():
        if not numbers:
            shown.append(before)
        for run in _runs(sorted(numbers)):
            if len(run) < 3:
                shown += [f"{before}{number}{after}" for number in run]
            else:
                shown.append(f"{before}{{{run[0]}-{run[-1]}}}{after}")
    return shown


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    grouped = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in grouped]
