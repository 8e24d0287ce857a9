"""Both trainers in miniature: what they measure improves, and what they export runs."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.shapes import base, vae
from train.cli import main
from train.loop import train
from train.tasks.flow_matching import FlowMatchingTask
from train.tasks.vae import VaeTask, inflate_start
from x2v_jax import Pipeline
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.config.training import phase
from x2v_jax.errors import UserError


def losses(run_dir: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def vae_config(run_dir: pathlib.Path) -> ConfigDict:
    config = vae.get_config()
    config.run_dir = str(run_dir)
    config.model.dim = 4
    config.log_every = 10
    config.eval_videos, config.statistics_videos = 2, 8
    config.phases = (phase("images", steps=150, learning_rate=1e-2, warmup=5, batch_size=8, num_frames=1),)
    return config


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run_dir = tmp_path_factory.mktemp("vae")
    config = vae_config(run_dir)
    task = VaeTask(config)
    state = train(config, task)
    task.export(state.ema, run_dir / "export")
    return run_dir


def base_config(run_dir: pathlib.Path, trained_vae: pathlib.Path) -> ConfigDict:
    config = base.get_config()
    config.run_dir, config.vae = str(run_dir), str(trained_vae / "export")
    config.model.update({"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32})
    config.text_encoder.update({"dim": 16, "dim_attn": 16, "dim_ffn": 32, "num_heads": 2, "num_layers": 1})
    config.num_videos, config.log_every, config.eval_every, config.ema_decay = 16, 20, 1000, 0.9
    config.evaluation.update({"prompts": 2, "steps": 2})
    config.phases = (phase("flow matching", steps=100, learning_rate=4e-3, warmup=5, batch_size=8),)
    return config


@pytest.fixture(scope="module")
def trained_base(trained_vae: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    run_dir = tmp_path_factory.mktemp("base")
    config = base_config(run_dir, trained_vae)
    task = FlowMatchingTask(config)
    state = train(config, task)
    task.export(state.ema, run_dir / "export")
    return run_dir


@pytest.mark.long
def test_the_vae_learns_to_reconstruct(trained_vae: pathlib.Path):
    values = losses(trained_vae)
    assert min(values[-3:]) < 0.75 * values[0]


@pytest.mark.long
def test_the_vae_leaves_pictures_and_its_latents_are_normalised(trained_vae: pathlib.Path):
    assert list((trained_vae / "samples").glob("*.png"))
    checkpoint = open_checkpoint(trained_vae / "export")
    config: Any = checkpoint.config("vae")
    assert all(std > 0 for std in config.latents_std)
    assert config.latents_std != (1.0,) * 16


def test_a_new_vae_treats_frames_as_images():
    kernel = jax.numpy.ones((3, 3, 3, 2, 2))
    time_kernel = jax.numpy.ones((3, 4, 8))
    params = inflate_start({"conv": {"kernel": kernel}, "time_conv": {"kernel": time_kernel}})
    assert not params["conv"]["kernel"][:2].any()
    assert params["conv"]["kernel"][2].all()
    np.testing.assert_array_equal(params["time_conv"]["kernel"][2], np.tile(np.eye(4), (1, 2)))
    assert not params["time_conv"]["kernel"][:2].any()


@pytest.mark.long
def test_flow_matching_learns(trained_base: pathlib.Path):
    values = losses(trained_base)
    assert values[-1] < 0.8 * values[0]


@pytest.mark.long
def test_training_goes_on_from_exported_weights(trained_base: pathlib.Path, trained_vae: pathlib.Path):
    config = base_config(trained_base, trained_vae)
    first = FlowMatchingTask(config).init(jax.random.key(0))["model"]
    config.init_from = str(trained_base / "export")
    second = FlowMatchingTask(config).init(jax.random.key(0))["model"]
    stored = open_checkpoint(trained_base / "export").load("transformer", "float32")
    difference = lambda a, b: float(abs(a["head"]["linear"]["kernel"] - b["head"]["linear"]["kernel"]).max())  # noqa: E731
    assert difference(second["transformer"], stored) == 0
    assert difference(first["transformer"], stored) > 0
    config.model.num_layers = 1
    with pytest.raises(UserError, match="transformer of other sizes"):
        FlowMatchingTask(config).init(jax.random.key(0))


@pytest.mark.long
def test_latents_are_made_once(trained_base: pathlib.Path):
    with np.load(trained_base / "latents.npz") as stored:
        assert stored["latents"].shape == (16, 9, 8, 8, 16)
        assert 0.5 < stored["latents"].std() < 2.0


@pytest.mark.long
def test_the_export_runs_in_the_pipeline(trained_base: pathlib.Path):
    pipe = Pipeline.from_checkpoint(trained_base / "export")
    frames = pipe("a red circle moves left", num_inference_steps=2, num_frames=5)
    assert frames.shape == (5, 64, 64, 3)


@pytest.mark.long
def test_the_command_line_trains_resumes_and_exports(
    tmp_path: pathlib.Path, trained_vae: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--config.stepz=1"]) == 2
    assert "no key 'stepz'" in capsys.readouterr().err
    assert (
        main([f"--config.vae={trained_vae / 'export'}", f"--config.run_dir={tmp_path}", f"--export={tmp_path}/x"]) == 2
    )
    assert "holds no checkpoints; train first" in capsys.readouterr().err
    assert main(["--config.vae=/no/such/folder", f"--config.run_dir={tmp_path}"]) == 2
    assert "/no/such/folder" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--export" in capsys.readouterr().out
