"""Videos and pictures as latents: which frames are taken, how they are cut, and what the networks make of them."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from tiny_models import VAE, write_checkpoint

from train.data.check import check
from train.data.clips import cover, crop_to_aspect, read_clip
from train.data.images import ImageCache
from train.data.items import read_items
from train.data.latents import LatentCache, latent_size_of, make_vae_runner
from train.data.prompts import read_prompts
from train.prepare.__main__ import main
from x2v_jax import Pipeline
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.media.video import write_video

SIZE = {"height": 16, "width": 24}


def grey_video(path: pathlib.Path, count: int, fps: float, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Frame i is grey of level 10 i, which survives the codec to within a few levels."""
    frames = np.stack([np.full((*size, 3), 10 * i, np.uint8) for i in range(count)])
    write_video(path, frames, fps)
    return frames


def levels(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in clip]


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (16, 16, [0, 1, 2, 3, 4]),
        (16, 8, [0, 2, 4, 6, 8]),
        (24, 16, [0, 1, 3, 4, 6]),
        (8, 16, [0, 0, 1, 1, 2]),
        (29.97, 16, [0, 1, 3, 5, 7]),
    ],
)
def test_a_frame_is_what_a_player_shows_then(
    tmp_path: pathlib.Path, source_fps: float, fps: float, expected: list[int]
):
    grey_video(tmp_path / "v.mp4", 12, source_fps)
    assert levels(read_clip(tmp_path / "v.mp4", **SIZE, num_frames=5, fps=fps)) == expected


def test_a_video_that_just_suffices_is_taken_and_a_shorter_one_named(tmp_path: pathlib.Path):
    grey_video(tmp_path / "v.mp4", 6, 24)
    assert levels(read_clip(tmp_path / "v.mp4", **SIZE, num_frames=4, fps=16)) == [0, 1, 3, 4]
    with pytest.raises(UserError, match=r"v.mp4 lasts 0.25 seconds, 4 frames at 16 a second, and 5 are needed"):
        read_clip(tmp_path / "v.mp4", **SIZE, num_frames=5, fps=16)


def test_a_file_that_is_no_video_is_named(tmp_path: pathlib.Path):
    (tmp_path / "v.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a video"):
        read_clip(tmp_path / "v.mp4", **SIZE, num_frames=1, fps=16)


def test_a_video_on_its_side_is_set_upright(tmp_path: pathlib.Path):
    frames = np.zeros((3, 16, 24, 3), np.uint8)
    frames[:, :, 12:] = 200
    write_video(tmp_path / "flat.mp4", frames, 16)
    _set_rotation(tmp_path / "flat.mp4", tmp_path / "turned.mp4")
    clip = read_clip(tmp_path / "turned.mp4", height=24, width=16, num_frames=3, fps=16)
    assert clip[0, :8].mean() > 150 > 50 > clip[0, 16:].mean()


def _set_rotation(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Copies an mp4 whose track header asks for a quarter turn (ISO/IEC 14496-12, 8.3.2)."""
    data = bytearray(source.read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + 4 + 20 + 8 + 8
    one, minus = (1 << 16).to_bytes(4), ((1 << 32) - (1 << 16)).to_bytes(4)
    zero, unit = bytes(4), (1 << 30).to_bytes(4)
    # (x, y) -> (y, -x): a quarter turn counterclockwise on a screen whose y points down.
    data[matrix : matrix + 36] = b"".join([zero, minus, zero, one, zero, zero, zero, zero, unit])
    destination.write_bytes(data)


def test_cover_keeps_the_aspect_ratio_and_the_middle():
    y, x = np.mgrid[0:40, 0:100]
    image = np.stack([y * 6, x * 2, 0 * x], axis=-1).astype(np.uint8)
    covered = cover(image, 20, 20)
    assert covered.shape == (20, 20, 3)
    assert abs(int(covered[..., 1].min()) - 60) < 4 and abs(int(covered[..., 1].max()) - 138) < 4
    assert covered[0, :, 0].max() < 12 and covered[-1, :, 0].min() > 220
    np.testing.assert_array_equal(cover(image, 40, 100), image)
    assert cover(image[:3, :5], 16, 8).shape == (16, 8, 3)


@pytest.mark.parametrize(
    ("shape", "size", "expected"), [((90, 90), (48, 83), (52, 90)), ((50, 200), (10, 10), (50, 50))]
)
def test_crop_to_aspect(shape, size, expected):
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2, shape[1] // 2] = 1
    cropped = crop_to_aspect(image, *size)
    assert cropped.shape == (*expected, 3) and cropped[expected[0] // 2, expected[1] // 2].any()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", image=True)


def test_videos_become_the_latents_of_their_frames(tmp_path: pathlib.Path, model: pathlib.Path, capsys):
    folder = tmp_path / "videos"
    for name, count in (("b", 12), ("a", 9), ("short", 2)):
        grey_video(folder / f"{name}.mp4", count, 16)
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")
    command = ["videos", str(folder), str(tmp_path / "out"), "--checkpoint", str(model), "--dtype", "float32"]
    command += ["--height", "16", "--width", "24", "--num-frames", "5"]
    assert main(command) == 2
    assert "short.mp4 lasts" in capsys.readouterr().err
    command[2] = str(tmp_path / "kept")
    assert main([*command, "--skip-bad"]) == 0
    cache = LatentCache.open(tmp_path / "kept", (2, 2, 3, 16))
    assert cache.captions == ["caption of a", "caption of b"] and len(cache) == 2
    checkpoint = open_checkpoint(model)
    cache.require(checkpoint)
    clip = read_clip(folder / "a.mp4", **SIZE, num_frames=5, fps=16)
    encoded = make_vae_runner(checkpoint).encode(clip[None].astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(cache.latents([0]), np.asarray(encoded), rtol=1e-4, atol=1e-5)
    assert not check(tmp_path / "kept").problems
    assert read_prompts(tmp_path / "kept")[0] == cache.captions


def test_pictures_become_what_the_pipeline_conditions_on(tmp_path: pathlib.Path, model: pathlib.Path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    entries = []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": f"picture {i}"})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    command = ["images", str(tmp_path / "list.jsonl"), str(tmp_path / "out"), "--checkpoint", str(model)]
    assert main([*command, "--dtype", "float32", "--compute", "float32", "--num-frames", "5"]) == 0
    cache = ImageCache.open(tmp_path / "out", (2, 4, 6, 16))
    checkpoint = open_checkpoint(model)
    cache.require(checkpoint)
    pipe = Pipeline(checkpoint, dtype="float32")
    features, condition = pipe._components.images(pictures[1], (5, 32, 48), Clock())
    np.testing.assert_allclose(cache.conditions([1]), np.asarray(condition), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.features([1]), np.asarray(features), rtol=1e-4, atol=1e-5)
    assert cache.conditions([0, 1]).shape == (2, 2, 4, 6, 20) and cache.captions == ["picture 0", "picture 1"]
    assert not check(tmp_path / "out").problems


def test_image_conditions_need_an_image_encoder(tmp_path: pathlib.Path, capsys):
    text_only = write_checkpoint(tmp_path / "t2v")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert main(["images", str(tmp_path), str(tmp_path / "out"), "--checkpoint", str(text_only)]) == 2
    assert "has no image encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 16, "width": 24, "num_frames": 6}, "num_frames is 6; this VAE takes 4n . 1: give 5"),
        ({"height": 20, "width": 24, "num_frames": 5}, "height is 20; this VAE takes multiples of 8: give 16"),
        ({"height": 16, "width": 4, "num_frames": 5}, "width is 4; this VAE takes multiples of 8: give 8"),
    ],
)
def test_sizes_that_the_vae_does_not_take_are_refused(size: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        latent_size_of(VAE, **size)


def test_lists_of_files_with_captions(tmp_path: pathlib.Path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    forms = {
        "object.json": '{"b.mp4": "second", "a.mp4": " first "}',
        "list.json": '[["b.mp4", "second"], {"video": "a.mp4", "caption": "first"}]',
        "lines.jsonl": '{"file": "b.mp4", "text": "second"}\n\n["a.mp4", "first"]\n',
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        items = read_items(tmp_path / name, "video")
        assert [(i.path, i.name, i.caption) for i in items] == [
            (tmp_path / "b.mp4", "b.mp4", "second"),
            (tmp_path / "a.mp4", "a.mp4", "first"),
        ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", '["a.mp4", "x"]\n{oops', "line 2: is not JSON"),
        ("l.jsonl", '["a.mp4", "x"]\n["gone.mp4", "y"]', "line 2: .*gone.mp4.* does not exist"),
        ("l.jsonl", '["a.mp4", " "]', "line 1: the caption is empty"),
        ("l.jsonl", '["a.mp4"]', "line 1: write"),
        ("l.json", '[{"video": "a.mp4"}]', "entry 1: write"),
        ("l.json", "3", "neither a JSON object"),
        ("l.json", "{}", "holds no videos"),
        ("l.txt", "a.mp4", r"is no .json or .jsonl list"),
        ("a.txt", "", "a.txt: the caption is empty"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(tmp_path: pathlib.Path, name: str, text: str, message: str):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_items(tmp_path if name == "a.txt" else tmp_path / name, "video")


def test_a_video_without_caption_is_named(tmp_path: pathlib.Path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"a.mp4 has no caption; write it to a.txt"):
        read_items(tmp_path, "video")
    with pytest.raises(UserError, match="does not exist"):
        read_items(tmp_path / "none", "video")
