"""Conversion from every layout: the same parameters whatever the source, every key accounted for, whole or absent."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from small_checkpoints import (
    BF16,
    CONFIGS,
    I2V,
    diffusers_folder,
    official_config,
    official_folder,
    random_tensors,
    save,
    save_json,
)

from x2v_jax.checkpoint.conversion.convert import ConversionOptions, convert
from x2v_jax.checkpoint.names import wan
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.published_schedules import SCHEDULES, with_flow_shift
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig

TRANSFORMER = random_tensors("transformer", seed=1)
CONFIG = {"transformer": {"num_heads": 2}}


def parameters(native, component):
    return {name: tensor.read() for name, tensor in native.tensors(component).items()}


def expected(component, tensors, config=None):
    """Parameters by the definition of the table, without streaming."""
    result = {}
    for row in wan.table(component, config or CONFIGS[component]):
        layers = [row.transform.forward(tensors[key]) for key in row.official_keys]
        result[row.native] = layers[0] if row.layers is None else np.stack(layers)
    return result


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert np.array_equal(found[name].view(np.uint8), np.ascontiguousarray(value).view(np.uint8)), name


def transformer_of(path, tensors, destination, **options):
    save(path, tensors)
    options.setdefault("settings", CONFIG)
    notes = convert(path, destination, ConversionOptions(**options))
    return open_checkpoint(destination), notes


@pytest.mark.parametrize("make", [official_folder, diffusers_folder])
@pytest.mark.parametrize("image", [False, True])
def test_every_network_of_a_folder_is_converted_bit_exactly(tmp_path, make, image):
    made = make(tmp_path / "Wan2.1-I2V-14B-720P", image=image)
    convert(tmp_path / "Wan2.1-I2V-14B-720P", tmp_path / "out")
    native = open_checkpoint(tmp_path / "out")
    assert native.task == ("i2v" if image else "t2v")
    assert native.schedule == SCHEDULES["i2v_720p" if image else "t2v_1_3b"]
    for component, tensors in made.items():
        config = I2V if image and component == "transformer" else None
        assert_same(parameters(native, component), expected(component, tensors, config))
        wanted = config or CONFIGS[component]
        if make is diffusers_folder and component == "transformer":
            assert native.config(component).text_len == 512  # diffusers does not say; it pads to 512
        else:
            assert native.config(component) == wanted
    assert json.loads(native.tokenizer_file().read_text())["version"] == "1.0"


def test_the_shift_of_a_diffusers_folder_counts_unless_it_is_a_published_model(tmp_path):
    diffusers_folder(tmp_path / "mine")
    save_json(tmp_path / "mine/scheduler/scheduler_config.json", {"flow_shift": 4.5})
    notes = convert(tmp_path / "mine", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").schedule == dataclasses.replace(SCHEDULES["t2v_1_3b"], shift=4.5)
    assert any("flow_shift 4.5, which counts here in place of the usual 8" in note for note in notes)
    sources = open_checkpoint(tmp_path / "out").model["provenance"]["sources"]
    assert "scheduler/scheduler_config.json" in [entry["file"] for entry in sources]
    name, usual = "Wan2.1-T2V-14B-Diffusers", SCHEDULES["t2v_14b"]
    kept, note = with_flow_shift(usual, 3.0, WanConfig.t2v_14b(), [name])
    assert kept == usual and "says flow_shift 3, and Wan's own 5 for this model counts" in str(note)
    assert with_flow_shift(usual, 3.0, WanConfig.t2v_14b(), ["mine"])[0].shift == 3
    assert with_flow_shift(usual, 3.0, CONFIGS["transformer"], [name])[0].shift == 3
    assert with_flow_shift(usual, 5.0, WanConfig.t2v_14b(), ["mine"]) == (usual, None)


def test_provenance_names_every_source_file_with_its_hash(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(command="python -m convert wan src out"))
    provenance = open_checkpoint(tmp_path / "out").model["provenance"]
    files = {entry["file"]: entry for entry in provenance["sources"]}
    assert set(files) == {
        "diffusion_pytorch_model.safetensors",
        "config.json",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
    }
    for name, entry in files.items():
        content = (tmp_path / "src" / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert provenance["command"] == "python -m convert wan src out"
    assert provenance["loras"] == []


@pytest.mark.parametrize(
    ("file", "variant", "steps", "warp"),
    [
        ("distill_models/distill_model.pt", "distill", (1000, 750, 500, 250), True),
        ("causvid_models/causal_model.safetensors", "causvid", (999, 934, 862, 756, 603, 410, 250, 140, 74), False),
    ],
)
def test_a_variant_brings_its_schedule(tmp_path, file, variant, steps, warp):
    official_folder(tmp_path / "src")
    other = random_tensors("transformer", seed=9)
    save(tmp_path / "src" / file, other)
    with pytest.raises(UserError, match="say which with --variant"):
        convert(tmp_path / "src", tmp_path / "out")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(variant=variant))
    native = open_checkpoint(tmp_path / "out")
    assert native.variant == variant
    schedule = native.schedule
    assert (schedule.denoising_step_list, schedule.warp_denoising_step) == (steps, warp)
    assert (schedule.num_inference_steps, schedule.guidance_scale) == (len(steps), 1.0)
    assert_same(parameters(native, "transformer"), expected("transformer", other))


def test_wrapped_names_of_trainers(tmp_path):
    wrapped = {f"model._fsdp_wrapped_module.{key}": value for key, value in TRANSFORMER.items()}
    native, _ = transformer_of(tmp_path / "self_forcing_dmd.pt", wrapped, tmp_path / "out")
    assert native.variant == "self_forcing"
    assert_same(parameters(native, "transformer"), expected("transformer", TRANSFORMER))


def test_per_block_and_part_files(tmp_path):
    keys = sorted(TRANSFORMER)
    for i in range(3):
        save(tmp_path / f"src/model_part{i}.safetensors", {key: TRANSFORMER[key] for key in keys[i::3]})
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(settings=CONFIG))
    assert_same(parameters(open_checkpoint(tmp_path / "out"), "transformer"), expected("transformer", TRANSFORMER))


def quantized(tensors, kind):
    """As LightX2V writes them: the matrices of blocks in 8 bits with a float32 scale a row."""
    result = {}
    for key, value in tensors.items():
        if key.startswith("blocks.") and value.ndim == 2:
            limit = 127 if kind == "int8" else 448
            scale = np.maximum(np.abs(value).max(1, keepdims=True), 1e-5) / limit
            stored = np.round(value / scale).astype(np.int8) if kind == "int8" else None
            result[key] = stored if stored is not None else (value / scale).astype(ml_dtypes.float8_e4m3fn)
            result[f"{key}_scale"] = scale.astype(np.float32)
        else:
            result[key] = value
    return result


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_files_are_dequantized_with_unrounded_scales(tmp_path, kind):
    stored = quantized(TRANSFORMER, kind)
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    for i in range(3):
        block = {key: value for key, value in stored.items() if key.startswith(f"blocks.{i}.")}
        save(tmp_path / f"src/{kind}/block_{i}.safetensors", block)
    rest = {key: value for key, value in stored.items() if not key.startswith("blocks.")}
    save(tmp_path / f"src/{kind}/non_block.safetensors", rest)
    for dtype in ("keep", "float32"):
        notes = convert(tmp_path / "src", tmp_path / dtype, ConversionOptions(dtype=dtype, quantize="none"))
        assert any("8-bit weights" in note and "scales" in note for note in notes)
        found = parameters(open_checkpoint(tmp_path / dtype), "transformer")
        exact = {}
        for key in TRANSFORMER:
            scale = stored.get(f"{key}_scale")
            exact[key] = stored[key].astype(np.float32) * scale if scale is not None else TRANSFORMER[key]
            if scale is not None and dtype == "keep":
                exact[key] = exact[key].astype(BF16)
        assert_same(found, expected("transformer", exact))


def test_scales_of_blocks_and_of_whole_tensors(tmp_path):
    from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
    from x2v_jax.checkpoint.published.read import KeyConvention, RawTensors, to_official

    def lazy(array):
        return LazyTensor(array.shape, array.dtype, lambda: array)

    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 127, (200, 130)).astype(np.int8)
    blocks = rng.random((2, 2)).astype(np.float32)
    key = "blocks.0.ffn.0.weight"
    for name, scale in ((f"{key}_scale", blocks), ("blocks.0.ffn.0.scale_weight", np.array([0.5], np.float32))):
        found = to_official(RawTensors({key: lazy(weight), name: lazy(scale)}), KeyConvention("transformer"))
        factor = blocks.repeat(128, 0)[:200].repeat(128, 1)[:, :130] if scale is blocks else scale
        assert np.array_equal(found.tensors[key].read(), weight.astype(np.float32) * factor)
        assert found.origin[key] == (key, name)
    wrong = to_official(RawTensors({key: lazy(weight), f"{key}_scale": lazy(blocks[0])}), KeyConvention("transformer"))
    assert "its scale [2]" in wrong.problems[0]
    alone = to_official(RawTensors({key: lazy(weight)}), KeyConvention("transformer"))
    assert "is int8 and blocks.0.ffn.0.weight_scale is missing" in alone.problems[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_can_be_converted_to_another_type(tmp_path, dtype):
    native, _ = transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "out", dtype=dtype)
    target = {"float32": np.float32, "bfloat16": BF16, "float16": np.float16}[dtype]
    wanted = {key: value.astype(target) for key, value in TRANSFORMER.items()}
    assert_same(parameters(native, "transformer"), expected("transformer", wanted))
    assert native.model["components"]["transformer"]["dtype"] == dtype


def test_layers_of_several_types_become_float32(tmp_path):
    mixed = {key: value.astype(BF16) if key.startswith("blocks.0.") else value for key, value in TRANSFORMER.items()}
    native, notes = transformer_of(tmp_path / "m.safetensors", mixed, tmp_path / "out")
    assert any("layers of several types" in note for note in notes)
    wide = {key: value.astype(np.float32) for key, value in mixed.items()}
    assert_same(parameters(native, "transformer"), expected("transformer", wide))


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    large = TRANSFORMER | {"head.head.bias": np.full_like(TRANSFORMER["head.head.bias"], 1e6)}
    with pytest.raises(UserError, match=r"float16: head\.head\.bias has values beyond 65504"):
        transformer_of(tmp_path / "m.safetensors", large, tmp_path / "out", dtype="float16")


def test_every_difference_is_said_at_once(tmp_path):
    official_folder(tmp_path / "src", transformer=False)
    broken = dict(TRANSFORMER)
    del broken["blocks.1.norm3.bias"], broken["head.head.weight"]
    for layer in range(3):
        del broken[f"blocks.{layer}.modulation"]
    broken["vace_blocks.0.before_proj.weight"] = np.zeros((2, 2), np.float32)
    broken["blocks.7.norm3.bias"] = np.zeros(24, np.float32)
    broken["text_embedding.2.bias"] = np.zeros(5, np.float32)
    broken["time_embedding.0.bias"] = np.zeros(24, np.int32)
    save(tmp_path / "src/diffusion_pytorch_model.safetensors", broken)
    vae = random_tensors("vae")
    del vae["conv1.bias"]
    save(tmp_path / "src/Wan2.1_VAE.pth", vae)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "src", tmp_path / "out")
    for words in (
        "5 missing: blocks.{0-2}.modulation, blocks.1.norm3.bias, head.head.weight",
        "2 unexpected:",
        "vace_blocks.0.before_proj.weight",
        "blocks.7.norm3.bias",
        "VACE (video editing), which this project does not run",
        "text_embedding.2.bias has shape [5] and needs [24]",
        "time_embedding.0.bias has type int32",
        "(vae): 1 missing: conv1.bias",
    ):
        assert words in str(error.value), words
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_nan_and_infinity_are_named_and_refused(tmp_path):
    bad = {key: value.copy() for key, value in TRANSFORMER.items()}
    bad["blocks.2.ffn.0.weight"][3, 4] = np.nan
    bad["head.head.bias"][0] = -np.inf
    for dtype in (np.float32, BF16, np.float16):
        stored = {f"model.{key}": value.astype(dtype) for key, value in bad.items()}
        with pytest.raises(UserError, match=r"NaN or infinity in .*--allow-nonfinite") as error:
            transformer_of(tmp_path / "m.safetensors", stored, tmp_path / "out")
        assert "blocks.2.ffn.0.weight" in str(error.value) and "head.head.bias" in str(error.value)
        assert not list(tmp_path.glob("out*"))
    native, notes = transformer_of(tmp_path / "m.safetensors", bad, tmp_path / "out", allow_nonfinite=True)
    assert np.isnan(parameters(native, "transformer")["blocks.ffn.linear_1.kernel"][2, 4, 3])
    assert any("NaN or infinity kept in blocks.2.ffn.0.weight" in note for note in notes)


def test_one_component_alone(tmp_path):
    made = official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(components=("vae",)))
    native = open_checkpoint(tmp_path / "out")
    assert native.components == ("vae",) and native.task is None
    assert_same(parameters(native, "vae"), expected("vae", made["vae"]))
    with pytest.raises(UserError, match=r"--component image_encoder: .* holds none"):
        convert(tmp_path / "src", tmp_path / "o2", ConversionOptions(components=("image_encoder",)))


def test_encoders_and_vae_are_shared_with_another_checkpoint(tmp_path):
    made = official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "base")
    save(tmp_path / "distill_model.safetensors", TRANSFORMER)
    options = ConversionOptions(reuse=str(tmp_path / "base"), settings=CONFIG)
    notes = convert(tmp_path / "distill_model.safetensors", tmp_path / "fast", options)
    assert not any("missing" in note for note in notes)
    native = open_checkpoint(tmp_path / "fast")
    assert native.variant == "distill"
    assert native.model["components"]["vae"] == {"reference": "../base"}
    assert_same(parameters(native, "vae"), expected("vae", made["vae"]))
    assert native.tokenizer_file().is_file()
    tmp_path.joinpath("base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="takes its vae from another checkpoint"):
        open_checkpoint(tmp_path / "fast").tensors("vae")


def test_networks_that_do_not_fit_each_other(tmp_path):
    official_folder(tmp_path / "src")
    other = CONFIGS["text_encoder"].__class__(
        vocab_size=30, dim=18, dim_attn=12, dim_ffn=20, num_heads=2, num_layers=2, num_buckets=8
    )
    save(tmp_path / "src/models_t5_umt5-xxl-enc-bf16.pth", random_tensors("text_encoder", other))
    with pytest.raises(UserError, match="text_encoder: dim is 18, and the transformer's text_dim is 16"):
        convert(tmp_path / "src", tmp_path / "out")


def test_a_lora_is_merged_on_the_original_weights(tmp_path):
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 24)).astype(np.float32), rng.standard_normal((40, 2)).astype(np.float32)
    lora = {
        "diffusion_model.blocks.1.ffn.0.lora_down.weight": down,
        "diffusion_model.blocks.1.ffn.0.lora_up.weight": up,
    }
    path = save(tmp_path / "step_distill.safetensors", lora)
    options = {"loras": ((str(path), 0.5),)}
    native, notes = transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "out", **options)
    merged = dict(TRANSFORMER)
    merged["blocks.1.ffn.0.weight"] = merged["blocks.1.ffn.0.weight"] + 0.5 * (up @ down)
    found, wanted = parameters(native, "transformer"), expected("transformer", merged)
    assert all(np.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    (entry,) = native.model["provenance"]["loras"]
    assert (entry["file"], entry["strength"]) == ("step_distill.safetensors", 0.5)
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert any("2 of 2 tensors used" in note for note in notes) and any("--schedule distill" in note for note in notes)
    second = save(tmp_path / "style.safetensors", lora)
    both = {"loras": ((str(path), 0.5), (str(second), 0.2))}
    _, notes = transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "both", **both)
    assert [sum(file.name in note for note in notes) for file in (path, second)] == [1, 1], "a note for each"
    assert not any(path.name in note and second.name in note for note in notes)
    zero = {"loras": ((str(path), 0.0),)}
    untouched, _ = transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "zero", **zero)
    assert_same(parameters(untouched, "transformer"), expected("transformer", TRANSFORMER))
    named, _ = transformer_of(
        tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "named", schedule="distill", **options
    )
    assert (named.variant, named.schedule) == ("distill", SCHEDULES["distill"])


def test_a_lora_without_a_transformer(tmp_path):
    official_folder(tmp_path / "src")
    path = save(tmp_path / "l.safetensors", {"blocks.0.ffn.0.lora_A.weight": np.ones((2, 24), np.float32)})
    with pytest.raises(UserError, match="--lora: no transformer is converted"):
        convert(tmp_path / "src", tmp_path / "out", ConversionOptions(components=("vae",), loras=((str(path), 1.0),)))


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ('{"shift": 3.5}', {"shift": 3.5}),
        ('{"height": 720, "width": 1280}', {"height": 720, "width": 1280}),
        (
            '{"sampler": "step_distill", "denoising_step_list": [1000, 500], "guidance_scale": 1}',
            {"denoising_step_list": (1000, 500), "num_inference_steps": 2, "guidance_scale": 1},
        ),
    ],
)
def test_the_schedule_can_be_changed(tmp_path, text, changes):
    native, _ = transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "out", schedule=text)
    for name, value in changes.items():
        assert getattr(native.schedule, name) == value
    assert native.schedule.negative_prompt == SCHEDULES["t2v_1_3b"].negative_prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"shfit": 3}', "unknown field 'shfit'; did you mean shift"),
        ('{"shift": "3"}', "shift is '3'; it must be a positive number"),
        ('{"denoising_step_list": [250, 500]}', "falling list"),
        ('{"denoising_step_list": [1000, 0]}', "falling list"),
        ('{"denoising_step_list": [1000, 500]}', "goes with 'step_distill'"),
        ('{"num_frames": 0}', "positive integer"),
        ("{", "not valid JSON"),
        ("distil", "neither JSON nor one of"),
    ],
)
def test_a_wrong_schedule(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "out", schedule=text)
    assert not list(tmp_path.glob("out*"))


def test_a_converted_checkpoint_is_not_converted_again(tmp_path):
    transformer_of(tmp_path / "m.safetensors", TRANSFORMER, tmp_path / "out")
    with pytest.raises(UserError, match="is converted already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_progress_reaches_the_total(tmp_path):
    official_folder(tmp_path / "src")
    seen = []
    convert(tmp_path / "src", tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_what_is_read_or_referred_to_is_never_replaced(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "part", ConversionOptions(dtype="bfloat16", reuse=str(tmp_path / "whole")))
    before = sorted(p.name for p in (tmp_path / "whole").iterdir())
    again = ConversionOptions(dtype="float32", overwrite=True)
    for source, destination, options in (
        ("whole", "whole", again),
        ("part", "part", again),
        ("part", "whole", again),
        ("src", "whole", dataclasses.replace(again, reuse=str(tmp_path / "whole"))),
        ("src", "whole", dataclasses.replace(again, reuse=str(tmp_path / "part"))),
    ):
        with pytest.raises(UserError, match=r"which is read for|that the result would refer to"):
            convert(tmp_path / source, tmp_path / destination, options)
    only = ConversionOptions(components=("transformer",), overwrite=True)
    with pytest.raises(UserError, match=r"part takes its \w+ from .*whole, and the result would have none"):
        convert(tmp_path / "src", tmp_path / "whole", only)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == before
    convert(tmp_path / "src", tmp_path / "whole", ConversionOptions(overwrite=True))  # has all that it had
    open_checkpoint(tmp_path / "part").tensors("vae")


def test_a_kill_in_the_middle_leaves_nothing_at_the_destination(tmp_path):
    official_folder(tmp_path / "src")
    script = f"""
import time
from x2v_jax.checkpoint.conversion.convert import convert
def halt(done, total):
    print("x", flush=True)
    time.sleep(60)
convert({str(tmp_path / "src")!r}, {str(tmp_path / "out")!r}, on_progress=halt)
"""
    root = pathlib.Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "src", tmp_path / "out")  # and the next attempt cleans up behind it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from x2v_jax.checkpoint.files import atomic

    official_folder(tmp_path / "src")
    written = 0
    write = os.pwrite

    def small_disk(descriptor, data, position):
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(atomic.os, "pwrite", small_disk)
    with pytest.raises(UserError, match=r"(?i)no space|full"):
        convert(tmp_path / "src", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": "2"}, "num_heads is '2' in config.json or --set; it must be a whole number"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"patch_size": 2}, "patch_size is 2 in config.json or --set; it must be a list of numbers"),
        ({"eps": "tiny"}, "eps is 'tiny'"),
        ({"attention_head_dim": "12"}, "attention_head_dim is '12'"),
        ({"vae": {"latents_mean": ["a"]}}, "latents_mean is"),
    ],
)
def test_values_of_the_wrong_type_in_config_json_are_named(tmp_path, changes, message):
    official_folder(tmp_path / "src")
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]) | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_no_json_is_refused_before_the_work(tmp_path):
    official_folder(tmp_path / "src")
    (tmp_path / "src/google/umt5-xxl/tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"tokenizer\.json: not valid JSON; download it again"):
        convert(tmp_path / "src", tmp_path / "out")


def test_complex_weights_are_refused_and_long_lists_are_cut(tmp_path):
    official_folder(tmp_path / "src", transformer=False)
    weights = {k: v.astype(np.complex64) for k, v in random_tensors("transformer").items()}
    save(tmp_path / "src/diffusion_pytorch_model.safetensors", weights)
    with pytest.raises(UserError, match=f"{len(weights)} of the wrong type: .* and {len(weights) - 8} more"):
        convert(tmp_path / "src", tmp_path / "out")
