"""`python -m benchmarks.tiny_world.quality` on a small random checkpoint."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from benchmarks.tiny_world import quality
from benchmarks.tiny_world.report import contact_sheet, sheet_rows, table
from benchmarks.tiny_world.sampling import ShapesModel
from train.shapes.judge import Verdict
from train.shapes.world import TEXT_LEN, write_tokenizer
from x2v_jax.checkpoint.native.reader import open_checkpoint, save_native
from x2v_jax.models.config import Schedule, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.functional import flatten, split
from x2v_jax.models.umt5 import Umt5Encoder
from x2v_jax.models.vae import WanVae
from x2v_jax.models.wan import WanModel
from x2v_jax.pipeline import Pipeline
from x2v_jax.request import Request
from x2v_jax.request.resolve import resolve

PROMPTS = ["a red circle moves left", "the blue square slides up", "one green triangle drifts down"]


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder / "tokenizer.json")
    text = Umt5Config(vocab_size=64, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1)
    wan = WanConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1, freq_dim=16, text_dim=8, text_len=TEXT_LEN)
    vae = VaeConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    components = {}
    for name, config, module in (
        ("transformer", wan, WanModel(wan, rngs=nnx.Rngs(1))),
        ("text_encoder", text, Umt5Encoder(text, rngs=nnx.Rngs(2))),
        ("vae", vae, WanVae(vae, rngs=nnx.Rngs(3))),
    ):
        rng = np.random.default_rng(len(components))
        flat = {k: rng.normal(0, 0.2, v.shape).astype(np.float32) for k, v in flatten(split(module)[1]).items()}
        components[name] = (config, flat)
    for variant, steps in (("base", None), ("distill", (1000, 500))):
        save_native(
            folder / variant,
            task="t2v",
            variant=variant,
            schedule=Schedule(
                sampler="unipc" if steps is None else "step_distill",
                num_inference_steps=3,
                denoising_step_list=steps,
                guidance_scale=4.0,
                shift=3.0,
                height=32,
                width=32,
                num_frames=9,
            ),
            components=components,
            tokenizer_file=folder / "tokenizer.json",
        )
    return folder


@pytest.mark.long
@pytest.mark.parametrize("variant", ["base", "distill"])
def test_batches_give_the_videos_that_the_pipeline_gives(checkpoint_path, variant):
    checkpoint = open_checkpoint(checkpoint_path / variant)
    request = resolve(Request(prompt="-", seed=7), checkpoint)
    model = ShapesModel(checkpoint)
    videos = np.concatenate(list(model.generate(PROMPTS, request, batch_size=2)))
    assert videos.shape == (3, 9, 32, 32, 3) and videos.dtype == np.uint8
    assert len({video.tobytes() for video in videos}) == 3
    pipe = Pipeline.from_checkpoint(checkpoint_path / variant, dtype="float32")
    for i in (0, 2):
        alone = pipe(PROMPTS[i], seed=7 + i)
        assert np.abs(alone.astype(int) - videos[i]).max() <= 1


@pytest.mark.slow
def test_the_command_measures_and_writes_a_report_that_repeats(checkpoint_path, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    args = [
        "--checkpoint",
        str(checkpoint_path / "base"),
        "--prompts",
        "5",
        "--batch",
        "3",
        "--quiet",
        "--out",
        str(out),
    ]
    # Real videos are 64 pixels wide with 33 frames; the random model's need not be.
    assert quality.main(args) == 0
    printed = capsys.readouterr().out
    assert "generated" in printed and "reconstructions" in printed and "Fréchet" in printed
    report = json.loads(out.read_text())
    assert set(report["results"]) == {"generated", "reconstructions", "real"}
    assert report["results"]["real"]["all"] == report["reference"]["all"] == 1.0
    assert report["results"]["generated"]["all"] <= 0.2
    assert report["results"]["generated"]["frechet"] > report["results"]["real"]["frechet"]
    assert [v["seed"] for v in report["videos"]] == [0, 1, 2, 3, 4]
    assert report["request"]["num_inference_steps"] == 3 and report["request"]["guidance_scale"] == 4.0
    assert report["versions"]["jax"] and report["date"] and "--prompts 5" in report["command"]
    assert len(report["checkpoint"]["sha256"]) == 3
    assert Image.open(out.with_suffix(".png")).height == 5 * 34
    assert quality.main(args) == 0
    again = json.loads(out.read_text())
    assert again["videos"] == report["videos"] and again["results"] == report["results"]


def test_the_judge_is_measured_without_a_checkpoint(tmp_path, capsys):
    out = tmp_path / "judge.json"
    args = ["--judge-only", "--prompts", "4", "--quiet", "--out", str(out), "--checkpoint", str(tmp_path / "none")]
    assert quality.main(args) == 0
    assert set(json.loads(out.read_text())["results"]) == {"real"}
    assert not out.with_suffix(".png").exists()
    assert "reconstructions are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "0"], "--prompts is 0"),
        (["--batch", "0"], "--batch is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--checkpoint", "no/such/folder"], "no/such/folder"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--out", "."], "--out is '.'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(checkpoint_path, capsys, args, message):
    given = ["--checkpoint", str(checkpoint_path / "base"), "--quiet", *args]
    assert quality.main(given) == 2
    assert message in capsys.readouterr().err


def test_guidance_on_a_distilled_checkpoint_is_refused(checkpoint_path, capsys):
    args = ["--checkpoint", str(checkpoint_path / "distill"), "--guidance", "3", "--quiet"]
    assert quality.main(args) == 2
    assert "guidance_scale is 3" in capsys.readouterr().err


def test_help_needs_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from benchmarks.tiny_world.quality import main\n"
        "assert main(['--seed', '-1']) == 2\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--judge-only" in done.stdout and "--seed is -1" in done.stderr


def test_the_sheet_shows_failures_and_not_only_successes():
    rows = sheet_rows([i % 10 != 3 for i in range(100)], 12)
    assert rows[:6] == [0, 19, 39, 59, 79, 99]
    assert rows[6:] == [3, 13, 23, 33, 43, 53]
    assert sheet_rows([True, False], 24) == [0, 1]


def test_the_sheet_marks_each_row():
    seen = Verdict("red", "circle", "left", True, 0.01, 0.1, 0.01)
    verdicts = [
        seen,
        dataclasses.replace(seen, direction="none"),
        Verdict("none", "none", "none", False, 1.0, np.nan, np.nan),
    ]
    videos = [np.full((5, 64, 64, 3), 128, np.uint8)] * 3
    png = contact_sheet(videos, ["a red circle moves left"] * 3, [("red", "circle", "left")] * 3, verdicts)
    marks = np.asarray(Image.open(io.BytesIO(png)))[:, :18].astype(int)
    green = (marks[..., 1] > marks[..., 0] + 60).any(1).reshape(3, -1).any(1)
    red = (marks[..., 0] > marks[..., 1] + 60).any(1).reshape(3, -1).any(1)
    assert green.tolist() == [True, False, False] and red.tolist() == [False, True, True]


def test_the_table_shows_a_dash_where_nothing_was_measured():
    row = {"colour": 0.5, "shape": 1.0, "direction": 0.0, "all": 0.0, "all_low": 0.0, "all_high": 0.1}
    text = table({"generated": row | {"jerk": float("nan"), "size_variation": 0.01, "frechet": 2.0}})
    assert "50.0%" in text and "–" in text.splitlines()[1].split("10.0%")[1] and "nan" not in text
