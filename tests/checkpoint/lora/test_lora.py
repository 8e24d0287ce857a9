"""LoRA merging: every dialect gives the same weights, every tensor is accounted for, misfits are refused by name."""

import json
import subprocess
import sys

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.torch_writer import write_torch_file
from x2v_jax.checkpoint.lora import merge as lora_module
from x2v_jax.checkpoint.lora import read
from x2v_jax.checkpoint.lora.arguments import parse_lora_argument
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into, merge_into_native
from x2v_jax.checkpoint.names.diffusers import DiffusersNames
from x2v_jax.checkpoint.names.wan import official_shapes, table
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig

RANK = 2
SIZES = dict(dim=8, ffn_dim=12, num_heads=2, num_layers=2, text_dim=6, freq_dim=4, clip_dim=10)
T2V = WanConfig(**SIZES)
I2V = WanConfig(**SIZES, model_type="i2v", in_dim=36)
DIFFUSERS = DiffusersNames("transformer")


def lazy(array) -> LazyTensor:
    array = np.asarray(array)
    return LazyTensor(array.shape, array.dtype, lambda: array.view())


def weights(config=I2V, dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = official_shapes("transformer", config)
    return {key: lazy(rng.standard_normal(shape).astype(dtype)) for key, shape in shapes.items()}


def pair(shape, rank=RANK, seed=2):
    rng = np.random.default_rng([seed, *shape])
    inputs = int(np.prod(shape[1:]))
    return rng.standard_normal((rank, inputs)).astype("f4"), rng.standard_normal((shape[0], rank)).astype("f4")


def all_pairs(config=I2V, rank=RANK, seed=2):
    """(down, up) for every linear layer, by official module."""
    shapes = official_shapes("transformer", config)
    return {k.removesuffix(".weight"): pair(s, rank, seed) for k, s in shapes.items() if len(s) == 2}


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


def lightx2v(pairs):
    made = {}
    for module, (down, up) in pairs.items():
        made[f"diffusion_model.{module}.lora_down.weight"] = down
        made[f"diffusion_model.{module}.lora_up.weight"] = up
    return made


def merged_arrays(tensors, files, **options):
    merged, report = merge_into(tensors, files, **options)
    return {key: np.array(tensor.read()) for key, tensor in merged.items()}, report


def expected_merge(tensors, pairs, factor=1.0):
    made = {key: t.read() for key, t in tensors.items()}
    for module, (down, up) in pairs.items():
        key = f"{module}.weight"
        made[key] = (made[key].astype("f8") + factor * (up.astype("f8") @ down).reshape(made[key].shape)).astype("f4")
    return made


def assert_close(got, wanted, tolerance=1e-6):
    assert got.keys() == wanted.keys()
    for key in wanted:
        error = np.linalg.norm(np.asarray(got[key], "f8") - wanted[key]) / np.linalg.norm(wanted[key])
        assert error <= tolerance, (key, error)


# Each dialect: official module, (down, up) -> the file's keys and arrays.
def _named(prefix, down_name, up_name, rename=lambda module: module):
    return lambda m, down, up: {f"{prefix}{rename(m)}.{down_name}": down, f"{prefix}{rename(m)}.{up_name}": up}


def _flat(module):
    return module.replace(".", "_")


def _diffusers(module):
    return DIFFUSERS.format(f"{module}.weight")[0][0].removesuffix(".weight")


PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
DIALECTS = {
    "lightx2v": _named("diffusion_model.", *KOHYA),
    "comfyui": _named("diffusion_model.", *PEFT),
    "bare": _named("", *PEFT),
    "diffsynth": _named("pipe.dit.", "lora_A.default.weight", "lora_B.default.weight"),
    "peft": _named("base_model.model.", *PEFT),
    "model": _named("model.", *PEFT),
    "diffusers": _named("transformer.", *PEFT, _diffusers),
    "diffusers bare": _named("", *PEFT, _diffusers),
    "kohya": _named("lora_unet_", *KOHYA, _flat),
    "videox-fun": _named("lora_unet__", *KOHYA, _flat),
    "kohya diffusers": _named("lora_transformer_", *KOHYA, lambda m: _flat(_diffusers(m))),
    "lycoris": _named("lycoris_", *KOHYA, lambda m: _flat(_diffusers(m))),
    "half the rank in alpha": lambda m, down, up: {
        f"lora_unet_{_flat(m)}.lora_down.weight": 2 * down,
        f"lora_unet_{_flat(m)}.lora_up.weight": up,
        f"lora_unet_{_flat(m)}.alpha": np.float32(RANK / 2),
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_merges_to_the_same_weights(dialect, tmp_path):
    pairs, tensors = all_pairs(), weights()
    made = {}
    for module, (down, up) in pairs.items():
        made |= DIALECTS[dialect](module, down, up)
    got, report = merged_arrays(tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", made)), 0.7)])
    assert_close(got, expected_merge(tensors, pairs, 0.7))
    (file,) = report.files
    assert set(file.matched) == set(made)
    assert set(file.parameters) == {f"{m}.weight" for m in pairs}
    assert not file.unmatched and not file.misshapen


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_torch_files_are_read(suffix, tmp_path):
    pairs, tensors = all_pairs(), weights()
    write_torch_file(tmp_path / f"l{suffix}", lightx2v(pairs))
    got, _ = merged_arrays(tensors, [(LoraFile.open(tmp_path / f"l{suffix}"), 1.0)])
    assert_close(got, expected_merge(tensors, pairs))


def test_a_torch_file_may_nest_its_tensors_and_hold_plain_numbers(monkeypatch, tmp_path):
    pairs, tensors = {"blocks.0.self_attn.q": pair((8, 8))}, weights()
    nested = {key: lazy(array) for key, array in lightx2v(pairs).items()} | {
        "diffusion_model.blocks.0.self_attn.q.alpha": 6
    }
    monkeypatch.setattr(read, "read_torch_file", lambda path: {"state_dict": nested, "epoch": 3, "note": "x"})
    got, report = merged_arrays(tensors, [(LoraFile.open(tmp_path / "l.ckpt"), 1.0)])
    assert_close(got, expected_merge(tensors, pairs, 6 / RANK))
    assert len(report.files[0].matched) == 3 and report.files[0].fits


DIFFERENCES = {
    "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm3.weight", (8,)),
    "diffusion_model.blocks.0.norm3.diff_b": ("blocks.0.norm3.bias", (8,)),
    "lycoris_blocks_1_norm2.w_norm": ("blocks.1.norm3.weight", (8,)),
    "lycoris_blocks_1_norm2.b_norm": ("blocks.1.norm3.bias", (8,)),
    "diffusion_model.blocks.0.cross_attn.k.diff_b": ("blocks.0.cross_attn.k.bias", (8,)),
    "diffusion_model.blocks.1.cross_attn.norm_k_img.diff": ("blocks.1.cross_attn.norm_k_img.weight", (8,)),
    "diffusion_model.blocks.1.diff_m": ("blocks.1.modulation", (1, 6, 8)),
    "diffusion_model.blocks.0.modulation.diff": ("blocks.0.modulation", (6, 8)),
    "transformer.scale_shift_table.diff": ("head.modulation", (1, 2, 8)),
    "diffusion_model.patch_embedding.diff": ("patch_embedding.weight", (8, 36, 1, 2, 2)),
    "diffusion_model.patch_embedding.diff_b": ("patch_embedding.bias", (8,)),
    "diffusion_model.head.head.diff": ("head.head.weight", (64, 8)),
    "diffusion_model.img_emb.proj.0.diff": ("img_emb.proj.0.weight", (10,)),
    "transformer.blocks.0.ffn.net.2.lora_B.bias": ("blocks.0.ffn.2.bias", (8,)),
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_a_difference_is_added_to_its_parameter(key, tmp_path):
    parameter, shape = DIFFERENCES[key]
    difference = np.random.default_rng(4).standard_normal(shape).astype("f4")
    tensors = weights()
    merged, report = merge_into(tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", {key: difference})), -2.0)])
    before = tensors[parameter].read()
    np.testing.assert_allclose(merged[parameter].read(), before - 2 * difference.reshape(before.shape), rtol=1e-6)
    assert report.files[0].parameters == (parameter,)
    assert all(merged[k] is tensors[k] for k in tensors if k != parameter)


def test_a_module_with_a_pair_and_differences_uses_all_of_them(tmp_path):
    tensors, (down, up) = weights(), pair((8, 8))
    module = "blocks.0.self_attn.q"
    made = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up, f"{module}.alpha": np.float32(1)}
    made |= {f"{module}.diff": np.full((8, 8), 3, "f4"), f"{module}.diff_b": np.full(8, 5, "f4")}
    got, _ = merged_arrays(tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", made)), 0.5)])
    wanted = tensors[f"{module}.weight"].read() + 0.5 * (up @ down / RANK + 3)
    np.testing.assert_allclose(got[f"{module}.weight"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[f"{module}.bias"], tensors[f"{module}.bias"].read() + 2.5, rtol=1e-6)


@pytest.mark.parametrize("down_shape", [(RANK, 36, 1, 2, 2), (RANK, 144)], ids=["kernel", "flattened"])
@pytest.mark.parametrize("up_shape", [(8, RANK, 1, 1, 1), (8, RANK)])
def test_a_convolution_pair_is_merged_as_a_product(down_shape, up_shape, tmp_path):
    tensors, (down, up) = weights(), pair((8, 144))
    made = {
        "patch_embedding.lora_A.weight": down.reshape(down_shape),
        "patch_embedding.lora_B.weight": up.reshape(up_shape),
    }
    got, _ = merged_arrays(tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", made)), 1.0)])
    assert_close(got, expected_merge(tensors, {"patch_embedding": (down, up)}))


@pytest.mark.parametrize("alpha", [np.float32(8), np.asarray([8], "f8"), np.asarray(8, np.int64)])
def test_alpha_over_rank_scales_the_pair(alpha, tmp_path):
    pairs, tensors = {"blocks.1.ffn.0": pair((12, 8), rank=4)}, weights()
    made = lightx2v(pairs) | {"diffusion_model.blocks.1.ffn.0.alpha": alpha}
    got, _ = merged_arrays(tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", made)), 0.25)])
    assert_close(got, expected_merge(tensors, pairs, 0.25 * 8 / 4))


@pytest.mark.parametrize(
    ("stated", "factor"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"blocks.1.ffn.0": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^ffn.0$": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"1.ffn.2": 2}}, 2.0),
        ({"r": 4}, 1.0),
    ],
)
def test_the_scale_stated_by_peft_or_diffusers_is_used(stated, factor, tmp_path):
    pairs, tensors = {"blocks.1.ffn.0": pair((12, 8), rank=4)}, weights()
    inside = write(tmp_path / "a.safetensors", lightx2v(pairs), {"lora_adapter_metadata": json.dumps(stated)})
    beside = write(tmp_path / "adapter_model.safetensors", lightx2v(pairs))
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    for path in (inside, beside):
        got, _ = merged_arrays(tensors, [(LoraFile.open(path), 1.0)])
        assert_close(got, expected_merge(tensors, pairs, factor))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ('{"use_dora": true}', "DoRA"),
        ('{"lora_alpha": "big"}', "lora_alpha"),
        ('{"alpha_pattern": {"blocks.[01]+.q": 2}}', "regular expression"),
        ("[1]", "JSON object"),
        ("{", "JSON object"),
    ],
)
def test_stated_scaling_that_cannot_be_followed_is_refused(stated, message, tmp_path):
    path = write(tmp_path / "a.safetensors", lightx2v(all_pairs()), {"lora_adapter_metadata": stated})
    with pytest.raises(UserError, match=message):
        LoraFile.open(path)


def test_strength_zero_is_the_identity_bit_for_bit(tmp_path):
    tensors = weights(dtype=ml_dtypes.bfloat16)
    merged, report = merge_into(
        tensors, [(LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(all_pairs()))), 0.0)]
    )
    assert all(merged[key] is tensors[key] for key in tensors)
    assert report.files[0].strength == 0 and report.files[0].matched


def test_files_add_up_in_any_order_and_stems_may_agree(tmp_path):
    tensors, first, second = weights(), all_pairs(seed=5), all_pairs(rank=3, seed=6)
    (tmp_path / "other").mkdir()
    a = LoraFile.open(write(tmp_path / "turbo.safetensors", lightx2v(first)))
    b = LoraFile.open(write(tmp_path / "other" / "turbo.safetensors", lightx2v(second)))
    ab, report = merged_arrays(tensors, [(a, 0.6), (b, -0.3)])
    ba, _ = merged_arrays(tensors, [(b, -0.3), (a, 0.6)])
    wanted = expected_merge({k: lazy(v) for k, v in expected_merge(tensors, first, 0.6).items()}, second, -0.3)
    assert_close(ab, wanted)
    assert_close(ba, ab)
    assert [f.path.parent.name for f in report.files] == [tmp_path.name, "other"]


def test_a_negative_strength_takes_a_lora_off_again(tmp_path):
    tensors = weights()
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(all_pairs())))
    on, _ = merge_into(tensors, [(file, 0.8)])
    off, _ = merged_arrays(on, [(file, -0.8)])
    assert_close(off, {key: t.read() for key, t in tensors.items()}, 1e-6)
    together, _ = merged_arrays(tensors, [(file, 0.8), (file, -0.8)])
    assert_close(together, {key: t.read() for key, t in tensors.items()}, 1e-7)


def test_the_sum_is_rounded_once_to_the_weights_type(tmp_path):
    exact, pairs = weights(), all_pairs()
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(pairs)))
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
        tensors = {key: lazy(t.read().astype(dtype)) for key, t in exact.items()}
        # Each of these files alone would be lost in bfloat16's rounding; together they are one whole LoRA.
        got, _ = merged_arrays(tensors, [(file, 1 / 64)] * 64)
        wanted = expected_merge({k: lazy(np.asarray(t.read(), "f8")) for k, t in tensors.items()}, pairs)
        for key, array in got.items():
            assert array.dtype == dtype
            worst = np.abs(np.asarray(array, "f8") - wanted[key]) / (np.abs(wanted[key]) + 1)
            assert worst.max() <= {np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}.get(dtype, 4e-6)


def test_large_weights_are_merged_in_pieces_with_the_same_result(tmp_path, monkeypatch):
    tensors, pairs = weights(), all_pairs()
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(pairs)))
    monkeypatch.setattr(lora_module, "_PIECE", 20)
    assert_close(merged_arrays(tensors, [(file, 1.0)])[0], expected_merge(tensors, pairs))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_lora_tensors_of_few_bits_are_widened_before_the_product(dtype, tmp_path):
    tensors = weights()
    down, up = (array.astype(dtype) for array in pair((8, 8)))
    path = tmp_path / "l.pt"
    if dtype is ml_dtypes.float8_e4m3fn:
        path = write_raw(
            tmp_path / "l.safetensors",
            {"blocks.0.self_attn.q.lora_A.weight": down, "blocks.0.self_attn.q.lora_B.weight": up},
        )
    else:
        write_torch_file(path, {"blocks.0.self_attn.q.lora_A.weight": down, "blocks.0.self_attn.q.lora_B.weight": up})
    got, _ = merged_arrays(tensors, [(LoraFile.open(path), 1.0)])
    assert_close(got, expected_merge(tensors, {"blocks.0.self_attn.q": (down.astype("f4"), up.astype("f4"))}))


def write_raw(path, tensors):
    """safetensors by hand, for types that its NumPy writer does not know."""
    header, data = {}, b""
    for key, array in tensors.items():
        header[key] = {"dtype": "F8_E4M3", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


KEYS = st.lists(
    st.sampled_from(
        [
            "blocks",
            "0",
            "self_attn",
            "q",
            "lora_A",
            "lora_B",
            "lora_down",
            "lora_up",
            "weight",
            "alpha",
            "diff",
            "diff_b",
            "diff_m",
            "x",
        ]
    ),
    min_size=1,
    max_size=7,
).map(".".join)


@hypothesis.given(st.dictionaries(KEYS, st.sampled_from([(), (1,), (8,), (2, 8), (8, 2), (8, 8), (0, 8)]), max_size=5))
@hypothesis.settings(max_examples=100)
def test_any_mixture_of_keys_and_shapes_is_merged_in_full_or_refused(tmp_path_factory, shapes):
    path = write(tmp_path_factory.mktemp("any") / "l.safetensors", {k: np.ones(s, "f4") for k, s in shapes.items()})
    try:
        merged, report = merge_into(weights(), [(LoraFile.open(path), 1.0)])
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert set(report.files[0].matched) | {k for k in shapes if k.endswith(".alpha")} == set(shapes)
        assert all(np.isfinite(tensor.read()).all() for tensor in merged.values())


def test_reading_lora_files_does_not_import_jax():
    code = "import sys, x2v_jax.checkpoint.lora; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What does not fit


def refusal(tensors, made, path, strength=1.0, **options):
    with pytest.raises(UserError) as caught:
        merge_into(tensors, [(LoraFile.open(write(path, made)), strength)], **options)
    return str(caught.value)


def test_an_image_lora_on_a_text_model_is_refused_with_counts_and_the_reason(tmp_path):
    made = lightx2v(all_pairs(I2V))
    message = refusal(weights(T2V), made, tmp_path / "i2v.safetensors")
    assert "i2v.safetensors at strength 1" in message
    assert "12 match no parameter" in message
    assert "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight" in message
    assert "and 2 more" in message
    assert "image-to-video" in message and "set allow_partial to true" in message


def test_a_partial_merge_applies_what_fits_and_reports_the_rest(tmp_path):
    tensors, pairs = weights(T2V), all_pairs(T2V)
    made = lightx2v(all_pairs(I2V)) | lightx2v(pairs) | {"notes.weight": np.zeros(2, "f4")}
    file = LoraFile.open(write(tmp_path / "i2v.safetensors", made))
    got, report = merged_arrays(tensors, [(file, 1.0)], allow_partial=True)
    assert_close(got, expected_merge(tensors, pairs))
    (account,) = report.files
    assert len(account.matched) == 2 * len(pairs)
    assert len(account.unmatched) == len(made) - 2 * len(pairs) and "notes.weight" in account.unmatched
    assert not account.fits
    assert f"{len(account.matched)} of {len(made)} tensors used" in str(report)


def test_a_lora_of_another_width_is_refused_with_both_widths(tmp_path):
    made = lightx2v({"blocks.0.self_attn.q": pair((1536, 1536)), "blocks.0.self_attn.k": pair((8, 8))})
    message = refusal(weights(), made, tmp_path / "l.safetensors")
    assert "2 have another shape" in message
    assert "changes [1536, 1536]; blocks.0.self_attn.q.weight is [8, 8]" in message
    assert "width 1536 (1.3B) and this one has 8" in message


def test_a_lora_of_a_deeper_model_is_refused_with_the_depths(tmp_path):
    made = lightx2v({"blocks.39.self_attn.q": pair((8, 8)), "blocks.0.self_attn.k": pair((8, 8))})
    assert "blocks up to 39 and the model's last is 1" in refusal(weights(), made, tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "HunyuanVideo"),
        ("lora_unet_input_blocks_4_1_proj_in", "Stable Diffusion"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text encoder"),
        ("diffusion_model.vace_blocks.0.self_attn.q", "VACE"),
    ],
)
@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_lora_of_another_family_is_always_refused_by_name(key, reason, allow_partial, tmp_path):
    made = {f"{key}.lora_down.weight": np.ones((2, 8), "f4"), f"{key}.lora_up.weight": np.ones((8, 2), "f4")}
    message = refusal(weights(), made, tmp_path / "l.safetensors", allow_partial=allow_partial)
    assert "no tensor fits" in message and reason in message


def test_whole_weights_in_a_lora_file_are_not_passed_over(tmp_path):
    made = lightx2v(all_pairs()) | {"diffusion_model.blocks.0.norm3.weight": np.ones(8, "f4")}
    assert "whole weights" in refusal(weights(), made, tmp_path / "l.safetensors")


def test_a_video_lora_with_other_input_channels_is_refused(tmp_path):
    made = {"patch_embedding.diff": np.ones((8, 16, 1, 2, 2), "f4")} | lightx2v(all_pairs(T2V))
    assert "input channels" in refusal(weights(I2V), made, tmp_path / "l.safetensors")


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_a_pair_without_its_other_half_is_refused(half, tmp_path):
    made = lightx2v(all_pairs())
    del made[f"diffusion_model.blocks.0.self_attn.q.{half}.weight"]
    assert "1 match no parameter" in refusal(weights(), made, tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("down", "up"), [((2, 8), (8, 3)), ((2, 8), (8,)), ((8,), (8, 8)), ((2, 8), (8, 2, 3)), ((2, 4, 2), (8, 2))]
)
def test_halves_that_do_not_make_the_weight_are_refused(down, up, tmp_path):
    made = {
        "blocks.0.self_attn.q.lora_A.weight": np.ones(down, "f4"),
        "blocks.0.self_attn.q.lora_B.weight": np.ones(up, "f4"),
    }
    assert "have another shape" in refusal(weights(), made, tmp_path / "l.safetensors")


def test_a_pair_for_a_norm_is_refused(tmp_path):
    made = {
        "blocks.0.norm3.lora_A.weight": np.ones((1, 1), "f4"),
        "blocks.0.norm3.lora_B.weight": np.ones((8, 1), "f4"),
    }
    assert "have another shape" in refusal(weights(), made, tmp_path / "l.safetensors")


def test_two_names_for_one_parameter_are_refused(tmp_path):
    pairs = {"blocks.0.self_attn.q": pair((8, 8))}
    made = lightx2v(pairs) | {k.replace("diffusion_model.", "transformer."): v for k, v in lightx2v(pairs).items()}
    assert "both mean blocks.0.self_attn.q.weight" in refusal(weights(), made, tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"blocks.0.q.lora_A.a.weight": 1, "blocks.0.q.lora_B.a.weight": 1, "blocks.0.q.lora_A.b.weight": 1},
            "several adapters: a, b",
        ),
        ({"blocks.0.q.lora_A.weight": 1, "blocks.0.q.lora_down.weight": 1}, "two tensors for one place"),
        ({"blocks.0.q.lora_down.weight": 1, "blocks.0.q.dora_scale": 1}, "DoRA"),
        ({"blocks.0.q.hada_w1_a": 1}, "LoHa"),
        ({"blocks.0.q.lokr_w1": 1}, "LoKr"),
        ({"blocks.0.self_attn.q.weight": 1}, "holds no LoRA tensors"),
    ],
)
def test_a_file_that_is_no_plain_lora_is_refused_when_it_is_opened(made, message, tmp_path):
    path = write(tmp_path / "l.safetensors", {key: np.ones((2, 2), "f4") for key in made})
    with pytest.raises(UserError, match=message):
        LoraFile.open(path)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [(np.ones(2, "f4"), "single number"), (np.float32("nan"), "is nan"), (np.float32("inf"), "is inf")],
)
def test_an_alpha_that_is_no_number_is_refused(alpha, message, tmp_path):
    made = lightx2v({"blocks.0.self_attn.q": pair((8, 8))}) | {"diffusion_model.blocks.0.self_attn.q.alpha": alpha}
    with pytest.raises(UserError, match=message):
        LoraFile.open(write(tmp_path / "l.safetensors", made))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_nan_and_infinity_are_refused_before_anything_is_merged(value, strength, tmp_path):
    made = lightx2v(all_pairs())
    made["diffusion_model.blocks.1.ffn.2.lora_up.weight"] = np.full((8, RANK), value, "f4")
    message = refusal(weights(), made, tmp_path / "l.safetensors", strength)
    assert "blocks.1.ffn.2.lora_up.weight' holds NaN or infinity" in message


def test_integers_as_lora_tensors_are_refused(tmp_path):
    made = {k: v.astype(np.int8) for k, v in lightx2v(all_pairs()).items()}
    assert "floating-point" in refusal(weights(), made, tmp_path / "l.safetensors")


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_merging_into_quantized_weights_is_refused(dtype, tmp_path):
    message = refusal(weights(dtype=dtype), lightx2v(all_pairs()), tmp_path / "l.safetensors")
    assert "is quantized to" in message


def test_a_result_out_of_range_is_refused_and_a_broken_weight_is_not_blamed_on_the_lora(tmp_path):
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v({"blocks.0.self_attn.q": pair((8, 8))})))
    merged, _ = merge_into(weights(dtype=np.float16), [(file, 1e6)])
    with pytest.raises(UserError, match="out of the range of float16"):
        merged["blocks.0.self_attn.q.weight"].read()
    broken = weights() | {"blocks.0.self_attn.q.weight": lazy(np.full((8, 8), np.nan, "f4"))}
    with pytest.raises(UserError, match="before any LoRA"):
        merge_into(broken, [(file, 1.0)])[0]["blocks.0.self_attn.q.weight"].read()


@pytest.mark.parametrize("strength", [np.nan, np.inf])
def test_a_strength_that_is_no_number_is_refused(strength, tmp_path):
    assert "not a finite number" in refusal(weights(), lightx2v(all_pairs()), tmp_path / "l.safetensors", strength)


def test_paths_that_hold_no_lora_are_refused(tmp_path):
    (tmp_path / "l.txt").write_text("no")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "l.txt", "give the LoRA file"),
        (tmp_path / "no.safetensors", "no.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            LoraFile.open(path)


# Native checkpoints


@pytest.mark.parametrize("config", [T2V, I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_native_checkpoint_gets_the_same_weights_as_the_official_one(config, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_module, "_PIECE", 40)
    official, rows = weights(config, dtype), table("transformer", config)
    made = lightx2v({m: p for m, p in all_pairs(config).items() if not m.startswith("blocks.0.ffn")})
    made |= {"blocks.1.diff_m": np.ones((1, 6, 8), "f4"), "head.diff_m": np.ones((1, 2, 8), "f4")}
    made |= {
        "patch_embedding.diff": np.ones((8, config.in_dim, 1, 2, 2), "f4"),
        "blocks.0.norm3.diff_b": np.ones(8, "f4"),
    }
    files = [(LoraFile.open(write(tmp_path / "l.safetensors", made)), 0.7)]
    native = to_native(official, rows)
    merged, report = merge_into_native(native, files, rows)
    expected, expected_report = merge_into(official, files)
    assert report == expected_report
    assert merged.keys() == native.keys()
    for name, array in to_native(expected, rows).items():
        got = merged[name].read()
        assert got.dtype == dtype and got.shape == native[name].shape
        tolerance = 1e-6 if dtype == np.float32 else 2**-7
        np.testing.assert_allclose(np.asarray(got, "f4"), np.asarray(array.read(), "f4"), rtol=tolerance, atol=1e-6)
    untouched = merged["blocks.ffn.linear_1.kernel"].read()[0]
    np.testing.assert_array_equal(untouched, native["blocks.ffn.linear_1.kernel"].read()[0])
    assert merged["blocks.norm3.scale"] is native["blocks.norm3.scale"]
    assert merged["blocks.self_attn.q.bias"] is native["blocks.self_attn.q.bias"]


def to_native(official, rows):
    made = {}
    for row in rows:
        layers = [row.transform.forward(official[key].read()) for key in row.official_keys]
        made[row.native] = lazy(np.ascontiguousarray(layers[0] if row.layers is None else np.stack(layers)))
    return made


def test_reading_a_merged_native_stack_leaves_the_file_as_it_was(tmp_path):
    rows = table("transformer", T2V)
    native = to_native(weights(T2V), rows)
    before = native["blocks.ffn.linear_2.kernel"].read().copy()
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(all_pairs(T2V))))
    merged, _ = merge_into_native(native, [(file, 1.0)], rows)
    first, second = (merged["blocks.ffn.linear_2.kernel"].read() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(before, native["blocks.ffn.linear_2.kernel"].read())
    assert not np.array_equal(first, before)


def test_a_native_checkpoint_refuses_what_does_not_fit(tmp_path):
    rows = table("transformer", T2V)
    file = LoraFile.open(write(tmp_path / "l.safetensors", lightx2v(all_pairs(I2V))))
    with pytest.raises(UserError, match="image-to-video"):
        merge_into_native(to_native(weights(T2V), rows), [(file, 1.0)], rows)


# The command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("dir:1/a.safetensors", ("dir:1/a.safetensors", 1.0)),
        ("dir:1/a.safetensors:1e-1", ("dir:1/a.safetensors", 0.1)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:2", (r"C:\loras\a.safetensors", 2.0)),
        ("C:/loras/a.pt:0.5", ("C:/loras/a.pt", 0.5)),
        ("some:name", ("some:name", 1.0)),
    ],
)
def test_a_lora_argument_is_a_file_and_a_strength(text, expected):
    assert parse_lora_argument(text) == expected


def test_a_file_that_exists_under_the_whole_name_is_that_file(tmp_path):
    path = tmp_path / "a.safetensors:2"
    path.touch()
    assert parse_lora_argument(str(path)) == (str(path), 1.0)
    assert parse_lora_argument(f"{path}:3") == (str(path), 3.0)


@pytest.mark.parametrize("text", ["", ":1", "a.safetensors:", "a.safetensors:big", "a.pt:nan", "a.pt:inf"])
def test_a_lora_argument_without_a_file_or_with_a_bad_strength_is_refused(text):
    with pytest.raises(UserError, match="lora:"):
        parse_lora_argument(text)


@hypothesis.given(
    st.text(max_size=30) | st.from_regex(r"[a-zC:.\\/]{0,12}(\.safetensors|\.pt)?(:[0-9.e+-]{0,5})?", fullmatch=True)
)
@hypothesis.settings(max_examples=200)
def test_any_lora_argument_is_read_or_refused(text):
    try:
        path, strength = parse_lora_argument(text)
    except UserError:
        return
    assert path and text.startswith(path) and np.isfinite(strength)
