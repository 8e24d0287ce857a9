"""What names of files and folders say where tensors say nothing: which variant, or which relative of Wan2.1."""

import pathlib
import re

# Words in a name that tell the variant and with it the schedule; the first that is found counts.
_VARIANTS = (
    (re.compile(r"self[_-]?forcing"), "self_forcing"),
    (re.compile(r"caus(?:vid|al(?![_-]?forcing))"), "causvid"),
    (re.compile(r"(?<!\d)4[_-]?steps?(?![a-z])|step[_-]?distill"), "distill"),
)
# Words that say that a model is distilled, and not for which steps. "distill" alone is LightX2V's name for its four.
_DISTILLED = re.compile(
    r"(?<!\d)\d{1,2}[_-]?steps?(?![a-z])|cfg[_-]?distill|(?<![a-z])dmd2?(?![a-z])|causal[_-]?forcing"
)
_LIGHTX2V = re.compile(r"distill")
# Wan2.1 as Wan published it.
_ORIGINAL = re.compile(r"wan2[._]1-(t2v|i2v)-(1\.3b|14b)(-(480|720)p)?(-diffusers)?")
_LIGHTX2VS = re.compile(r"^wan2[._]1-.*distill.*lightx2v")
_WAN22 = re.compile(r"wan[._-]?2[._-]2(?!\d)")
_WAN22S = re.compile(r"^wan2[._]2-(t2v|i2v|ti2v|s2v|animate|fun|a14b|5b)")
_EXPERT = re.compile(r"(?<![a-z])(high|low)[._-]?noise(?![a-z])|(?<![a-z])a?14b[._-](high|low)(?![a-z])")
_WAN21 = re.compile(r"wan[._-]?2[._-]1")


def variant_in(name: str) -> str | None:
    """The variant that a name tells, with its steps; None where it tells none.

    >>> variant_in("Wan2.1-T2V-14B-StepDistill-CfgDistill"), variant_in("wan2.1_t2v_14b_lightx2v_4step.safetensors")
    ('distill', 'distill')
    >>> variant_in("distill_model.safetensors"), variant_in("Wan2.1-T2V-14B-CfgDistill"), variant_in("wan_8step")
    ('distill', None, None)
    """
    name = name.lower()
    found = next((variant for pattern, variant in _VARIANTS if pattern.search(name)), None)
    if found is None and _LIGHTX2V.search(name) and not _DISTILLED.search(name):
        return "distill"
    return found


def distilled_in(name: str) -> str | None:
    """The word of a name that says that a model is distilled but not for which steps; None where none does.

    >>> distilled_in("Wan2.1-T2V-14B-CfgDistill"), distilled_in("wan_dmd.pt"), distilled_in("wan_4step_dmd.pt")
    ('CfgDistill', 'dmd', None)
    """
    if variant_in(name) is not None:
        return None
    match = _DISTILLED.search(name.lower())
    return name[match.start() : match.end()] if match else None


def says_distilled(name: str) -> bool:
    """Whether a name says that something is distilled or distills, whatever the steps."""
    return "distill" in (variant_in(name) or "") or distilled_in(name) is not None


def is_original(name: str) -> bool:
    """Whether a folder has the name under which Wan published an original (not distilled) model."""
    return _ORIGINAL.fullmatch(name.lower()) is not None


def has_published_base(name: str) -> bool:
    """Whether a folder has the name of a publication whose shards are an original model.

    They are so in Wan's own, and in LightX2V's, whose distilled weights lie in folders of their own.
    """
    return is_original(name) or _LIGHTX2VS.search(name.lower()) is not None


def folder_names(folder: pathlib.Path) -> tuple[str, ...]:
    """The names that tell of a folder: its own, or in a hub's cache (models--ORG--NAME/snapshots/HASH) the model's."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            model = place.parent.parent.name.split("--")[-1]
            return (model,) if place == folder else (folder.name, model)
    return (folder.name,)


def relative_in(file: str, folders: tuple[str, ...]) -> tuple[str, str] | None:
    """The relative of Wan2.1 that the names of a transformer's file and folders tell, and the name that tells it.

    Wan2.2's T2V experts have Wan2.1's tensors: only their names differ.

    >>> relative_in("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", ("models",))[0]
    'Wan2.2 A14B, its high-noise expert'

    Args:
        folders: nearest first. Of these only names count as Wan gives them.
    """
    for name in (file, *folders):
        own = name.lower()
        if match := _EXPERT.search(own):
            return f"Wan2.2 A14B, its {match[1] or match[2]}-noise expert", f"by the name {name}"
        if (_WAN22 if name == file else _WAN22S).search(own):
            return "Wan2.2", f"by the name {name}"
        if _WAN21.search(own):
            return None
    return None
