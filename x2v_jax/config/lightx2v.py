"""LightX2V's own JSON files as configs; configs/lightx2v.py is the config file that reads one.

Comments (// and /* */) and trailing commas are allowed. Settings that mean the same here are taken over, those that
only steer LightX2V's CUDA code are named in a warning and ignored, contradictions and unknown keys are refused.
"""

import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from x2v_jax import shipped
from x2v_jax.config.flags import nearest
from x2v_jax.config.inference import inference_config
from x2v_jax.errors import UserError

# LightX2V's key -> ours, where the value means the same.
_SAME = {
    "infer_steps": "num_inference_steps",
    "target_video_length": "num_frames",
    "target_height": "height",
    "target_width": "width",
    "seed": "seed",
    "sample_shift": "shift",
    "fps": "fps",
    "task": "task",
    "model_path": "checkpoint",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image_path": "image",
    "save_video_path": "output",
}
# Keys that are read below.
_READ = (
    "sample_guide_scale",
    "enable_cfg",
    "denoising_step_list",
    "lora_configs",
    "use_tiling_vae",
    "model_cls",
    "text_len",
)
# Keys without effect on what is computed here, by the reason.
_IGNORED = {
    "they steer how LightX2V runs on CUDA": (
        "self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type", "attention_type", "cpu_offload", "offload_ratio",
        "offload_granularity", "lazy_load", "num_disk_workers", "max_memory", "unload_modules", "t5_cpu_offload",
        "t5_offload_granularity", "rotary_chunk", "rotary_chunk_size", "clean_cuda_cache", "use_bfloat16",
        "do_mm_calib", "parallel_attn_type", "parallel_vae", "max_area", "window_size", "vae_stride", "patch_size",
        "num_channels_latents", "sub_servers",
    ),
    "whether weights are in 8 bits is the checkpoint's to say here": (
        "mm_config", "dit_quantized_ckpt", "quant_method", "t5_quantized", "t5_quantized_ckpt", "t5_quant_scheme",
        "clip_quantized", "clip_quantized_ckpt", "clip_quant_scheme",
    ),
    "they approximate, and here every step is computed in full": (
        "teacache_thresh", "use_ret_steps", "coefficients", "sparge", "sparge_ckpt", "tiny_vae", "tiny_vae_path",
        "resolution_rate", "changing_resolution_steps", "changing_resolution", "feature_caching", "cfg_scale",
    ),
}  # fmt: skip
# Keys of autoregressive files -> ours. Their num_frames are latent frames of a fragment.
_CAUSVID = {
    "num_fragments": "num_fragments",
    "num_frames": "rollout_window",
    "num_frame_per_block": "num_frame_per_block",
    "num_blocks": "num_blocks",
    "frame_seq_length": "frame_seq_length",
}
_MODEL_CLASSES = ("wan2.1", "wan2.1_distill", "wan2.1_causvid")


def get_config(path: str = ""):
    """The config that LightX2V's JSON file `path` describes.

    Raises:
        UserError: the file cannot be read, or asks for what cannot be done or contradicts itself.
    """
    values = read_json(path)
    try:
        return inference_config(**translate(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """LightX2V's settings as keys of `inference_config`.

    Raises:
        UserError: unknown keys, contradictions, or models that are not Wan2.1.
    """
    _check_keys(values)
    _check_model(values)
    steps, guided = values.get("denoising_step_list"), values.get("enable_cfg")
    if values.get("enable_dynamic_cfg"):
        raise UserError("enable_dynamic_cfg is true; that variant has weights of its own, set it to false")
    if steps is not None and guided:
        raise UserError(
            "enable_cfg is true beside a denoising_step_list, and a distilled model has guidance trained in; set "
            "enable_cfg to false"
        )
    if steps is not None and values.get("feature_caching", "NoCaching") != "NoCaching":
        raise UserError(
            f"feature_caching is {values['feature_caching']!r} beside a denoising_step_list, whose few steps have "
            "nothing to reuse; set it to 'NoCaching'"
        )
    _warn_ignored(values)
    ours = {_SAME[key]: value for key, value in values.items() if key in _SAME and value not in (None, "")}
    if _is_causvid(values):
        ours |= _causvid(values)
        ours.pop("num_frames", None)  # of target_video_length, which LightX2V does not look at either
    if steps is not None:
        ours["denoising_step_list"] = steps
        if ours.pop("num_inference_steps", len(steps)) != len(steps):
            warnings.warn(f"infer_steps is ignored: denoising_step_list has {len(steps)} steps", stacklevel=2)
    ours["guidance_scale"] = _guidance(values, is_distilled=steps is not None)
    if not isinstance(values.get("lora_configs") or [], list):
        raise UserError(f'lora_configs is {values["lora_configs"]!r}; give a list of {{"path": FILE, "strength": 1.0}}')
    if "lora_configs" in values:
        ours["lora"] = tuple(_lora(entry) for entry in values["lora_configs"] or ())
    if values.get("use_tiling_vae"):
        ours["vae_decode"] = "tiled"
    if values.get("task") == "i2v" and isinstance(ours.get("num_frames"), int) and ours["num_frames"] % 4 != 1:
        fitting = ours["num_frames"] // 4 * 4 + 1  # as LightX2V rounds
        warnings.warn(f"target_video_length {ours['num_frames']} becomes {fitting}, of the form 4n+1", stacklevel=2)
        ours["num_frames"] = fitting
    return {key: value for key, value in ours.items() if value is not None}


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file that may hold // and /* */ comments and trailing commas.

    Raises:
        UserError: no such file, or no JSON object in it (with line and column).
    """
    if not path:
        raise UserError("configs/lightx2v.py needs the JSON file: write --config=configs/lightx2v.py:FILE.json")
    try:
        text = pathlib.Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the path of LightX2V's JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give the path of LightX2V's JSON file") from None
    try:
        values = json.loads(strip_comments(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; mend it there") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; LightX2V's files hold an object {{…}}")
    if values.get("program") == "x2v-jax":
        raise UserError(f"{path} holds the settings of a video and is no config; write --rerun {path}")
    return values


def strip_comments(text: str) -> str:
    """Blanks comments and trailing commas outside strings; every other character keeps its line and column."""
    string = r'"(?:\\.|[^"\\\n])*"'

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    text = re.sub(rf"{string}|//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
    return re.sub(rf"{string}|,(?=\s*[}}\]])", blank, text)


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [*_SAME, *_READ, *_CAUSVID, "enable_dynamic_cfg", *(key for keys in _IGNORED.values() for key in keys)]
    for key in values:
        if key not in known:
            near = nearest(key, known)
            raise UserError(
                f"unknown key {key!r}; " + (near if near.startswith("did") else "LightX2V has no such setting")
            )


def _check_model(values: Mapping[str, Any]) -> None:
    model, steps = values.get("model_cls"), values.get("denoising_step_list")
    if _is_causvid(values):
        model = _check_causvid(values)
    if model is not None and model not in _MODEL_CLASSES:
        raise UserError(f"model_cls is {model!r}; this project runs {', '.join(_MODEL_CLASSES)}")
    if model == "wan2.1" and steps is not None:
        raise UserError(
            "model_cls is 'wan2.1' beside a denoising_step_list, which that class ignores; set 'wan2.1_distill' or "
            "take the list out"
        )
    if model in ("wan2.1_distill", "wan2.1_causvid") and steps is None:
        raise UserError(f"model_cls is {model!r} without its denoising_step_list, such as [1000, 750, 500, 250]")
    if steps is not None and not isinstance(steps, list):
        raise UserError(f"denoising_step_list is {steps!r}; give a list such as [1000, 750, 500, 250]")


def _is_causvid(values: Mapping[str, Any]) -> bool:
    """Whether the settings are of an autoregressive model. LightX2V's own files say so by their keys only."""
    return values.get("model_cls") == "wan2.1_causvid" or any(key in values for key in _CAUSVID)


def _check_causvid(values: Mapping[str, Any]) -> str:
    given = [key for key in _CAUSVID if key in values]
    if values.get("model_cls", "wan2.1_causvid") != "wan2.1_causvid":
        raise UserError(
            f"model_cls is {values['model_cls']!r} beside {', '.join(given)}, which are settings of autoregressive "
            "models; set 'wan2.1_causvid' or take them out"
        )
    if values.get("task") == "i2v":
        raise UserError(
            "task is 'i2v' in settings of an autoregressive model, of which only text-to-video weights are published; "
            "set 't2v', and image_path for the first frame"
        )
    for key in given:
        if isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < 1:
            raise UserError(f"{key} is {values[key]!r}; give a whole number from 1 on")
    frames, block, blocks = (values.get(key) for key in ("num_frames", "num_frame_per_block", "num_blocks"))
    if frames is not None and block is not None and blocks is not None and frames != block * blocks:
        raise UserError(
            f"num_frames is {frames} latent frames, but num_blocks {blocks} of num_frame_per_block {block} are "
            f"{blocks * block}; make them agree"
        )
    return "wan2.1_causvid"


def _causvid(values: Mapping[str, Any]) -> dict[str, Any]:
    """Length and window of an autoregressive video; its step list is one that is not to be warped again."""
    ours = {mine: values[key] for key, mine in _CAUSVID.items() if key in values}
    return {"num_fragments": 1, "rollout_mode": "fragments", "warp_denoising_step": False} | ours


def _guidance(values: Mapping[str, Any], *, is_distilled: bool) -> Any:
    # LightX2V's distilled files keep a sample_guide_scale that enable_cfg false switches off.
    if is_distilled or values.get("enable_cfg") is False:
        return 1.0
    return values.get("sample_guide_scale")


def _lora(entry: Any) -> tuple[str, float]:
    strength = entry.get("strength", 1.0) if isinstance(entry, dict) else None
    if not isinstance(strength, int | float) or not isinstance(entry.get("path"), str):
        raise UserError(f'lora_configs holds {entry!r}; give {{"path": FILE, "strength": 1.0}}')
    return entry["path"], float(strength)


def _warn_ignored(values: Mapping[str, Any]) -> None:
    for reason, keys in _IGNORED.items():
        used = [key for key in keys if values.get(key) not in (None, False, {}, [], "", "NoCaching")]
        if used:
            verb = "is" if len(used) == 1 else "are"
            warnings.warn(f"{', '.join(used)} {verb} ignored: {reason}{_advice(used, values)}", stacklevel=3)
    if values.get("text_len", 512) != 512:
        warnings.warn(f"text_len {values['text_len']} is ignored: the checkpoint's own is used", stacklevel=3)


def _advice(used: list[str], values: Mapping[str, Any]) -> str:
    """How to get the 8-bit matrices that LightX2V's settings ask for."""
    if not {"mm_config", "quant_method", "dit_quantized_ckpt"}.intersection(used):
        return ""
    config = values.get("mm_config")
    kinds = (config.get("mm_type") if isinstance(config, dict) else config, values.get("quant_method"))
    asked = " ".join(map(str, kinds)).lower()
    kind = next((kind for kind in ("int8", "fp8") if kind in asked), None)
    if kind is None:
        return ""
    command = shipped.command(f"convert wan SRC DST --quantize {kind}")
    return f". The file asks for {kind} matrices: where the checkpoint has 16-bit weights, `{command}` makes them"
