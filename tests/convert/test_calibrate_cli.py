"""`python -m convert calibrate` and `wan --smooth` from the outside, with every kind of checkpoint."""

import json
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tiny_models
from PIL import Image

from convert.__main__ import main
from convert.calibrate import Maxima
from x2v_jax import Pipeline
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.quantize.calibration import read_calibration
from x2v_jax.models import wan_blocks

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = ROOT / "assets/shapes_t2v_4step"
CAUSAL = ROOT / "assets/shapes_causal"


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moves left\n\na blue square moves right\n")
    return str(path)


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, grey in (("a.png", 60), ("b.png", 200)):
        Image.new("RGB", (48, 32), (grey, 0, grey)).save(folder / name)
    (folder / "notes.txt").write_text("b.png\na.png\n")
    return folder


def calibrate(checkpoint, destination, *options) -> int:
    return main(["calibrate", str(checkpoint), str(destination), *map(str, options)])


@pytest.mark.long
def test_from_prompts_to_a_smoothed_checkpoint_and_its_video(tmp_path, prompts, capsys):
    """The trained model: a video in smoothed int8 stays as close to bfloat16 as one in plain int8 has to."""
    path = tmp_path / "c.safetensors"
    assert calibrate(SHAPES, path, "--prompts", prompts, "--num-frames", 9, "--seed", 3) == 0
    out = capsys.readouterr().out
    assert f"wrote {path}" in out and "self_attn.q: " in out
    found = read_calibration(path)
    assert found.about["prompts"] == "2" and found.about["variant"] == "distill" and found.about["seed"] == "3"
    assert found.about["size"] == "9 frames of 64 x 64"
    assert all((largest > 0).all() for largest in found.maxima.values())
    assert main(["wan", str(SHAPES), str(tmp_path / "out"), "--quantize", "int8", "--smooth", str(path)]) == 0
    assert "smoothed with alpha 0.5" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "int8, smoothed with alpha 0.5" in capsys.readouterr().out
    exact, smooth = (
        Pipeline.from_checkpoint(p)("a red circle moves right", seed=3, num_frames=9).astype(np.float32)
        for p in (SHAPES, tmp_path / "out")
    )
    psnr = 10 * np.log10(255**2 / np.mean((exact - smooth) ** 2))
    assert 40 < psnr < 70, f"{psnr:.1f} dB"


def _heard(checkpoint, path, prompts, *options) -> tuple[dict[str, np.ndarray], int]:
    """The recording, and how often the network's blocks spoke."""
    hear, count = Maxima.hear, 0

    def counted(self, name, layer, largest):
        nonlocal count
        count += name == "self_attn.o"
        hear(self, name, layer, largest)

    with mock.patch.object(Maxima, "hear", counted):
        assert calibrate(checkpoint, path, "--prompts", prompts, "--dtype", "float32", *options) == 0
    return dict(read_calibration(path).maxima), count


@pytest.mark.long
@pytest.mark.parametrize(("image", "evaluations"), [(False, 3), (True, 3)], ids=["t2v", "i2v"])
def test_guided_base_models_are_recorded(tmp_path, prompts, pictures, image, evaluations):
    """3 steps of UniPC, the two passes of guidance in one batch; 2 layers."""
    source = tiny_models.write_checkpoint(tmp_path / "source", image=image)
    options = ("--images", pictures) if image else ()
    maxima, count = _heard(source, tmp_path / "c.safetensors", prompts, *options)
    assert count == 2 * evaluations * 2
    assert all(np.isfinite(x).all() and (x >= 0).all() and x.any() for x in maxima.values())
    one, _ = _heard(source, tmp_path / "one.safetensors", prompts, *options, "--limit", 1)
    assert all((one[name] <= maxima[name]).all() for name in one)
    assert any((one[name] < maxima[name]).any() for name in one)


@pytest.mark.long
def test_videos_made_block_by_block_are_recorded(tmp_path, prompts):
    source = tiny_models.write_checkpoint(tmp_path / "source", schedule=tiny_models.CAUSAL)
    maxima, count = _heard(source, tmp_path / "c.safetensors", prompts, "--limit", 1, "--num-frames", 21)
    # Two blocks of two steps, and the first is shown again to the second; 2 layers.
    assert count == (2 * 2 + 1) * 2 and all(x.any() for x in maxima.values())
    convert(source, tmp_path / "out", ConversionOptions(quantize="int8", smooth=str(tmp_path / "c.safetensors")))
    frames = Pipeline.from_checkpoint(tmp_path / "out")("a red circle moves left", seed=1, num_frames=21)
    assert frames.shape == (21, 32, 48, 3)


@pytest.mark.long
def test_offloaded_blocks_say_the_same_and_smoothed_ones_run(tmp_path, prompts):
    source = tiny_models.write_checkpoint(tmp_path / "source", schedule=tiny_models.DISTILLED)
    here, _ = _heard(source, tmp_path / "a.safetensors", prompts, "--limit", 1)
    there, _ = _heard(source, tmp_path / "b.safetensors", prompts, "--limit", 1, "--offload", "blocks")
    for name, largest in here.items():
        assert np.allclose(largest, there[name], rtol=1e-5), name
    convert(source, tmp_path / "out", ConversionOptions(quantize="fp8", smooth=str(tmp_path / "a.safetensors")))
    videos = [Pipeline.from_checkpoint(tmp_path / "out", offload=o)("a red circle", seed=1) for o in ("none", "blocks")]
    assert np.abs(videos[0].astype(int) - videos[1]).max() <= 2


def test_images_are_a_picture_a_folder_or_a_list(tmp_path, prompts, pictures):
    source = tiny_models.write_checkpoint(tmp_path / "source", image=True)
    seen = []
    with mock.patch("convert.calibrate.record", side_effect=lambda c, requests, *rest: seen.append(requests) or {}):
        for path in (pictures / "b.png", pictures, pictures / "notes.txt"):
            calibrate(source, tmp_path / f"{path.stem}.safetensors", "--prompts", prompts, "--images", path)
    names = [[pathlib.Path(request.completed.image).name for request in requests] for requests in seen]
    assert names == [["b.png", "b.png"], ["a.png", "b.png"], ["b.png", "a.png"]]
    assert [request.completed.seed for request in seen[0]] == [0, 1]
    assert seen[0][0].completed.prompt == "a red circle moves left"


def test_the_places_are_those_that_the_blocks_name():
    from x2v_jax.checkpoint.names.smoothing import GROUPS

    text = pathlib.Path(wan_blocks.__file__).read_text()
    assert all(f'observe("{name}", ' in text for name in GROUPS) and text.count("observe(") == len(GROUPS)


@pytest.mark.slow
def test_every_mistake_is_one_sentence_before_the_work(tmp_path, prompts, pictures, capsys):
    source, moving = tiny_models.write_checkpoint(tmp_path / "t2v"), tmp_path / "i2v"
    tiny_models.write_checkpoint(moving, image=True)
    convert(source, tmp_path / "int8", ConversionOptions(quantize="int8"))
    out = tmp_path / "c.safetensors"
    there = tmp_path / "there.safetensors"
    there.touch()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "none").mkdir()
    p = ("--prompts", prompts)
    for args, message in (
        ((source, out), "required: --prompts"),
        ((source, out, "--prompts", empty), "has no prompt in it; write one a line"),
        ((source, out, "--prompts", tmp_path / "no.txt"), "--prompts"),
        ((source, out, "--prompts", tmp_path / "bytes.txt"), "is not UTF-8 text"),
        ((source, there, *p), "exists; give another name"),
        ((source, tmp_path / "c.txt", *p), "give a file that ends in .safetensors"),
        ((tmp_path / "int8", out, *p), "is int8 already, and activations are recorded before"),
        ((tmp_path / "no", out, *p), "does not exist"),
        ((source, out, *p, "--images", pictures), "makes videos of text alone; leave --images out"),
        ((moving, out, *p), "--images: "),
        ((moving, out, *p, "--images", tmp_path / "none"), "there is no picture in this folder"),
        ((moving, out, *p, "--images", empty), "write one a line"),
        ((moving, out, *p, "--images", pictures / "no.png"), "does not exist"),
        ((moving, out, *p, "--images", prompts), "does not exist"),
        ((source, out, *p, "--limit", 0), "is no whole number above 0"),
        ((source, out, *p, "--height", 33), "height is 33"),
        ((source, out, *p, "--num-frames", 6), "num_frames is 6"),
        ((source, out, *p, "--seed", -1), "seed is -1"),
        ((source, out, *p, "--dtype", "int8"), "invalid choice"),
    ):
        with mock.patch("convert.calibrate.record", side_effect=AssertionError):
            assert calibrate(*args) == 2, args
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err, captured.err
        assert "\n" not in captured.err[:-1] and not out.exists()
    assert main(["wan", str(source), str(tmp_path / "x"), "--quantize", "int8", "--smooth-alpha", "2"]) == 2
    assert "'2' is no number from 0 to 1" in capsys.readouterr().err


def test_mistakes_do_not_wait_for_jax(tmp_path, prompts):
    script = (
        "import sys; from convert.__main__ import main; "
        f"assert main(['calibrate', {str(SHAPES)!r}, {str(tmp_path / 'c.safetensors')!r}, '--prompts', {prompts!r}, "
        "'--height', '33']) == 2; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_a_recording_that_is_not_whole_is_an_error():
    maxima = Maxima(layers=2, dim=3)
    with pytest.raises(RuntimeError, match="did not run as a whole"):
        maxima.result()
    for name in list(maxima._largest):
        maxima.hear(name, 0, np.ones(3, np.float32))
    with pytest.raises(RuntimeError, match="did not run as a whole"):
        maxima.result()
    for name in list(maxima._largest):
        maxima.hear(name, 1, np.asarray([1, np.nan, 2], np.float32))
    found = maxima.result()["ffn.linear_1"]
    assert found[0].tolist() == [1, 1, 1] and np.isnan(found[1, 1]) and found[1, 2] == 2


@pytest.mark.slow
def test_the_causal_model_that_is_shipped_can_be_calibrated(tmp_path, prompts):
    maxima, _ = _heard(CAUSAL, tmp_path / "c.safetensors", prompts, "--limit", 1, "--num-frames", 9)
    assert maxima["self_attn.q"].shape == (6, open_checkpoint(CAUSAL).config("transformer").dim)
    assert json.loads(read_calibration(tmp_path / "c.safetensors").about["config"])["num_layers"] == 6
