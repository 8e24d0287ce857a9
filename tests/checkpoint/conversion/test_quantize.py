"""8-bit checkpoints: LightX2V's formulas, its files kept bit for bit, and what is refused."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from small_checkpoints import (
    BF16,
    CONFIGS,
    I2V,
    official_config,
    official_folder,
    random_tensors,
    save,
    save_json,
)

from x2v_jax.checkpoint.conversion import stream
from x2v_jax.checkpoint.conversion.compare import against_notes
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.inspect import inspect, to_text
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.conversion.quantization_report import quantization_report, summary
from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.checkpoint.lora.extract import extract_lora
from x2v_jax.checkpoint.names import wan
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.export import export
from x2v_jax.checkpoint.quantize.eight_bit import DTYPES, dequantize, quantize
from x2v_jax.errors import UserError
from x2v_jax.models import config
from x2v_jax.models.config import CONFIGS as SIZES
from x2v_jax.models.config import WanConfig

WORDS = {"int8": "int8", "fp8": "float8_e4m3fn"}
TRANSFORMER = random_tensors("transformer", seed=1)


def is_matrix(key, value):
    return value.ndim == 2 and (".attn." in key or ".ffn." in key or "_attn." in key or ".mlp." in key)


def lightx2v(tensors, word, scale_dtype: Any = np.float32):
    """As LightX2V's converter writes them, written out anew: KEY.weight in 8 bits and KEY.weight_scale [out, 1]."""
    result = {}
    for key, value in tensors.items():
        if not is_matrix(key, value):
            result[key] = value
            continue
        scale = (
            np.maximum(np.abs(value.astype(np.float32)).max(1, keepdims=True), 1e-5) / {"int8": 127, "fp8": 448}[word]
        )
        scaled = value.astype(np.float32) / scale.astype(np.float32)
        stored = np.round(scaled).astype(np.int8) if word == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
        result |= {key: stored, f"{key}_scale": scale.astype(scale_dtype)}
    return result


def blocks_of(root: pathlib.Path, stored, count=3):
    """LightX2V's files a block, with their index."""
    groups = {f"block_{i}": {k: v for k, v in stored.items() if k.startswith(f"blocks.{i}.")} for i in range(count)}
    groups["non_block"] = {k: v for k, v in stored.items() if not k.startswith("blocks.")}
    for name, tensors in groups.items():
        save(root / f"{name}.safetensors", tensors)
    weight_map = {key: f"{name}.safetensors" for name, tensors in groups.items() for key in tensors}
    save_json(root / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})


def quantized_source(root: pathlib.Path, word, **changes):
    save_json(root / "config.json", official_config(CONFIGS["transformer"]))
    blocks_of(root / word, lightx2v(TRANSFORMER, word) | changes)
    return root


def same_bits(one, other):
    one, other = (np.ascontiguousarray(np.asarray(x)) for x in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def assert_holds(native, component, stored, config=None):
    """The native tensors are those of the file, stacked, 8-bit values and scales to the bit."""
    found = native.tensors(component)
    for row in wan.table(component, config or CONFIGS[component], native.quantization(component)):
        layers = [row.transform.forward(stored[key]) for key in row.official_keys]
        assert same_bits(found[row.native], layers[0] if row.layers is None else np.stack(layers)), row.native


@pytest.mark.parametrize("word", WORDS)
def test_the_formula_is_that_of_lightx2vs_converter(word):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 33)).astype(np.float32) * rng.uniform(1e-6, 30, (7, 1)).astype(np.float32)
    weight[2] = 0
    weight[3] = 1e-7  # below the smallest scale
    values, scale = quantize(weight, WORDS[word], "w")
    expected = lightx2v({"ffn.x.ffn.0": weight}, word)["ffn.x.ffn.0"]
    assert same_bits(values, expected) and scale.dtype == np.float32
    limit = {"int8": 127, "fp8": 448}[word]
    assert np.array_equal(scale, np.maximum(np.abs(weight).max(1), np.float32(1e-5)) / np.float32(limit))
    assert not values[2].astype(np.float32).any() and scale[2] == np.float32(1e-5) / np.float32(limit)
    error = np.abs(dequantize(values, scale) - weight)
    bound = scale[:, None] / 2 if word == "int8" else np.maximum(np.abs(weight) / 16, scale[:, None] * 2.0**-10)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("word", WORDS)
def test_it_agrees_with_the_operations_quantizer_and_needs_no_more_than_a_piece(word, monkeypatch):
    from x2v_jax.checkpoint.files import arrays
    from x2v_jax.ops.linear_8bit import quantize_weight

    weight = np.random.default_rng(1).standard_normal((40, 24)).astype(BF16)
    values, scale = quantize_weight(weight, WORDS[word])
    monkeypatch.setattr(arrays, "_PIECE", 100)
    own_values, own_scale = quantize(weight, WORDS[word], "w")
    assert same_bits(own_values, values) and same_bits(own_scale, scale)


@pytest.mark.parametrize(
    ("config", "count", "share"),
    [(WanConfig.t2v_1_3b(), 300, 0.981), (WanConfig.t2v_14b(), 400, 0.983), (WanConfig.i2v_14b(), 480, 0.985)],
)
def test_the_matrices_are_those_that_lightx2v_quantizes(config, count, share):
    rows = [row for row in wan.table("transformer", config) if row.is_quantizable]
    assert sum(len(row.official_keys) for row in rows) == count
    assert all(key.split(".")[2] in ("self_attn", "cross_attn", "ffn") for row in rows for key in row.official_keys)
    assert sum(row.size for row in rows) / wan.parameter_count("transformer", config) == pytest.approx(share, abs=6e-4)
    shapes = wan.native_shapes("transformer", config, "int8")
    assert shapes["blocks.ffn.linear_1.weight"] == (config.num_layers, config.ffn_dim, config.dim)
    assert shapes["blocks.ffn.linear_1.scale"] == (config.num_layers, config.ffn_dim)
    for component, total in (("text_encoder", 168), ("image_encoder", 128)):
        rows = wan.table(component, SIZES[component]())
        assert sum(len(row.official_keys) for row in rows if row.is_quantizable) == total


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_quantizing_a_published_folder(tmp_path, word):
    made = official_folder(tmp_path / "src", image=True)
    everything = ("transformer", "text_encoder", "image_encoder")
    seen = []
    notes = convert(
        tmp_path / "src",
        tmp_path / "out",
        ConversionOptions(quantize=word, quantize_components=everything),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] and len(seen) > 100  # a layer at a time
    assert f"transformer: 36 matrices become {WORDS[word]} with a float32 scale a row" in notes
    native = open_checkpoint(tmp_path / "out")
    assert native.model["quantization"] == {name: {"dtype": WORDS[word]} for name in everything}
    assert native.model["format_version"] == 2
    assert (native.quantization("vae"), native.quantization("transformer")) == (None, WORDS[word])
    assert native.model["components"]["transformer"]["parameters"] == wan.parameter_count("transformer", I2V)
    for component in everything:
        config = I2V if component == "transformer" else CONFIGS[component]
        assert_holds(native, component, lightx2v(made[component], word), config)
    only = convert(tmp_path / "src", tmp_path / "only", ConversionOptions(quantize=word, dtype="bfloat16"))
    assert any("matrices become" in note for note in only)
    tensors = open_checkpoint(tmp_path / "only").tensors("transformer")
    assert tensors["blocks.ffn.linear_1.bias"].dtype == BF16
    assert tensors["blocks.ffn.linear_1.scale"].dtype == np.float32
    assert open_checkpoint(tmp_path / "only").quantization("text_encoder") is None


def test_floats_alone_are_still_written_as_version_1(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out")
    model = open_checkpoint(tmp_path / "out").model
    assert (model["format_version"], model["quantization"]) == (1, None)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_lightx2vs_own_files_are_kept_and_come_back_bit_for_bit(tmp_path, word):
    made = official_folder(tmp_path / "src", image=True, transformer=False)
    stored = {name: lightx2v(made.get(name) or random_tensors(name, I2V), word) for name in ("transformer", *made)}
    for file in tmp_path.glob("src/models_*"):
        file.unlink()
    blocks_of(tmp_path / f"src/distill_{word}", stored["transformer"])
    save(tmp_path / f"src/{word}/models_t5_umt5-xxl-enc-{word}.pth", stored["text_encoder"])
    save(tmp_path / f"src/{word}/clip-{word}.pth", stored["image_encoder"])
    notes = convert(tmp_path / "src", tmp_path / "out")
    assert any(f"36 matrices are {WORDS[word]} and stay so, bit for bit" in note for note in notes)
    native = open_checkpoint(tmp_path / "out")
    assert native.variant == "distill"
    for name in ("transformer", "text_encoder", "image_encoder"):
        assert_holds(native, name, stored[name], I2V if name == "transformer" else CONFIGS[name])

    notes = export(tmp_path / "out", tmp_path / "back", "lightx2v")
    assert any(f"distill_{word}/; LightX2V finds them by dit_quantized_ckpt" in note for note in notes)
    folder = tmp_path / f"back/distill_{word}"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    back = {
        "transformer": read_safetensors(folder / "diffusion_pytorch_model.safetensors"),
        "text_encoder": read_torch_file(tmp_path / f"back/{word}/models_t5_umt5-xxl-enc-{word}.pth"),
        "image_encoder": read_torch_file(tmp_path / f"back/{word}/clip-{word}.pth"),
    }
    assert set(index["weight_map"]) == set(back["transformer"])
    for name, tensors in back.items():
        assert set(tensors) == set(stored[name])
        assert all(same_bits(tensors[key], value) for key, value in stored[name].items())
    convert(tmp_path / "back", tmp_path / "again")
    for name in ("transformer", "text_encoder", "image_encoder"):
        assert_holds(open_checkpoint(tmp_path / "again"), name, stored[name], I2V if name == "transformer" else None)
    for layout in ("wan", "diffusers"):
        with pytest.raises(UserError, match=f"--layout {layout}: it has no place for the 8-bit weights"):
            export(tmp_path / "out", tmp_path / "no", layout)


def test_parts_of_a_hundred_tensors(tmp_path):
    stored = lightx2v(TRANSFORMER, "fp8")
    keys = list(stored)
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    weight_map = {}
    for part in range(0, len(keys), 100):
        name = f"wan_part{part // 100 + 1}.safetensors"
        save(tmp_path / "src/fp8" / name, {key: stored[key] for key in keys[part : part + 100]})
        weight_map |= dict.fromkeys(keys[part : part + 100], name)
    save_json(tmp_path / "src/fp8/wan.safetensors.index.json", {"weight_map": weight_map})
    convert(tmp_path / "src", tmp_path / "out")
    assert_holds(open_checkpoint(tmp_path / "out"), "transformer", stored)


def test_scales_that_were_rounded_are_kept_and_said(tmp_path):
    stored = lightx2v(TRANSFORMER, "int8", BF16)
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    blocks_of(tmp_path / "src/int8", stored)
    notes = convert(tmp_path / "src", tmp_path / "out")
    assert any("keep the scales as bfloat16, so each is off by up to 0.4 %" in note for note in notes)
    wide = {key: v.astype(np.float32) if key.endswith("_scale") else v for key, v in stored.items()}
    assert_holds(open_checkpoint(tmp_path / "out"), "transformer", wide)


def test_one_scale_a_matrix_is_repeated_for_its_rows(tmp_path):
    """ComfyUI's way, and plain casts to fp8 without any scale."""
    for index, scale in enumerate((np.array([0.5], np.float32), None)):
        stored = {}
        for key, value in TRANSFORMER.items():
            stored[key] = value.astype(ml_dtypes.float8_e4m3fn) if is_matrix(key, value) else value
            if is_matrix(key, value) and scale is not None:
                stored[key.replace(".weight", ".scale_weight")] = scale
        save_json(tmp_path / f"{index}/config.json", official_config(CONFIGS["transformer"]))
        save(tmp_path / f"{index}/x.safetensors", stored)
        convert(tmp_path / f"{index}/x.safetensors", tmp_path / f"out{index}")
        tensors = open_checkpoint(tmp_path / f"out{index}").tensors("transformer")
        assert (np.asarray(tensors["blocks.ffn.linear_1.scale"]) == (1 if scale is None else 0.5)).all()
        first = np.asarray(tensors["blocks.ffn.linear_1.weight"])[0]
        assert same_bits(first, stored["blocks.0.ffn.0.weight"])


def test_scales_by_blocks_are_dequantized_by_name(tmp_path):
    stored = lightx2v(TRANSFORMER, "fp8")
    stored |= {key: np.ones((1, 1), np.float32) for key in stored if key.endswith("_scale") and ".ffn.0." in key}
    key = "blocks.0.ffn.0.weight"
    stored |= {key: np.zeros((40, 24), np.int8), f"{key}_scale": np.ones((1, 1), np.float32)}
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    blocks_of(tmp_path / "src/fp8", stored)
    notes = convert(tmp_path / "src", tmp_path / "out")
    assert any("cannot be run as they are" in note for note in notes)
    assert open_checkpoint(tmp_path / "out").quantization("transformer") is None
    with pytest.raises(UserError, match="is 8-bit in another way already"):
        convert(tmp_path / "src", tmp_path / "no", ConversionOptions(quantize="fp8"))


@pytest.mark.parametrize("word", WORDS)
def test_a_native_checkpoint_to_8_bits_and_out_of_them(tmp_path, word):
    made = official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "out", ConversionOptions(quantize=word, reuse=str(tmp_path / "native")))
    native = open_checkpoint(tmp_path / "out")
    assert_holds(native, "transformer", lightx2v(made["transformer"], word))
    assert native.model["components"]["vae"] == {"reference": "../native"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.json", "transformer.safetensors"]
    convert(
        tmp_path / "native", tmp_path / "whole", ConversionOptions(quantize=word, quantize_components=("text_encoder",))
    )
    whole = open_checkpoint(tmp_path / "whole")
    assert (whole.quantization("text_encoder"), whole.quantization("transformer")) == (WORDS[word], None)
    assert whole.tokenizer_file() == tmp_path / "whole/tokenizer.json"
    for component in ("transformer", "vae"):
        old = open_checkpoint(tmp_path / "native").tensors(component)
        assert all(same_bits(tensor, old[name]) for name, tensor in whole.tensors(component).items())
    # A referenced network goes on being referenced, and takes its quantization from where it is.
    convert(tmp_path / "out", tmp_path / "third", ConversionOptions(dtype="bfloat16"))
    third = open_checkpoint(tmp_path / "third")
    assert third.quantization("transformer") == WORDS[word]
    assert third.model["components"]["text_encoder"] == {"reference": "../native"}
    convert(tmp_path / "out", tmp_path / "floats", ConversionOptions(quantize="none", dtype="float32"))
    floats = open_checkpoint(tmp_path / "floats")
    assert floats.model["quantization"] is None
    stored = lightx2v(made["transformer"], word)
    key = "blocks.1.cross_attn.o.weight"
    exact = dequantize(stored[key], stored[f"{key}_scale"][:, 0])
    assert np.array_equal(np.asarray(floats.tensors("transformer")["blocks.cross_attn.o.kernel"])[1], exact.T)


def lora_file(path, keys, rank=2):
    rng = np.random.default_rng(5)
    tensors = {}
    for key in keys:
        out, inputs = TRANSFORMER[f"{key}.weight"].shape
        tensors[f"diffusion_model.{key}.lora_up.weight"] = rng.standard_normal((out, rank)).astype(np.float32)
        tensors[f"diffusion_model.{key}.lora_down.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
    save(path, tensors)
    return {
        f"{key}.weight": tensors[f"diffusion_model.{key}.lora_up.weight"]
        @ tensors[f"diffusion_model.{key}.lora_down.weight"]
        for key in keys
    }


@pytest.mark.parametrize("word", WORDS)
def test_a_lora_is_merged_into_what_the_weights_stand_for_and_rounded_again(tmp_path, word):
    from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into_native

    quantized_source(tmp_path / "src", word)
    changes = lora_file(tmp_path / "l.safetensors", ["blocks.1.ffn.0", "blocks.2.self_attn.q", "head.head"])
    path = str(tmp_path / "l.safetensors")
    notes = convert(tmp_path / "src", tmp_path / "out", ConversionOptions(loras=((path, 0.5),)))
    said = f"2 of the changed matrices are {WORDS[word]}: they are dequantized, merged in float32 and rounded"
    assert any(said in note for note in notes)
    assert f"transformer: 28 matrices are {WORDS[word]} and stay so, bit for bit" in notes
    stored = lightx2v(TRANSFORMER, word)
    expected = dict(stored)
    expected["head.head.weight"] = stored["head.head.weight"] + np.float32(0.5) * changes["head.head.weight"]
    for key in ("blocks.1.ffn.0.weight", "blocks.2.self_attn.q.weight"):
        floats = dequantize(stored[key], stored[f"{key}_scale"][:, 0]) + np.float32(0.5) * changes[key]
        expected |= lightx2v({key: floats}, word)
    native = open_checkpoint(tmp_path / "out")
    tensors = native.tensors("transformer")
    rows = {row.native: row for row in wan.table("transformer", CONFIGS["transformer"], WORDS[word])}
    for name in ("blocks.ffn.linear_1", "blocks.self_attn.q"):
        values, scale = (np.asarray(tensors[f"{name}.{part}"]) for part in ("weight", "scale"))
        for layer, key in enumerate(rows[f"{name}.weight"].official_keys):
            exact = dequantize(expected[key], expected[f"{key}_scale"][:, 0])
            assert np.allclose(dequantize(values[layer], scale[layer]), exact, atol=np.abs(exact).max() / 15)
            assert same_bits(values[layer], stored[key]) == (key not in changes)

    # The same when it is merged on the way to the device, whichever of weight and scale is read first.
    convert(tmp_path / "src", tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    floats = wan.table("transformer", base.config("transformer"))
    for order in ((0, 1), (1, 0)):
        loaded, report = merge_into_native(base.tensors("transformer"), [(LoraFile.open(path), 0.5)], floats)
        assert said in str(report)
        parts = ("blocks.ffn.linear_1.weight", "blocks.ffn.linear_1.scale")
        read = {parts[i]: np.asarray(loaded[parts[i]]) for i in order}
        assert all(same_bits(read[name], tensors[name]) for name in parts)
    _, report = merge_into_native(base.tensors("transformer"), [(LoraFile.open(path), 0.0)], floats)
    assert not report.notes
    again = convert(tmp_path / "base", tmp_path / "merged", ConversionOptions(loras=((path, 0.5),)))
    assert any(said in note for note in again)
    merged = open_checkpoint(tmp_path / "merged")
    assert all(same_bits(t, tensors[name]) for name, t in merged.tensors("transformer").items())
    assert [entry["strength"] for entry in merged.model["provenance"]["loras"]] == [0.5]
    twice = convert(tmp_path / "merged", tmp_path / "twice", ConversionOptions(loras=((path, -0.5),), quantize="none"))
    assert not any(said in note for note in twice)
    assert [e["strength"] for e in open_checkpoint(tmp_path / "twice").model["provenance"]["loras"]] == [0.5, -0.5]


def test_a_lora_before_quantizing_is_rounded_once(tmp_path):
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    save(tmp_path / "src/diffusion_pytorch_model.safetensors", TRANSFORMER)
    changes = lora_file(tmp_path / "l.safetensors", ["blocks.0.ffn.2"])
    options = ConversionOptions(loras=((str(tmp_path / "l.safetensors"), 1.0),), quantize="int8")
    notes = convert(tmp_path / "src", tmp_path / "out", options)
    assert not any("rounded to int8 again" in note for note in notes)
    key = "blocks.0.ffn.2.weight"
    expected, _ = quantize(TRANSFORMER[key] + changes[key], "int8", key)
    assert np.array_equal(
        np.asarray(open_checkpoint(tmp_path / "out").tensors("transformer")["blocks.ffn.linear_2.weight"])[0], expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_inspect_tells_the_error_of_each_matrix(tmp_path, word):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize=word))
    found = inspect(tmp_path / "out")
    assert found.networks[0].quantization == WORDS[word]
    assert found.networks[0].parameters == wan.parameter_count("transformer", CONFIGS["transformer"])
    assert f"matrices of the blocks: {WORDS[word]}" in to_text(found)
    reports = list(quantization_report(tmp_path / "out", tmp_path / "src"))
    assert len(reports) == 30 and {r.dtype for r in reports} == {WORDS[word]}
    for report in reports:
        assert report.relative_error is not None and report.cosine is not None and report.decibels is not None
        assert 0.003 < report.relative_error < (0.012 if word == "int8" else 0.04)
        assert report.cosine > 0.999 and report.decibels > 28
        assert 0 < report.smallest_scale < report.largest_scale and 0 < report.saturated < 0.1
    assert "error" in str(reports[0]) and "at the most" in summary(reports)[0]
    bare = next(quantization_report(tmp_path / "out"))
    assert bare.relative_error is None and "error" not in str(bare)
    exported = tmp_path / "back"
    export(tmp_path / "out", exported, "lightx2v")
    assert [str(r) for r in quantization_report(exported, tmp_path / "src")] == [str(r) for r in reports]
    with pytest.raises(UserError, match="none of its matrices is 8-bit"):
        list(quantization_report(tmp_path / "src"))
    with pytest.raises(UserError, match="is 8-bit too"):
        list(quantization_report(tmp_path / "out", tmp_path / "out"))
    other = tmp_path / "other"
    tiny_models.write_checkpoint(other)
    with pytest.raises(UserError, match=r"its transformer is of another task or other sizes .*dim is 32 there and 24"):
        list(quantization_report(tmp_path / "out", other))


def test_errors_against_another_model_are_refused_or_told(tmp_path):
    """i2v has all matrices of t2v, and another model of the same sizes has them all."""
    official_folder(tmp_path / "src")
    official_folder(tmp_path / "i2v", image=True)
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize="int8"))
    with pytest.raises(UserError, match=r"--against .*i2v: its transformer is of .*model_type is 'i2v' there"):
        list(quantization_report(tmp_path / "out", tmp_path / "i2v"))
    assert not list(against_notes(tmp_path / "out", tmp_path / "src"))
    distilled = save(tmp_path / "d/distill.safetensors", random_tensors("transformer", seed=9))
    save_json(tmp_path / "d/config.json", official_config(CONFIGS["transformer"]))
    (note,) = against_notes(tmp_path / "out", distilled)
    assert "its transformer's variant is 'distill', and that of" in note and "is 'base'" in note
    assert "note: transformer: so much does not come of 8 bits" in "".join(
        summary(list(quantization_report(tmp_path / "out", distilled)))
    )
    # A file of the same name with other contents, and with another size.
    twin = tmp_path / "twin/diffusion_pytorch_model.safetensors"
    for dtype in (np.float32, BF16):
        save(twin, random_tensors("transformer", seed=9, dtype=dtype))
        save_json(tmp_path / "twin/config.json", official_config(CONFIGS["transformer"]))
        (note,) = against_notes(tmp_path / "out", tmp_path / "twin")
        assert f"{twin} is not the file of that name that {tmp_path / 'out'} was made of" in note
    # Of a folder with several, the one of the same variant is taken.
    save(tmp_path / "src/distill_models/distill_model.safetensors", random_tensors("transformer", seed=9))
    assert max(r.relative_error or 0 for r in quantization_report(tmp_path / "out", tmp_path / "src")) < 0.012


def without(key):
    return lambda stored: stored.pop(key)


def with_value(key, value):
    return lambda stored: stored.__setitem__(key, value)


SCALE = "blocks.1.ffn.0.weight_scale"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(SCALE), "blocks.1.ffn.0.weight_scale is missing; its values mean nothing"),
        (with_value(SCALE, np.ones((39, 1), np.float32)), r"has shape \[40, 24\] and its scale \[39, 1\]"),
        (with_value(SCALE, np.full((40, 1), np.nan, np.float32)), "NaN or infinity in blocks.1.ffn.0.weight"),
        (
            with_value("blocks.1.ffn.0.weight", np.zeros((40, 25), np.int8)),
            r"has shape \[40, 25\] and needs \[40, 24\]",
        ),
        (without("blocks.2.norm3.bias"), "1 missing: blocks.2.norm3.bias"),
    ],
)
def test_8_bit_files_that_are_damaged(tmp_path, word, change, message):
    stored = lightx2v(TRANSFORMER, word)
    change(stored)
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    blocks_of(tmp_path / "src" / word, stored)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_and_a_lost_one(tmp_path):
    quantized_source(tmp_path / "src", "int8")
    file = tmp_path / "src/int8/block_1.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"block_1\.safetensors"):
        convert(tmp_path / "src", tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"block_1\.safetensors is not in the folder"):
        convert(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(("word", "other"), [("int8", "fp8"), ("fp8", "int8")])
def test_what_is_8_bit_already_is_not_rounded_to_another_type(tmp_path, word, other):
    quantized_source(tmp_path / "src", word)
    message = f"--quantize {other}: the transformer of .* is {WORDS[word]} already, and rounding it again loses more"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize=other))
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize=word))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "out", tmp_path / "no", ConversionOptions(quantize=other))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_the_source_is_refused_by_name(tmp_path, word, value):
    broken = {key: v.copy() for key, v in TRANSFORMER.items()}
    broken["blocks.2.cross_attn.v.weight"][3, 4] = value
    save_json(tmp_path / "src/config.json", official_config(CONFIGS["transformer"]))
    save(tmp_path / "src/diffusion_pytorch_model.safetensors", broken)
    with pytest.raises(UserError, match=r"blocks\.2\.cross_attn\.v\.weight holds NaN or infinity, which"):
        convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize=word, allow_nonfinite=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConversionOptions(quantize="int4"), "--quantize int4: give one of keep, none, int8, fp8"),
        (ConversionOptions(quantize_components=("text_encoder",)), "say with --quantize int8 or fp8"),
        (
            ConversionOptions(quantize="int8", quantize_components=("vae",)),
            "--quantize-component vae: give one of transformer",
        ),
        (
            ConversionOptions(quantize="int8", quantize_components=("image_encoder",)),
            "no image_encoder is converted here",
        ),
        (ConversionOptions(quantize="int8", components=("vae",)), "--quantize int8: no transformer is converted here"),
    ],
)
def test_options_that_do_not_make_sense(tmp_path, options, message):
    official_folder(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src", tmp_path / "out", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConversionOptions(), "is converted already; run it with .* or say what to change with --quantize"),
        (
            ConversionOptions(quantize="int8", variant="distill"),
            "--variant: .* is converted already and says what it is",
        ),
        (ConversionOptions(quantize="int8", settings={"vae": {"z_dim": 8}}), "--set: .* is converted already"),
        (ConversionOptions(quantize="int8", components=("image_encoder",)), "--component image_encoder: .* has none"),
    ],
)
def test_options_that_a_native_source_does_not_take(tmp_path, options, message):
    source = tiny_models.write_checkpoint(tmp_path / "native")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", options)


def edited(folder, **changes):
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return open_checkpoint(folder)


def test_a_model_json_that_contradicts_its_files(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize="int8"))
    with pytest.raises(UserError, match=r"blocks\.ffn\.linear_1\.kernel is missing; .*convert the checkpoint again"):
        edited(tmp_path / "out", quantization=None).tensors("transformer")
    with pytest.raises(UserError, match=r"is int8, and by model\.json it is float8_e4m3fn"):
        edited(tmp_path / "out", quantization={"transformer": {"dtype": "float8_e4m3fn"}}).tensors("transformer")
    for entries in ({"vae": {"dtype": "int8"}}, {"transformer": "int8"}, {"transformer": {"dtype": ["int8"]}}, [1]):
        with pytest.raises(UserError, match="quantization"):
            edited(tmp_path / "out", quantization=entries)


def test_training_asks_for_floats_and_says_so(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", ConversionOptions(quantize="int8"))
    native = open_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match="the transformer is int8, and floats are needed here"):
        native.load("transformer", "float32")
    tree = native.load("transformer", "bfloat16", quantized=True)
    linear = tree["blocks"]["ffn"]["linear_1"]
    assert [str(linear[name].dtype) for name in ("weight", "scale", "bias")] == ["int8", "float32", "bfloat16"]
    with pytest.raises(UserError, match="is int8, whose rounding the LoRA would hold too"):
        extract_lora(native, native, tmp_path / "l.safetensors")


def test_memory_stays_at_a_layer(tmp_path):
    """The streams hand out a layer at a time; scales wait for their weights."""
    from x2v_jax.checkpoint.conversion.plan import make_plan

    official_folder(tmp_path / "src")
    streams = make_plan(tmp_path / "src", ConversionOptions(quantize="int8")).streams["transformer"]
    order = list(streams)
    for name in order:
        if name.endswith(".weight"):
            assert order.index(name) + 1 == order.index(name.removesuffix("weight") + "scale")
            assert [len(piece) for piece in streams[name].pieces()] == [1] * 3
    assert set(DTYPES) == set(config.QUANTIZATIONS) and stream.DTYPES
