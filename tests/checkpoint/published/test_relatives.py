"""Relatives of Wan2.1, whose tensors are named as its own, are refused by their right names, and so by `infer`."""

import dataclasses
import json

import pytest
from small_checkpoints import CONFIGS, I2V, diffusers_folder, official_folder, random_tensors, save, save_json
from tiny_models import T2V, random_parameters, write_checkpoint

from x2v_jax.checkpoint.conversion.convert import ConversionOptions, convert
from x2v_jax.checkpoint.conversion.inspect import inspect
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError
from x2v_jax.request import Request
from x2v_jax.request.resolve import resolve

SIZES = {"transformer": {"num_heads": 2, "text_len": 12}}


def refused(path, name, **options):
    """What `convert` says, after `inspect` has said the name and offered no command."""
    found = inspect(path)
    assert name in found.model and not found.commands
    with pytest.raises(UserError) as error:
        convert(path, path.parent / "out", ConversionOptions(**({"settings": SIZES} | options)))
    assert name in str(error.value) and not (path.parent / "out").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("image", "in_dim", "out_dim", "name"),
    [
        (False, 36, 16, "Wan2.2 I2V-A14B"),
        (False, 48, 48, "Wan2.2 TI2V-5B"),
        (False, 100, 48, "Wan2.2 Fun-5B-Control"),
        (True, 48, 16, "Wan2.1 Fun-Control"),
        (True, 32, 16, "Fun-Control-Camera"),
        (False, 32, 16, "a relative of Wan2.1 T2V that takes 32 channels and gives 16"),
        (True, 20, 16, "a relative of Wan2.1 I2V that takes 20 channels"),
    ],
)
def test_other_channels(tmp_path, image, in_dim, out_dim, name):
    config = dataclasses.replace(I2V if image else CONFIGS["transformer"], in_dim=in_dim, out_dim=out_dim)
    path = save(tmp_path / "model.safetensors", random_tensors("transformer", config))
    assert f"takes {in_dim} channels" in refused(path, name)
    save_json(tmp_path / "config.json", {"model_type": "i2v", "in_dim": in_dim, "num_heads": 2})  # as Wan2.2's says
    refused(path, name, settings={})


@pytest.mark.parametrize(
    ("index", "second", "name"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}, True, "T2V-A14B"),
        ({"boundary_ratio": 0.9}, False, "Wan2.2 T2V-A14B"),
        ({}, True, "Wan2.2 T2V-A14B"),
        ({"expand_timesteps": True}, False, "Wan2.2 TI2V-5B"),
        ({"_class_name": "WanVACEPipeline"}, False, "VACE"),
        ({"_class_name": "SkyReelsV2DiffusionForcingPipeline"}, False, "SkyReels-V2"),
        ({"_class_name": "AnotherPipeline"}, False, "a AnotherPipeline of diffusers"),
    ],
)
def test_diffusers_folders_of_other_pipelines(tmp_path, index, second, name):
    diffusers_folder(tmp_path / "src")
    save_json(tmp_path / "src/model_index.json", {"_class_name": "WanPipeline", **index})
    if second:
        save(tmp_path / "src/transformer_2/diffusion_pytorch_model.safetensors", random_tensors("transformer"))
    refused(tmp_path / "src", name)
    convert(tmp_path / "src", tmp_path / "vae", ConversionOptions(components=("vae",)))  # which is Wan2.1's own


def test_nulls_of_a_wan21_folder_are_no_second_expert(tmp_path):
    diffusers_folder(tmp_path / "src")
    nulls = {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    save_json(tmp_path / "src/model_index.json", {"_class_name": "WanPipeline", **nulls})
    save(tmp_path / "src/upscaler/model.safetensors", random_tensors("vae"))
    left = inspect(tmp_path / "src").left_out
    assert left == {str(tmp_path / "src/upscaler"): "weights of a part that Wan2.1 does not have"}
    assert any("upscaler" in note for note in convert(tmp_path / "src", tmp_path / "out"))


def test_an_official_folder_of_two_experts(tmp_path):
    official_folder(tmp_path / "src", transformer=False)
    for noise in ("high", "low"):
        save(tmp_path / f"src/{noise}_noise_model/diffusion_pytorch_model.safetensors", random_tensors("transformer"))
    save_json(tmp_path / "src/high_noise_model/config.json", {"model_type": "i2v", "in_dim": 36})
    assert "high_noise_model and low_noise_model" in refused(tmp_path / "src", "Wan2.2 I2V-A14B, which has two experts")
    refused(tmp_path / "src/low_noise_model", "its low-noise expert")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "its high-noise expert"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn.safetensors", "its low-noise expert"),
        ("models--x--Wan2.2-T2V-A14B/snapshots/0123/model.safetensors", "Wan2.2"),
        ("wan2.2-fine-tune.safetensors", "Wan2.2"),
    ],
)
def test_experts_with_wan21s_tensors_are_told_by_their_names(tmp_path, file, name):
    assert "by the name" in refused(save(tmp_path / file, random_tensors("transformer")), name)
    nearer = save(tmp_path / "Wan2.2-T2V-A14B/wan2.1_t2v.safetensors", random_tensors("transformer"))
    assert inspect(nearer).networks[0].other is None


def test_wan22s_vae(tmp_path):
    tensors = random_tensors("vae")
    nested = {k.replace("downsamples.0.", "downsamples.0.downsamples.0."): v for k, v in tensors.items()}
    message = refused(save(tmp_path / "Wan2.2_VAE.safetensors", nested), "the VAE of Wan2.2 TI2V-5B")
    assert "latents_mean" not in message
    wide = random_tensors("vae", dataclasses.replace(CONFIGS["vae"], z_dim=48))
    refused(save(tmp_path / "wide.safetensors", wide), "the VAE of Wan2.2 TI2V-5B")


def test_names_of_other_models_are_told_by_their_keys(tmp_path):
    extra = {"vace_blocks.0.before_proj.weight": random_tensors("transformer")["head.head.bias"]}
    refused(save(tmp_path / "v.safetensors", random_tensors("transformer") | extra), "VACE (video editing)")


def test_what_an_earlier_version_converted_is_refused_in_a_sentence(tmp_path):
    path = write_checkpoint(tmp_path / "native")
    wrong = dataclasses.replace(T2V, in_dim=36)
    model = json.loads((path / "model.json").read_text())
    model["components"]["transformer"]["config"]["in_dim"] = 36
    (path / "model.json").write_text(json.dumps(model))
    save(path / "transformer.safetensors", random_parameters("transformer", wrong))
    with pytest.raises(
        UserError, match=r"takes 36 channels and gives 16.*it is Wan2\.2 I2V-A14B, one of its two experts"
    ):
        resolve(Request(prompt="a"), open_checkpoint(path))


@pytest.mark.parametrize("name", ["Wan2.1-T2V-14B-CfgDistill", "wan_dmd"])
def test_a_distillation_of_unknown_steps_asks_for_a_schedule(tmp_path, name):
    diffusers_folder(tmp_path / name)
    with pytest.raises(UserError, match=r"says that it is distilled, and not for which steps; give --schedule"):
        convert(tmp_path / name, tmp_path / "out")
    convert(tmp_path / name, tmp_path / "out", ConversionOptions(schedule="distill"))
    assert open_checkpoint(tmp_path / "out").variant == "distill"
    convert(tmp_path / name, tmp_path / "base", ConversionOptions(variant="base"))
    assert open_checkpoint(tmp_path / "base").variant == "base"
