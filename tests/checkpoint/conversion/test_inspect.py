"""`inspect` tells what a path holds, what is missing, and what to do with it."""

import json

import numpy as np
import pytest
from small_checkpoints import CONFIGS, official_folder, random_tensors, save, save_json
from smooth_checkpoints import recording

from convert.describe import phases
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.inspect import inspect, to_text
from x2v_jax.errors import UserError
from x2v_jax.models.config import ClipConfig, Schedule, Umt5Config, VaeConfig, WanConfig


def network(found, component):
    return next(n for n in found.networks if n.component == component)


def test_a_folder_with_two_variants(tmp_path):
    made = official_folder(tmp_path)
    save(tmp_path / "distill_models/distill_model.safetensors", made["transformer"])
    found = inspect(tmp_path, phases)
    assert (found.layout, found.task, found.variants) == ("lightx2v", "t2v", ("base", "distill"))
    assert found.missing == ()
    assert [n.component for n in found.networks] == ["transformer", "transformer", "vae", "text_encoder"]
    text = network(found, "text_encoder")
    assert text.dtypes == {"bfloat16": text.tensors}
    assert text.parameters == sum(value.size for value in made["text_encoder"].values())
    assert text.bytes == 2 * text.parameters
    assert found.commands == tuple(f"python -m convert wan {tmp_path} DST --variant {v}" for v in ("base", "distill"))
    assert set(found.memory) == {"text", "denoise", "vae"}
    shown = to_text(found, "everything")
    for words in ("LightX2V folder", "base, distill", "counted: everything", "(distill)", "832x480, 81 frames"):
        assert words in shown
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_a_native_checkpoint(tmp_path):
    official_folder(tmp_path / "src", image=True)
    convert(tmp_path / "src", tmp_path / "native")
    found = inspect(tmp_path / "native", phases)
    assert (found.layout, found.task, found.variants, found.missing) == ("native", "i2v", ("base",), ())
    assert found.commands == (f"python -m infer --config.checkpoint={tmp_path / 'native'}",)
    assert {n.naming for n in found.networks} == {"native"}
    assert not any(n.problems for n in found.networks)
    (tmp_path / "native/vae.safetensors").unlink()
    broken = inspect(tmp_path / "native")
    assert "vae.safetensors is missing" in network(broken, "vae").problems[0]


@pytest.mark.slow
def test_a_native_checkpoint_with_a_cut_file_is_damaged_and_not_offered_to_run(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    file = tmp_path / "native/transformer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = inspect(tmp_path / "native", phases)
    shown = to_text(found)
    assert found.commands == () and "python -m infer" not in shown
    assert "damaged or incomplete: " in shown and "ownload" not in shown and "it is truncated" in shown
    assert "damaged    transformer: it cannot be run; copy the whole folder or convert it again" in shown


def test_a_file_of_this_projects_own_is_named(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    part = tmp_path / "native/transformer.safetensors"
    found = inspect(part)
    assert (found.layout, found.commands, found.networks) == ("part", (), ())
    assert "part of a converted checkpoint; give its folder" in to_text(found)
    with pytest.raises(UserError, match=r"transformer\.safetensors is part of a converted checkpoint; give its folder"):
        convert(part, tmp_path / "out")
    calibration = recording(tmp_path / "c.safetensors", CONFIGS["transformer"]).path
    found = inspect(calibration)
    assert found.model == "recorded activations, for --smooth"
    assert found.commands == (f"python -m convert wan MODEL DST --quantize int8 --smooth {calibration}",)
    with pytest.raises(UserError, match=r"c\.safetensors is recorded activations, for --smooth"):
        convert(calibration, tmp_path / "out")


def test_problems_are_told_and_do_not_stop_it(tmp_path):
    tensors = random_tensors("transformer")
    del tensors["blocks.1.norm3.bias"]
    save(tmp_path / "x.safetensors", tensors)
    found = inspect(tmp_path / "x.safetensors")
    assert "num_heads cannot be read" in network(found, "transformer").problems[0]
    save_json(tmp_path / "config.json", {"num_heads": 2})
    found = inspect(tmp_path / "x.safetensors")
    assert network(found, "transformer").problems == ("1 missing: blocks.1.norm3.bias",)
    assert found.missing == ("vae", "text_encoder", "tokenizer")
    assert "cannot be converted: 1 missing" in to_text(found)


def test_a_lora_and_something_else(tmp_path):
    keys = {"down": np.ones((3, 24), np.float32), "up": np.ones((40, 3), np.float32)}
    lora = {f"diffusion_model.blocks.0.ffn.0.lora_{name}.weight": value for name, value in keys.items()}
    found = inspect(save(tmp_path / "l.safetensors", lora))
    assert found.model == "LoRA for Wan2.1, 1 modules, rank 3"
    assert found.commands[0].endswith("--lora " + str(tmp_path / "l.safetensors"))
    save(tmp_path / "loras/b.safetensors", lora)
    save(tmp_path / "loras/a.safetensors", lora)
    each = [command.rpartition(" ")[2] for command in inspect(tmp_path / "loras").commands]
    assert each == [str(tmp_path / f"loras/{name}.safetensors") for name in "ab"], "--lora takes files"
    found = inspect(save(tmp_path / "x.safetensors", {"a": np.ones(1, np.float32)}))
    assert (found.layout, found.commands) == ("unknown", ())
    assert "not used" in to_text(found)
    with pytest.raises(UserError, match="no such file or folder"):
        inspect(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("config", "name", "weights"),
    [
        (WanConfig.t2v_1_3b(), "Wan2.1 T2V 1.3B", 2.8e9),
        (WanConfig.t2v_14b(), "Wan2.1 T2V 14B", 28.6e9),
        (WanConfig.i2v_14b(), "Wan2.1 I2V 14B", 32.8e9),
    ],
)
def test_published_sizes_are_known_by_name_and_weight(config, name, weights):
    from x2v_jax.checkpoint.conversion.inspect import _model_name

    configs = {"transformer": config, "vae": VaeConfig(), "text_encoder": Umt5Config(), "image_encoder": ClipConfig()}
    assert _model_name(config, configs) == name
    predicted = phases(configs, Schedule())
    assert weights < predicted["denoise"] < weights + 20e9
    assert 11.3e9 < predicted["text"] < 12e9
    assert phases({"vae": VaeConfig()}, Schedule()) == {}


def test_the_small_sizes_are_described_by_their_parameters(tmp_path):
    official_folder(tmp_path)
    assert inspect(tmp_path).model.startswith("Wan2.1 T2V of another size (")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert inspect(tmp_path).model == "Wan2.1 vae, text_encoder"
    assert CONFIGS
