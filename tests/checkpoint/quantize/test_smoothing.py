"""Factors by the paper's formula, checkpoints that hold them, and what undoes or refuses them."""

import json
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tiny_models
from small_checkpoints import CONFIGS, I2V, official_folder, save
from smooth_checkpoints import recording

from convert.describe import phases
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.inspect import inspect, to_text
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.conversion.plan import make_plan
from x2v_jax.checkpoint.conversion.quantization_report import quantization_report
from x2v_jax.checkpoint.lora.extract import extract_lora
from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.checkpoint.native import writer
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.export import export
from x2v_jax.checkpoint.published.open import open_native
from x2v_jax.checkpoint.quantize.eight_bit import Factors, dequantize, quantize
from x2v_jax.checkpoint.quantize.smoothing import check_alpha, smoothing_factors
from x2v_jax.errors import UserError
from x2v_jax.generate.network import describe_networks
from x2v_jax.memory.predict import weight_bytes
from x2v_jax.models.config import Schedule

WORDS = {"int8": "int8", "fp8": "float8_e4m3fn"}


def options(path: pathlib.Path, word: str = "int8", **others: Any) -> ConversionOptions:
    return ConversionOptions(quantize=word, smooth=str(path), **others)


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
    return tiny_models.write_checkpoint(tmp_path / "source", image=True)


@pytest.fixture
def calibration(tmp_path):
    return recording(tmp_path / "c.safetensors", tiny_models.I2V)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_the_papers(alpha):
    rng = np.random.default_rng(0)
    x, w = np.exp(rng.standard_normal((2, 50)))
    plain = x**alpha / w ** (1 - alpha)
    assert np.allclose(smoothing_factors(x, w, alpha), plain / np.exp(np.log(plain).mean()), rtol=1e-6)


def test_empty_and_extreme_channels_stay_sane():
    x = np.array([1.0, 0.0, 1e-30, 1.0, 1e30])
    w = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    with np.errstate(all="raise"):
        s = smoothing_factors(x, w, 1.0)
    assert s[1] == 1 and s[2] == 1 and s[3] == 1 and s[4] == 1  # besides the largest, all are empty
    assert smoothing_factors(np.array([1.0, 1e6, 1, 1]), np.ones(4), 1.0).max() == 1e3
    assert (smoothing_factors(np.zeros(3), np.zeros(3), 0.5) == 1).all()
    scaled = smoothing_factors(x[[0, 3]] * 3e38, w[[0, 0]] * 1e-38, 0.5)
    assert np.allclose(scaled, 1)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, "half"])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(UserError, match=r"--smooth-alpha is .*; give a number from 0 to 1"):
        check_alpha(alpha)


@pytest.mark.parametrize("word", WORDS)
def test_a_smoothed_checkpoint_holds_what_the_formula_says(tmp_path, source, calibration, word):
    notes = convert(source, tmp_path / "out", options(calibration.path, word, smooth_alpha=0.4))
    path = str(calibration.path)
    assert f"transformer: smoothed with alpha 0.4 by {path}, which was recorded on 3 prompts" in notes
    native, floats = open_checkpoint(tmp_path / "out"), open_checkpoint(source).tensors("transformer")
    assert native.model["quantization"] == {"transformer": {"dtype": WORDS[word], "smoothing": 0.4}}
    assert native.model["format_version"] == 3 and native.smoothing("transformer") == 0.4
    assert native.model["provenance"]["calibration"]["file"] == "c.safetensors"
    stored, inverses = native.tensors("transformer"), native.smoothing_inverses("transformer")

    def kernel(name: str, layer: int) -> np.ndarray:
        return floats[f"blocks.{name}.kernel"].read()[layer].T

    factors: dict[str, np.ndarray] = {}
    for name, group in GROUPS.items():
        for layer in range(2):
            largest = np.max([np.abs(kernel(matrix, layer)).max(0) for matrix in group.matrices], axis=0)
            s = smoothing_factors(calibration.maxima[name][layer], largest, 0.4)
            np.testing.assert_array_equal(inverses[name].read()[layer], 1 / s)
            factors[f"{name} {layer}"] = s
    s, o = factors["self_attn.q 1"], factors["self_attn.o 1"]
    for name, own in {
        "self_attn.k": Factors(s),
        "self_attn.v": Factors(s, 1 / o),
        "self_attn.o": Factors(o),
        "cross_attn.q": Factors(factors["cross_attn.q 1"]),
        "cross_attn.k": Factors(),
        "cross_attn.v_img": Factors(None, 1 / factors["cross_attn.o 1"]),
        "cross_attn.o": Factors(factors["cross_attn.o 1"]),
        "ffn.linear_1": Factors(factors["ffn.linear_1 1"]),
        "ffn.linear_2": Factors(),
    }.items():
        smooth = np.array(kernel(name, 1))
        own.apply(smooth)
        values, scale = quantize(smooth, WORDS[word], name)
        again = dequantize(stored[f"blocks.{name}.weight"].read()[1], stored[f"blocks.{name}.scale"].read()[1])
        assert np.allclose(again, dequantize(values, scale), atol=2 * scale.max() * (1 if word == "int8" else 32))
        assert np.mean(values == stored[f"blocks.{name}.weight"].read()[1]) > 0.99
    for name in ("norm3.scale", "norm3.bias"):
        expected = floats[f"blocks.{name}"].read()[1] / factors["cross_attn.q 1"]
        assert np.allclose(stored[f"blocks.{name}"].read()[1], expected, rtol=1e-6)
    for name in ("cross_attn.v", "cross_attn.v_img"):
        expected = floats[f"blocks.{name}.bias"].read()[1] / factors["cross_attn.o 1"]
        assert np.allclose(stored[f"blocks.{name}.bias"].read()[1], expected, rtol=1e-6)
    assert not any(name.startswith("smoothing.") for name in stored)


def test_a_published_folder_is_smoothed_and_folded_vectors_become_float32(tmp_path):
    official_folder(tmp_path / "src", image=True)
    calibration = recording(tmp_path / "c.safetensors", I2V)
    convert(tmp_path / "src", tmp_path / "out", options(calibration.path, dtype="bfloat16", variant="base"))
    stored = open_checkpoint(tmp_path / "out").tensors("transformer")
    for name in ("norm3.scale", "norm3.bias", "self_attn.v.bias", "cross_attn.v_img.bias", "self_attn.smooth"):
        assert stored[f"blocks.{name}"].dtype == np.float32
    assert stored["blocks.self_attn.q.bias"].dtype.name == "bfloat16"


def test_a_lora_is_merged_before(tmp_path, source, calibration):
    rng = np.random.default_rng(0)
    difference = rng.standard_normal((32, 32)).astype(np.float32)
    lora = save(tmp_path / "l.safetensors", {"diffusion_model.blocks.0.self_attn.k.diff": difference})
    convert(source, tmp_path / "merged", ConversionOptions(loras=((str(lora), 1.0),)))
    convert(tmp_path / "merged", tmp_path / "one", options(calibration.path))
    convert(source, tmp_path / "two", options(calibration.path, loras=((str(lora), 1.0),)))
    one, two = (open_checkpoint(tmp_path / name).tensors("transformer") for name in ("one", "two"))
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.read(), two[name].read(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_multiplying_out_undoes_the_factors(tmp_path, source, calibration, word):
    convert(source, tmp_path / "smooth", options(calibration.path, word))
    convert(source, tmp_path / "plain", ConversionOptions(quantize=word))
    convert(tmp_path / "smooth", tmp_path / "back", ConversionOptions(quantize="none", dtype="float32"))
    convert(tmp_path / "plain", tmp_path / "same", ConversionOptions(quantize="none", dtype="float32"))
    native = open_checkpoint(tmp_path / "back")
    assert native.model["format_version"] == 1 and native.quantization("transformer") is None
    floats, back, same = (
        open_checkpoint(p).tensors("transformer") for p in (source, tmp_path / "back", tmp_path / "same")
    )
    assert back.keys() == floats.keys()
    for name, tensor in floats.items():
        exact = tensor.read()
        error = np.linalg.norm(back[name].read() - exact)
        if name.endswith("kernel"):
            # Columns that are a hundred times others are where 8 bits a row hurt, and smoothing moves them there.
            plain = np.linalg.norm(same[name].read() - exact)
            assert error <= 20 * plain, name
            assert error < 0.2 * np.linalg.norm(exact), name
        else:
            assert error <= 1e-6 * np.linalg.norm(exact), name


def test_errors_are_told_of_the_weights_as_they_were(tmp_path, source, calibration):
    convert(source, tmp_path / "smooth", options(calibration.path))
    reports = list(quantization_report(tmp_path / "smooth", source))
    floats = open_checkpoint(source).tensors("transformer")["blocks.self_attn.v.kernel"].read()[1].T
    undone = open_native(open_checkpoint(tmp_path / "smooth"), "transformer").found.tensors[
        "blocks.1.self_attn.v.weight"
    ]
    report = next(r for r in reports if r.key == "blocks.1.self_attn.v.weight")
    error = np.linalg.norm(undone.read() - floats) / np.linalg.norm(floats)
    assert report.relative_error == pytest.approx(error, rel=1e-4) and error < 0.1 and report.smoothed
    assert max(r.relative_error or 0 for r in reports) < 0.2
    assert ", smoothed; error " in str(report)
    plain = next(r for r in reports if r.key == "blocks.1.ffn.2.weight")
    assert not plain.smoothed and "smoothed" not in str(plain)


def test_inspect_says_that_it_is_smoothed_and_predicts_its_memory(tmp_path, source, calibration):
    convert(source, tmp_path / "smooth", options(calibration.path))
    found = inspect(tmp_path / "smooth", phases)
    assert "matrices of the blocks: int8, smoothed with alpha 0.5; --layers" in to_text(found)
    assert found.networks[0].smoothing == 0.5 and json.dumps(found.to_dict())
    configs = {n.component: open_checkpoint(source).config(n.component) for n in found.networks}
    plain, smooth = (phases(configs, Schedule(), ["transformer"], s)["denoise"] for s in ([], ["transformer"]))
    assert smooth - plain == 2 * 2 * 32 * 4  # inputs, layers, channels, bytes


def test_weights_reach_the_device_and_are_counted_exactly(tmp_path, source, calibration):
    import jax

    convert(source, tmp_path / "smooth", options(calibration.path))
    native = open_checkpoint(tmp_path / "smooth")
    networks, _ = describe_networks(native, (), dtype="bfloat16")
    loaded = networks["transformer"].load()
    assert loaded["blocks"]["self_attn"]["smooth"].dtype == "float32" and "smoothing" not in loaded
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert total == weight_bytes(native, "transformer", "bfloat16")
    tree = native.load("transformer", "bfloat16", quantized=True)
    assert tree["blocks"]["ffn"]["smooth"].dtype == "float32"


def test_older_programs_refuse(tmp_path, source, calibration, monkeypatch):
    convert(source, tmp_path / "smooth", options(calibration.path))
    convert(source, tmp_path / "plain", ConversionOptions(quantize="int8"))
    assert open_checkpoint(tmp_path / "plain").model["format_version"] == 2
    monkeypatch.setattr("x2v_jax.checkpoint.native.reader.FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="format_version is 3, and this program reads up to 2"):
        open_checkpoint(tmp_path / "smooth")
    assert writer.FORMAT_VERSION == 3


def _edited(folder: pathlib.Path, smoothing: Any, version: int = 3) -> pathlib.Path:
    model = json.loads((folder / "model.json").read_text())
    model["quantization"]["transformer"]["smoothing"] = smoothing
    (folder / "model.json").write_text(json.dumps(model | {"format_version": version}))
    return folder


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path, source, calibration):
    convert(source, tmp_path / "smooth", options(calibration.path))
    convert(source, tmp_path / "plain", ConversionOptions(quantize="int8"))
    with pytest.raises(UserError, match=r"blocks\.self_attn\.smooth is missing"):
        open_checkpoint(_edited(tmp_path / "plain", 0.5)).tensors("transformer")
    with pytest.raises(UserError, match=r"blocks\.ffn\.smooth is unknown"):
        open_checkpoint(_edited(tmp_path / "smooth", None)).tensors("transformer")
    for value in (2, "yes", True):
        with pytest.raises(UserError, match="smoothing of transformer is"):
            open_checkpoint(_edited(tmp_path / "smooth", value))


@pytest.mark.slow
def test_what_cannot_take_the_factors_is_refused(tmp_path, source, calibration):
    out = tmp_path / "smooth"
    convert(source, out, options(calibration.path))
    for layout in ("wan", "lightx2v", "diffusers"):
        with pytest.raises(UserError, match=f"--layout {layout}: no published layout has a place for the factors"):
            export(out, tmp_path / "back", layout)
    lora = save(
        tmp_path / "l.safetensors", {"diffusion_model.blocks.0.self_attn.v.diff": np.ones((32, 32), np.float32)}
    )
    with pytest.raises(UserError, match="cannot be merged into a smoothed 8-bit checkpoint"):
        describe_networks(open_checkpoint(out), ((str(lora), 1.0),), dtype="float32")
    for changes, flag in (
        ({"loras": ((str(lora), 1.0),)}, "--lora"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"quantize": "int8"}, "--quantize"),
        ({"quantize": "int8", "smooth": str(calibration.path)}, "--quantize"),
        ({"quantize": "int8", "quantize_components": ("transformer", "text_encoder")}, "--quantize"),
        ({"quantize": "int8", "dtype": "float32", "quantize_components": ("text_encoder",)}, "--dtype float32"),
    ):
        with pytest.raises(UserError, match=f"^{flag}: the transformer of .* is smoothed"):
            convert(out, tmp_path / "again", ConversionOptions(**changes))
    with pytest.raises(UserError, match=r"converted already; .* --quantize none, .*carries the transformer over"):
        convert(out, tmp_path / "again", ConversionOptions(reuse=str(source)))
    # Dequantized, a LoRA fits again.
    notes = convert(out, tmp_path / "again", ConversionOptions(quantize="none", loras=((str(lora), 1.0),)))
    assert "transformer: the factors that it was smoothed with (alpha 0.5) are undone" in notes
    with pytest.raises(UserError, match="whose rounding the LoRA would hold too"):
        extract_lora(open_checkpoint(source), open_checkpoint(out), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="floats are needed here"):
        open_checkpoint(out).load("transformer")
    # Its other networks can still be lent, and changed by themselves.
    convert(source, tmp_path / "lent", ConversionOptions(quantize="int8", reuse=str(out)))
    changes: dict[str, Any] = {"quantize_components": ("text_encoder",), "components": ("text_encoder",)}
    convert(out, tmp_path / "t", ConversionOptions(quantize="int8", **changes))
    assert open_checkpoint(tmp_path / "t").quantization("text_encoder") == "int8"


@pytest.mark.slow
def test_where_only_others_change_it_is_carried_over_bit_for_bit(tmp_path, source, calibration):
    convert(source, tmp_path / "one", options(calibration.path, smooth_alpha=0.4))
    changes = ConversionOptions(quantize="int8", quantize_components=("text_encoder",))
    notes = convert(tmp_path / "one", tmp_path / "two", changes)
    assert any("24 matrices are int8 and stay so, bit for bit" in note for note in notes)
    both = ("transformer", "text_encoder")
    convert(source, tmp_path / "at once", options(calibration.path, smooth_alpha=0.4, quantize_components=both))
    one, two, once = (open_checkpoint(tmp_path / name) for name in ("one", "two", "at once"))
    assert two.smoothing("transformer") == 0.4 and two.model["format_version"] == 3
    assert two.model["quantization"] == once.model["quantization"]
    assert two.model["provenance"]["calibration"] == one.model["provenance"]["calibration"]
    for made, component in ((one, "transformer"), (once, "transformer"), (once, "text_encoder")):
        expected, found = made.tensors(component), two.tensors(component)
        if component == "transformer":
            expected, found = expected | made.smoothing_inverses(component), found | two.smoothing_inverses(component)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype
            assert tensor.read().tobytes() == found[name].read().tobytes(), name


def test_options_that_do_not_go_together_are_refused_first(tmp_path, source, calibration):
    path = str(calibration.path)
    for changes, message in (
        ({"smooth": path}, "--smooth: it prepares weights for 8 bits; give --quantize int8 or fp8"),
        ({"smooth": path, "quantize": "none"}, "--smooth: it prepares weights for 8 bits"),
        ({"smooth_alpha": 0.5, "quantize": "int8"}, "--smooth-alpha: give with --smooth the file"),
        ({"smooth": path, "quantize": "int8", "smooth_alpha": 1.5}, "--smooth-alpha is 1.5"),
        ({"smooth": path, "quantize": "int8", "quantize_components": ("text_encoder",)}, "--smooth: it is for the tr"),
        ({"smooth": "", "quantize": "int8"}, "--smooth is empty; give a file that `python -m convert calibrate` made"),
        ({"smooth": str(tmp_path / "no"), "quantize": "int8"}, "there is no such file; `python -m convert calibrate"),
        ({"smooth": path, "quantize": "int8", "components": ("vae",)}, "no transformer is converted here"),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "out", ConversionOptions(**changes))
    convert(source, tmp_path / "plain", ConversionOptions(quantize="int8"))
    with pytest.raises(UserError, match=r"is 8-bit already, and smoothing comes before 8 bits"):
        convert(tmp_path / "plain", tmp_path / "out", options(calibration.path))
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_named(tmp_path):
    made = official_folder(tmp_path / "src")
    made["transformer"]["blocks.1.self_attn.k.weight"][3, 4] = np.nan
    save(tmp_path / "src/diffusion_pytorch_model.safetensors", made["transformer"])
    calibration = recording(tmp_path / "c.safetensors", CONFIGS["transformer"])
    with pytest.raises(UserError, match=r"blocks\.1\.self_attn\.k\.weight holds NaN or infinity"):
        convert(tmp_path / "src", tmp_path / "out", options(calibration.path, variant="base"))
    assert not (tmp_path / "out").exists()


def test_a_recording_that_does_not_say_of_how_many_prompts(tmp_path, source):
    path = recording(tmp_path / "c.safetensors", tiny_models.I2V, prompts=None).path
    notes = convert(source, tmp_path / "out", options(path))
    assert f"transformer: smoothed with alpha 0.5 by {path}" in notes


def test_another_variants_recording_is_taken_with_a_sentence(tmp_path, source):
    path = recording(tmp_path / "c.safetensors", tiny_models.I2V, variant="distill").path
    notes = convert(source, tmp_path / "out", options(path))
    assert any("recorded with the variant 'distill', and this is 'base'" in note for note in notes)


def test_memory_stays_at_a_layer(tmp_path):
    """Column maxima come of a pass of their own, a matrix at a time, when a layer is first asked for."""
    from x2v_jax.models.config import WanConfig

    config = WanConfig(dim=256, ffn_dim=512, num_heads=4, num_layers=6, text_dim=16, freq_dim=8, text_len=4)
    components = {"transformer": (config, tiny_models.random_parameters("transformer", config))}
    tiny_models.write_checkpoint(tmp_path / "source", changes={"components": components})
    del components
    calibration = recording(tmp_path / "c.safetensors", config)
    peaks = []
    for made in (ConversionOptions(quantize="int8"), options(calibration.path)):
        streams = make_plan(tmp_path / "source", made).streams["transformer"]
        order = list(streams)
        assert order.index("blocks.self_attn.q.scale") == order.index("blocks.self_attn.q.weight") + 1
        tracemalloc.start()
        for stream in streams.values():
            assert sum(len(piece) for piece in stream.pieces()) == stream.shape[0]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 512 * 4  # one matrix; the network has 60
