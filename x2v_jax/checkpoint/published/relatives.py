"""Models that look like Wan2.1 and are others: each is refused by its own name."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.errors import UserError
from x2v_jax.models.config import relative_by_channels

RUNS = "this project runs Wan2.1's T2V and I2V models"

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# Beginnings of diffusers' and transformers' class names, and model_type of an official config.json.
_CLASSES = {
    "WanVACE": "VACE (video editing)",
    "WanAnimate": "Wan-Animate",
    "WanSpeech": "Wan2.2 S2V",
    "WanDMD": "FastWan (FastVideo's few-step Wan)",
    "WanVideoToVideo": "Wan's video-to-video pipeline",
    "SkyReelsV2": "SkyReels-V2",
}
_MODEL_TYPES = {
    "vace": "VACE (video editing)",
    "flf2v": "first-and-last-frame-to-video",
    "ti2v": "Wan2.2 TI2V-5B",
    "s2v": "Wan2.2 S2V",
    "animate": "Wan-Animate",
}


class OtherModel(UserError):
    """What was given is another model than Wan2.1's T2V and I2V. name: which."""

    def __init__(self, where: str, name: str, evidence: str):
        super().__init__(f"{where}: this is {name} ({evidence}); {RUNS}")
        self.name = name


def of_folder(root: pathlib.Path) -> tuple[str, str] | None:
    """Which other model a folder holds as a whole, and what says so; None where nothing speaks against Wan2.1.

    Raises:
        UserError: a JSON file that tells it is damaged.
    """
    index_file = root / "model_index.json"
    index = read_json(index_file) if index_file.is_file() else {}
    kind = str(index.get("_class_name") or "")
    if kind and kind not in _PIPELINES:
        return _class(kind) or f"a {kind} of diffusers", f"_class_name in {index_file.name}"
    if index.get("expand_timesteps"):
        return "Wan2.2 TI2V-5B", f"expand_timesteps in {index_file.name}"
    experts = (root / "transformer_2").is_dir() or _is_part(index.get("transformer_2"))
    if experts or index.get("boundary_ratio") is not None:
        task = _task(root / "transformer" / "config.json", "I2V" if kind == "WanImageToVideoPipeline" else "T2V")
        return f"Wan2.2 {task}-A14B, which has two experts", "transformer_2 and boundary_ratio belong to it"
    for inner in (root, root / "distill_models"):
        found = [name for name in ("high_noise_model", "low_noise_model") if (inner / name).is_dir()]
        if found:
            task = _task(inner / found[0] / "config.json", "")
            return f"Wan2.2 {task + '-' if task else ''}A14B, which has two experts", f"{' and '.join(found)} in it"
    return None


def _is_part(entry: object) -> bool:
    return isinstance(entry, list) and any(item is not None for item in entry)


def _class(name: str) -> str | None:
    return next((model for begin, model in _CLASSES.items() if name.startswith(begin)), None)


def _task(config_file: pathlib.Path, otherwise: str) -> str:
    config = read_json(config_file) if config_file.is_file() else {}
    channels = config.get("in_dim") or config.get("in_channels")
    return {16: "T2V", 36: "I2V"}.get(channels, otherwise) if isinstance(channels, int) else otherwise


def check_transformer(measured: Mapping[str, object], declared: Mapping[str, object]) -> None:
    """Raises an OtherModel for a transformer that is not Wan2.1's.

    Args:
        measured: its sizes, as far as its tensors tell them. declared: config.json.
    """
    if other := _class(str(declared.get("_class_name") or "")):
        raise OtherModel("transformer", other, f"_class_name is {declared['_class_name']!r} in config.json")
    in_dim, out_dim = measured.get("in_dim"), measured.get("out_dim")
    if isinstance(in_dim, int) and isinstance(out_dim, int):
        image = measured.get("model_type") == "i2v"
        if other := relative_by_channels(in_dim, out_dim, image=image):
            clip = "" if image else ", and it has no layers for CLIP"
            raise OtherModel("transformer", other, f"it takes {in_dim} channels and gives {out_dim}{clip}")
    kind = declared.get("model_type", "t2v")
    if isinstance(kind, str) and kind not in ("t2v", "i2v"):
        evidence = f"model_type is {kind!r} in config.json"
        raise OtherModel("transformer", _MODEL_TYPES.get(kind, "another model"), evidence)


def check_vae(shapes: Mapping[str, Sequence[int]], unknown: Iterable[str], declared: Mapping[str, object]) -> None:
    """Raises an OtherModel for Wan2.2's VAE, some of whose names are those of Wan2.1's.

    Args:
        shapes: official key -> shape. unknown: keys that Wan2.1's does not have. declared: config.json.
    """
    nested = next((key for key in unknown if ".0.downsamples.0." in key or ".0.upsamples.0." in key), None)
    last = shapes.get("conv2.weight") or shapes.get("conv2.bias") or (None,)
    if nested or last[0] == 48 or declared.get("is_residual"):
        evidence = (
            f"{nested} is in it" if nested else "48 latent channels" if last[0] == 48 else "is_residual in config.json"
        )
        raise OtherModel("vae", "the VAE of Wan2.2 TI2V-5B", evidence)
