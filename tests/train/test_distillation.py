"""Every trainer in miniature, on the tiny world's own teacher: what it measures improves, and what it exports runs."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.train import shapes_causal_ode_init, shapes_causvid, shapes_i2v_dmd, shapes_ode_pairs
from configs.train import shapes_self_forcing as self_forcing
from configs.train import shapes_t2v_dmd as t2v_dmd
from train.cli import main
from train.data.sources import Batch
from train.data.trajectories import TrajectoryCache
from train.loop import train
from train.rollouts import sample_keys
from train.tasks.dmd import CausVidTask, DmdTask, dmd_settings
from train.tasks.ode import OdePairs, OdeRegressionTask, trajectory_grid
from x2v_jax import Pipeline
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.config.training import phase
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import UserError
from x2v_jax.models.functional import flatten

TWO_STEPS = {"denoising_step_list": (1000, 500), "warp_denoising_step": True}


def small(config: ConfigDict, run_dir: pathlib.Path, steps: int, learning_rate: float = 2e-4) -> ConfigDict:
    """The same recipe with two steps, which the teacher's weights are far from, few prompts and a short run."""
    config.run_dir = str(run_dir)
    config.student = ""
    config.student_schedule.update(TWO_STEPS)
    config.data.count = 32
    config.evaluation.prompts = 24
    config.ema_start = 10**6
    config.update({"log_every": 5, "save_every": 1000, "eval_every": 1000})
    if "generator_every" in config:
        config.generator_every = 1
    critic = {"learning_rate": 2 * learning_rate}
    config.phases = (phase("mini", steps=steps, batch_size=8, learning_rate=learning_rate, warmup=2, critic=critic),)
    return config


def before_and_after(task: Any, config: ConfigDict) -> tuple[dict[str, float], dict[str, float], Any]:
    directory = pathlib.Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    before = task.evaluate(task.init(jax.random.key(config.seed))["generator"], 0, directory)
    state = train(config, task)
    evaluated = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines() if "eval/all" in line]
    return before, {k.removeprefix("eval/"): v for k, v in evaluated[-1].items()}, state


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, float], dict[str, float], Any]:
    config = small(t2v_dmd.get_config(), tmp_path_factory.mktemp("dmd"), steps=25)
    task = DmdTask(config)
    return task, config, *before_and_after(task, config)


@pytest.mark.slow
def test_distribution_matching_teaches_two_steps(distilled: Any):
    _, _, before, after, _ = distilled
    assert before["all"] < 0.5
    assert after["all"] > before["all"] + 0.25


@pytest.mark.slow
def test_samples_are_left_as_video_and_picture(distilled: Any):
    folder = pathlib.Path(distilled[1].run_dir) / "samples"
    assert (folder / "000025.mp4").stat().st_size > 1000
    assert (folder / "000025.png").stat().st_size > 1000


@pytest.mark.slow
def test_losses_are_logged_by_timestep_and_exit_step(distilled: Any):
    lines = (pathlib.Path(distilled[1].run_dir) / "log.jsonl").read_text()
    for name in ("generator/loss_exit_0", "generator/loss_exit_1", "critic/loss_t_750", "generator/dmd_gradient"):
        assert f'"{name}"' in lines


@pytest.mark.slow
def test_the_student_runs_in_the_pipeline_and_shares_the_teachers_encoders(distilled: Any, tmp_path: pathlib.Path):
    task, _, _, _, state = distilled
    task.export(state.ema, tmp_path / "student")
    checkpoint = open_checkpoint(tmp_path / "student")
    assert (checkpoint.variant, checkpoint.task) == ("distill", "t2v")
    assert checkpoint.schedule.denoising_step_list == (1000, 500)
    assert checkpoint.schedule.guidance_scale == 1
    assert not (tmp_path / "student" / "vae.safetensors").exists()
    frames = Pipeline.from_checkpoint(tmp_path / "student")("a red circle moves left", seed=1)
    assert frames.shape == (33, 64, 64, 3)


@pytest.mark.slow
def test_a_lora_learns_too_and_its_export_is_the_merged_model_and_three_files(tmp_path: pathlib.Path):
    config = small(t2v_dmd.get_config(), tmp_path / "run", steps=6, learning_rate=2e-3)
    config.lora = ConfigDict({"rank": 4, "alpha": 4.0})
    config.evaluation.prompts = 2
    task = DmdTask(config)
    state = train(config, task)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params["generator"])) < 400_000
    assert any(np.abs(np.asarray(pair["up"])).max() > 0 for pair in state.params["generator"].values())
    task.export(state.params["generator"], tmp_path / "student")
    assert len(list((tmp_path / "student").glob("lora_*.safetensors"))) == 3
    merged = open_checkpoint(tmp_path / "student").load("transformer", "float32")
    base = open_checkpoint("assets/shapes").load("transformer", "float32")
    difference = {k: float(abs(v - flatten(base)[k]).max()) for k, v in flatten(merged).items()}
    # The export is in 16 bits, which alone moves a weight by up to 0.4 %.
    assert difference["blocks.ffn.linear_1.kernel"] > 0.005 > difference["head.linear.kernel"]


@pytest.mark.slow
def test_self_forcing_teaches_a_causal_student_from_bidirectional_weights(tmp_path: pathlib.Path):
    config = small(self_forcing.get_config(), tmp_path, steps=25)
    before, after, _ = before_and_after(DmdTask(config), config)
    assert before["all"] < 0.1
    assert after["all"] > before["all"] + 0.1
    assert after["found"] > before["found"] + 0.4


@pytest.mark.long
def test_causvid_teaches_a_causal_student_from_real_videos(tmp_path: pathlib.Path):
    config = small(shapes_causvid.get_config(), tmp_path, steps=25)
    task = CausVidTask(config)
    before, after, _ = before_and_after(task, config)
    assert after["found"] > before["found"] + 0.3
    assert task.variant == "causvid"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    config = shapes_ode_pairs.get_config()
    config.run_dir = str(tmp_path_factory.mktemp("pairs"))
    config.output = f"{config.run_dir}/trajectories"
    config.student_schedule.update(TWO_STEPS)
    config.update({"num_steps": 8, "batch_size": 8})
    config.data.count = 24
    OdePairs(config).run()
    return config


@pytest.mark.slow
def test_trajectories_are_made_once_and_lie_at_the_students_levels(pairs: ConfigDict):
    cache = TrajectoryCache.open(pairs.output)
    assert cache.sigmas == pytest.approx((1.0, 0.75, 0.0))
    assert len(cache) == 24
    states = cache.states(range(2))
    assert abs(states[:, 0].std() - 1) < 0.05  # it begins as noise
    shard = sorted(pathlib.Path(pairs.output).rglob("*.safetensors"))[0]
    made = shard.stat().st_mtime_ns
    OdePairs(pairs).run()
    assert shard.stat().st_mtime_ns == made


def test_the_solvers_grid_passes_through_every_level_of_the_student():
    warped = tuple(map(float, step_sigmas((1000, 750, 500, 250), 5.0)))
    grid = trajectory_grid(warped, 5.0, 48)
    plain = trajectory_grid((), 5.0, 48)
    np.testing.assert_allclose(grid, plain, atol=1e-6)  # the published list needs no moving
    odd = tuple(map(float, step_sigmas((999, 603, 74), 8.0, warp=False)))
    moved = trajectory_grid(odd, 8.0, 20)
    assert set(odd) <= set(moved.tolist())
    assert np.all(np.diff(moved) < 0) and moved[0] == 1 and moved[-1] == 0
    with pytest.raises(UserError, match="num_steps is 4, too few"):
        trajectory_grid(tuple(np.linspace(1, 0.1, 9).tolist()), 3.0, 4)


@pytest.mark.slow
def test_regression_to_the_ends_of_trajectories_starts_a_causal_student(pairs: ConfigDict, tmp_path: pathlib.Path):
    config = small(shapes_causal_ode_init.get_config(), tmp_path, steps=30, learning_rate=1e-3)
    config.pairs = pairs.output
    config.evaluation.prompts = 2
    state = train(config, OdeRegressionTask(config))
    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in losses if "loss" in line]
    assert int(state.step) == 30
    assert values[-1] < 0.7 * values[0]


def continuing(pairs: ConfigDict, run_dir: pathlib.Path, **settings: Any) -> DmdTask:
    config = small(self_forcing.get_config(), run_dir, steps=2)
    config.continuation.pairs = pairs.output
    config.evaluation.prompts = 2
    config.phases = (phase("mini", steps=3, batch_size=4, learning_rate=2e-4, **settings),)
    return DmdTask(config)


@pytest.mark.long
def test_a_chain_of_own_videos_is_each_gone_on_from_under_prompts_in_turn(pairs: ConfigDict, tmp_path: pathlib.Path):
    task = continuing(pairs, tmp_path, own_share=1.0)
    weights, key = task.init(jax.random.key(0))["generator"], jax.random.key(1)
    frames = 2 * task.config.causal.block
    plain, one, two = (task.continuations.batch(0, 0, 4, frames, 0, own=own) for own in (0, 1, 2))
    after = jax.jit(task._after_own)
    assert plain.following is None and after(weights, task.frozen, plain, key).given is not None
    first, second = (after(weights, task.frozen, batch, key) for batch in (one, two))
    np.testing.assert_array_equal(first.conditions.text, one.following.text)
    np.testing.assert_array_equal(second.conditions.text, two.conditions.text)
    # By hand: the first video's end, then the second's.
    keys = sample_keys(jax.random.fold_in(key, 3), one.sample)
    given, conditions = one.given, (one.conditions, one.following)
    for number, chained in enumerate((first, second)):
        own_keys = jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys)
        batch = Batch(conditions[number], one.sample, given=given)
        given = task.rollout.videos(weights, batch, own_keys, np.int32(1))[:, -frames:]
        np.testing.assert_allclose(chained.given, given, atol=2e-4)


@pytest.mark.slow
def test_chains_of_own_videos_have_all_lengths_and_both_roles_learn_from_them(
    pairs: ConfigDict, tmp_path: pathlib.Path
):
    settings = {"continuation_share": 1.0, "own_share": 1.0, "own_most": 3}
    task = continuing(pairs, tmp_path, **settings)
    own = [int(task.batch("generator", step, task.config.phases[0])["data"].own[0]) for step in range(12)]
    assert set(own) == {1, 2, 3}
    # Traced, not run: a compilation of the chain, its decoder and both scores takes a minute.
    params = task.init(jax.random.key(0))
    for role in task.roles:
        batch = task.batch(role, 0, task.config.phases[0])
        loss, gradient, _ = jax.eval_shape(
            lambda *a, role=role: task.gradient(role, *a), params, task.frozen, batch, jax.random.key(1)
        )
        assert loss.shape == ()
        assert jax.tree.map(lambda x: x.shape, gradient) == jax.tree.map(lambda x: x.shape, params[role])


@pytest.mark.slow
def test_trajectories_of_other_levels_are_refused(pairs: ConfigDict, tmp_path: pathlib.Path):
    config = small(shapes_causal_ode_init.get_config(), tmp_path, steps=1)
    config.pairs = pairs.output
    config.student_schedule.shift = 5.0
    with pytest.raises(UserError, match="trained at"):
        OdeRegressionTask(config)


def test_guidance_in_self_forcings_form_is_one_more_here():
    assert dmd_settings({"guidance_scale": 5.0}).real_guidance_scale == 6
    ours = dmd_settings({"guidance_scale": 5.0, "real_guidance_scale": 2.0, "fake_guidance_scale": 1.0})
    assert (ours.real_guidance_scale, ours.fake_guidance_scale) == (6, 1)
    with pytest.raises(TypeError):
        dmd_settings({"guidance": 5.0})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--config.size.num_frames=32"], "size.num_frames is 32; give 4n + 1, such as 33"),
        (["--config.size.height=60"], "size.height is 60; give a multiple of 16, such as 64"),
        (["--config.teacher=/no/such/folder"], "/no/such/folder"),
        (
            ["--config.teacher=assets/shapes_i2v", "--config.student=assets/shapes"],
            "has model_type t2v and the teacher",
        ),
        (["--config.data.prompts=/no/prompts.txt"], "/no/prompts.txt"),
        (["--config.student_schedule.denoising_step_list=500,1000"], "denoising_step_list"),
    ],
)
def test_mistakes_are_named(
    changes: list[str], sentence: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--config=configs/train/shapes_t2v_dmd.py", f"--config.run_dir={tmp_path}", *changes]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\n# a red circle moves left\n"])
def test_a_file_without_a_prompt_is_refused(text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    """Blank lines and comments are skipped, as in every file of prompts: `tests/train/test_data_prompts.py`."""
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    arguments = [f"--config.run_dir={tmp_path / 'run'}", f"--config.data.prompts={file}"]
    assert main(["--config=configs/train/shapes_t2v_dmd.py", *arguments]) == 2
    assert "prompts.txt" in capsys.readouterr().err


def test_a_dry_run_tells_sizes_and_trains_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    arguments = ["--config=configs/train/shapes_t2v_dmd.py", f"--config.run_dir={run_dir}", "--dry_run"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "generator: 1,765,824 trained parameters" in text
    assert '"denoising_step_list"' in text and "GB" in text
    assert not run_dir.exists()


class Damaged(DmdTask):
    """Begins from weights with noise: given a first frame, the teacher does well in one step and leaves no room."""

    def init(self, key: jax.Array) -> Any:
        params = super().init(key)
        leaves, tree = jax.tree.flatten(params["generator"])
        noisy = [
            w + 0.3 * w.std() * jax.random.normal(jax.random.fold_in(key, i), w.shape) for i, w in enumerate(leaves)
        ]
        return params | {"generator": jax.tree.unflatten(tree, noisy)}


@pytest.mark.long
def test_image_to_video_learns_from_first_frames(tmp_path: pathlib.Path):
    config = small(shapes_i2v_dmd.get_config(), tmp_path, steps=20)
    config.evaluation.prompts = 16
    task = Damaged(config)
    batch = task.batch("generator", 0, config.phases[0])["data"]
    assert batch.conditions.image_latents.shape == (8, 9, 8, 8, 20)
    assert batch.conditions.image_features.shape == (8, 17, 64)
    before, after, state = before_and_after(task, config)
    assert after["all"] > before["all"] + 0.25
    assert after["first_frame_psnr"] > before["first_frame_psnr"] + 1
    task.export(state.ema, tmp_path / "student")
    picture = np.full((64, 64, 3), 200, np.uint8)
    frames = Pipeline.from_checkpoint(tmp_path / "student")("a red circle moves left", image=picture, seed=1)
    assert frames.shape == (33, 64, 64, 3)
