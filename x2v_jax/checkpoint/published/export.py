"""Writes a native checkpoint back in a published layout, exact to the bit."""

import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.files.arrays import contiguous
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.files.torch_writer import write_torch_file
from x2v_jax.checkpoint.names.diffusers import DiffusersNames
from x2v_jax.checkpoint.names.wan import Transform, official_shapes
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.native.writer import MODEL_FILE, SHARD_BYTES, complete_folder
from x2v_jax.checkpoint.published.export_configs import (
    clip_config,
    image_processor_config,
    model_index,
    scheduler_config,
    text_encoder_config,
    tokenizer_config,
    transformer_config,
    vae_config,
    wan_config,
)
from x2v_jax.checkpoint.published.infer_config import infer_config
from x2v_jax.checkpoint.published.open import official_tensors
from x2v_jax.checkpoint.published.published_schedules import SCHEDULES, default_schedule
from x2v_jax.checkpoint.quantize.eight_bit import WORDS
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS, Config

LAYOUTS = ("wan", "lightx2v", "diffusers")

_WAN_FILES = {
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "vae": "Wan2.1_VAE.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
_LIGHTX2V_FILES = {
    "base": "diffusion_pytorch_model",
    "distill": "distill_models/distill_model",
    "causvid": "causvid_models/causal_model",
}

# What LightX2V calls the types in the names of its files.
_LIGHTX2V_WORDS = {quantization: word for word, quantization in WORDS.items()}

Tensors = Mapping[str, LazyTensor]
OnBytes = Callable[[int], None]


def export(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    layout: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Writes a native checkpoint in a published layout.

    Args:
        layout: wan (the official folder), lightx2v (the same with distill_models/ or causvid_models/) or diffusers.
        on_progress: called with bytes written and bytes in all.

    Returns:
        Sentences for the user about what the layout cannot hold.

    Raises:
        UserError: the checkpoint is not usable, the destination exists, or the layout has no place for the variant.
    """
    native = open_checkpoint(checkpoint)
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: give one of {', '.join(LAYOUTS)}")
    if layout == "lightx2v" and native.variant not in _LIGHTX2V_FILES:
        raise UserError(f"--layout lightx2v: it has no place for {native.variant!r} checkpoints; give --layout wan")
    if (
        native.path.resolve() == pathlib.Path(destination).resolve()
        or (pathlib.Path(destination) / MODEL_FILE).exists()
    ):
        raise UserError(f"{destination} is a converted checkpoint; choose another destination to export to")
    present = [c for c in COMPONENTS if native.has(c)]
    if smoothed := [c for c in present if native.smoothing(c) is not None]:
        raise UserError(
            f"--layout {layout}: no published layout has a place for the factors of the smoothed {smoothed[0]}; export "
            "a checkpoint that was quantized without --smooth, or multiply this one out first with "
            f"`{shipped.command('convert wan … --quantize none')}`"
        )
    quantized = [c for c in present if native.quantization(c)]
    if quantized and layout != "lightx2v":
        raise UserError(
            f"--layout {layout}: it has no place for the 8-bit weights of the {', '.join(quantized)}; give --layout "
            f"lightx2v, or dequantize them first with `{shipped.command('convert wan … --quantize none')}`"
        )
    tensors = {component: official_tensors(native, component) for component in present}
    total = sum(t.nbytes for one in tensors.values() for t in one.values())
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with complete_folder(pathlib.Path(destination), nbytes=total) as folder:
        write = _write_diffusers if layout == "diffusers" else _write_wan
        write(folder, native, tensors, layout, on_bytes)
    return tuple(_notes(native, layout, present))


def _write_wan(
    folder: pathlib.Path, native: NativeCheckpoint, tensors: Mapping[str, Tensors], layout: str, on_bytes: OnBytes
) -> None:
    for component, own in tensors.items():
        quantization = native.quantization(component)
        if quantization is not None:
            _write_8bit(folder, component, own, native.variant, _LIGHTX2V_WORDS[quantization], on_bytes)
        elif component == "transformer":
            name = _LIGHTX2V_FILES[native.variant] if layout == "lightx2v" else _LIGHTX2V_FILES["base"]
            # LightX2V reads a distilled model from this one file; only base weights may be shards.
            limit = SHARD_BYTES if name == _LIGHTX2V_FILES["base"] else None
            _write_safetensors(folder / name, own, on_bytes, limit)
        else:
            write_torch_file(folder / _WAN_FILES[component], _reporting(own, on_bytes))
    described = wan_config(native.config("transformer")) if "transformer" in tensors else {}
    if described := described | _untold_of(native, tensors):
        _write_json(folder / "config.json", described)
    _copy_tokenizer(native, folder / "google/umt5-xxl")


def _write_8bit(
    folder: pathlib.Path, component: str, tensors: Tensors, variant: str, word: str, on_bytes: OnBytes
) -> None:
    """Weights with their scales, where LightX2V's configs expect them."""
    if component == "transformer":
        place = folder / _folder_of_8bit(variant, word)
        # Its loader finds 8-bit weights by their index alone, even of a single file.
        _write_safetensors(place / "diffusion_pytorch_model", tensors, on_bytes, SHARD_BYTES, indexed=True)
    else:
        (folder / word).mkdir(parents=True, exist_ok=True)
        name = {"text_encoder": f"models_t5_umt5-xxl-enc-{word}.pth", "image_encoder": f"clip-{word}.pth"}[component]
        write_torch_file(folder / word / name, _reporting(tensors, on_bytes))


def _folder_of_8bit(variant: str, word: str) -> str:
    return word if variant == "base" else f"{variant}_{word}"


def _untold_of(native: NativeCheckpoint, components: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Component -> what `_untold` finds, of those of which there is something."""
    untold = {component: _untold(component, native.config(component)) for component in components}
    return {component: fields for component, fields in untold.items() if fields}


def _untold(component: str, config: Config) -> dict[str, Any]:
    """The fields of a config that an official file of such a network would not tell (none at the published sizes)."""
    if component == "transformer":
        return {}
    values = config.to_dict()
    try:
        told = infer_config(component, official_shapes(component, config)).to_dict()
    except UserError:
        return values
    return {name: value for name, value in values.items() if told[name] != value}


def _write_diffusers(
    folder: pathlib.Path, native: NativeCheckpoint, tensors: Mapping[str, Tensors], layout: str, on_bytes: OnBytes
) -> None:
    configs: dict[str, Any] = {}
    for component, own in tensors.items():
        config = native.config(component)
        names = DiffusersNames(component, getattr(config, "num_res_blocks", 2))
        if component == "image_encoder" and not own["visual.head"].read().any():
            own = {key: tensor for key, tensor in own.items() if key != "visual.head"}  # CLIPVisionModel has none
        renamed: dict[str, LazyTensor] = {}
        for key, tensor in own.items():
            others, transform = names.format(key)
            for index, other in enumerate(others):
                renamed[other] = _part(tensor, index, len(others), transform)
        make = {
            "transformer": transformer_config,
            "vae": vae_config,
            "text_encoder": text_encoder_config,
            "image_encoder": lambda c, own=own: clip_config(c, with_projection="visual.head" in own),
        }
        configs[component] = make[component](config)
        stem = "diffusion_pytorch_model" if component in ("transformer", "vae") else "model"
        _write_safetensors(folder / component / stem, renamed, on_bytes, SHARD_BYTES)
        _write_json(folder / component / "config.json", configs[component])
    if native.has("tokenizer"):
        _copy_tokenizer(native, folder / "tokenizer")
        text_len = native.config("transformer").text_len if native.has("transformer") else 512
        _write_json(folder / "tokenizer/tokenizer_config.json", tokenizer_config(text_len))
    if native.has("transformer"):
        image = native.task == "i2v"
        if image and native.has("image_encoder"):
            size = native.config("image_encoder").image_size
            _write_json(folder / "image_processor/preprocessor_config.json", image_processor_config(size))
        _write_json(folder / "scheduler/scheduler_config.json", scheduler_config(native.schedule.shift))
        _write_json(folder / "model_index.json", model_index(image, configs))


def _part(tensor: LazyTensor, index: int, count: int, transform: Transform | None) -> LazyTensor:
    if count == 1 and transform is None:
        return tensor
    if transform is not None:
        shape = transform.forward_shape(tensor.shape)
        return LazyTensor(shape, tensor.dtype, lambda: contiguous(transform.forward(tensor.read())))
    rows = tensor.shape[0] // count
    part = slice(index * rows, (index + 1) * rows)
    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[part])


def _reporting(tensors: Tensors, on_bytes: OnBytes) -> dict[str, LazyTensor]:
    """The same tensors; each tells of its bytes when it is read."""

    def counted(tensor: LazyTensor) -> LazyTensor:
        def load():
            on_bytes(tensor.nbytes)
            return tensor.read()

        return LazyTensor(tensor.shape, tensor.dtype, load)

    return {key: counted(tensor) for key, tensor in tensors.items()}


def _write_safetensors(
    path: pathlib.Path, tensors: Tensors, on_bytes: OnBytes, limit: int | None, *, indexed: bool = False
) -> None:
    """PATH.safetensors, or numbered shards with an index where they are larger than `limit`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and limit and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"{path.name}-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else path.name
        weight_map |= dict.fromkeys(keys, f"{name}.safetensors")
        specs = {key: (tensors[key].shape, tensors[key].dtype) for key in keys}
        # transformers and diffusers refuse a file whose metadata does not name the framework.
        with SafetensorsWriter(path.parent / f"{name}.safetensors", specs, {"format": "pt"}) as writer:
            for key in keys:
                writer.write(key, tensors[key])
                on_bytes(tensors[key].nbytes)
    if indexed or len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(path.parent / f"{path.name}.safetensors.index.json", index)


def _write_json(path: pathlib.Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _copy_tokenizer(native: NativeCheckpoint, folder: pathlib.Path) -> None:
    file = native.tokenizer_file()
    if file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / "tokenizer.json")


def _schedule_text(native: NativeCheckpoint, layout: str) -> str | None:
    """What to give as --schedule to get the schedule back; None where the conversion finds it by itself."""
    config = native.config("transformer")
    told = native.variant if layout == "lightx2v" else "base"  # LightX2V's folders tell the variant
    default = default_schedule(told, config)
    if native.schedule == default:
        return None
    if native.schedule == SCHEDULES.get(native.variant):
        return native.variant
    own, usual = native.schedule.to_dict(), default.to_dict()
    return shlex.quote(json.dumps({k: v for k, v in own.items() if v != usual[k]}, ensure_ascii=False))


def _notes(native: NativeCheckpoint, layout: str, present: list[str]):
    for component in present:
        if (quantization := native.quantization(component)) is not None:
            word = _LIGHTX2V_WORDS[quantization]
            place = _folder_of_8bit(native.variant, word) if component == "transformer" else word
            key = {"transformer": "dit", "text_encoder": "t5", "image_encoder": "clip"}[component]
            yield f"{component}: the {word} weights are in {place}/; LightX2V finds them by {key}_quantized_ckpt"
    if native.variant != "base" and "transformer" in present:
        if layout == "lightx2v":
            yield "the schedule is not in the files: LightX2V takes it from its own JSON configs"
        else:
            yield f"the {layout} layout does not say that these weights are {native.variant!r}"
    if "transformer" in present and (text := _schedule_text(native, layout)):
        yield f"the {layout} layout does not hold this checkpoint's schedule: convert it back with --schedule {text}"
    if layout == "diffusers" and "transformer" in present:
        if native.schedule.is_distilled:
            steps = list(native.schedule.denoising_step_list or ())
            yield (
                f"diffusers has no scheduler whose file can hold the steps {steps}: the one written is UniPC, for the "
                "original model. Give the noise levels to set_timesteps of FlowMatchLCMScheduler(shift=1) as its sigmas"
            )
        else:
            yield (
                "diffusers' UniPC begins at noise level 1 - 1e-6 and Wan2.1's at 0.999 before the shift, and nothing "
                "in its file changes that: the same noise gives a slightly different video there (docs/parity.md)"
            )
    if layout != "diffusers" and (untold := _untold_of(native, present)):
        listed = "; ".join(f"{', '.join(fields)} of the {component}" for component, fields in untold.items())
        yield (
            f"these are not the published ones: {listed}. They are in config.json, where this project reads them; "
            f"other programs for the {layout} layout do not"
        )
    if layout != "diffusers" and "image_encoder" in present:
        yield "the CLIP file holds the visual tower only: the text tower, which Wan2.1 does not use, was not kept"
    lacking = [c for c in ("transformer", "vae", "text_encoder", "tokenizer") if not native.has(c)]
    if lacking:
        yield f"not in the checkpoint, so not exported: {', '.join(lacking)}"
