"""What a refused LoRA advises exists in the program that says it: `convert`, `infer`, Python."""

import numpy as np
import pytest
from small_checkpoints import random_tensors, save
from tiny_models import write_checkpoint

from convert.__main__ import main
from infer.cli import DEFAULT_CONFIG
from infer.settings import options, read_settings
from x2v_jax import Pipeline, UserError
from x2v_jax.config import flags


@pytest.fixture(scope="module")
def partly_fitting(tmp_path_factory):
    tensors = {}
    for block in (0, 40):
        name = f"diffusion_model.blocks.{block}.ffn.0"
        tensors |= {f"{name}.lora_down.weight": np.ones((2, 32), np.float32)}
        tensors |= {f"{name}.lora_up.weight": np.ones((48, 2), np.float32)}
    return save(tmp_path_factory.mktemp("lora") / "l.safetensors", tensors)


def test_python_and_infer_take_allow_partial(tmp_path, partly_fitting):
    path = write_checkpoint(tmp_path / "c")
    with pytest.raises(UserError, match="set allow_partial to true"):
        Pipeline.from_checkpoint(path, loras=[str(partly_fitting)])
    report = Pipeline.from_checkpoint(path, loras=[str(partly_fitting)], allow_partial=True).lora_report
    assert "2 of 4 tensors used" in str(report)
    given = [f"--config.checkpoint={path}", f"--config.lora={partly_fitting}", "--config.allow_partial=true"]
    line = flags.parse(given, default_config=DEFAULT_CONFIG, options={}, other_names={})
    assert options(read_settings(line).config)["allow_partial"] is True


def test_convert_names_its_own_option(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors", random_tensors("transformer"))
    lora = {}
    for block in (0, 40):
        lora[f"blocks.{block}.ffn.0.lora_A.weight"] = np.ones((2, 24), np.float32)
        lora[f"blocks.{block}.ffn.0.lora_B.weight"] = np.ones((40, 2), np.float32)
    file = save(tmp_path / "l.safetensors", lora)
    sizes = ["--set", "transformer.num_heads=2", "--lora", str(file)]
    assert main(["wan", str(source), str(tmp_path / "out"), *sizes]) == 2
    assert "give --allow-partial to apply only what fits" in capsys.readouterr().err
    assert main(["wan", str(source), str(tmp_path / "out"), *sizes, "--allow-partial"]) == 0
