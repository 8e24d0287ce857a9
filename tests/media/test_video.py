"""Video files hold their frames and settings, and appear whole or not at all."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from x2v_jax.errors import UserError
from x2v_jax.media.video import (
    contact_sheet,
    encode_video,
    read_frames,
    read_metadata,
    write_files,
    write_gif,
    write_png,
    write_video,
    write_webp,
)


def clip(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A green square that moves over red, with a grey ramp below."""
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = (200, 30, 60)
    for i in range(frames):
        video[i, 8:24, 2 * i : 2 * i + 16] = (20, 190, 40)
    video[:, -16:] = np.linspace(0, 255, width).astype(np.uint8)[None, None, :, None]
    return video


def test_frames_survive_with_their_colours(tmp_path: pathlib.Path):
    write_video(tmp_path / "a.mp4", clip(), 16)
    frames = read_frames(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3) and frames.dtype == np.uint8
    difference = np.abs(frames.astype(int) - clip())
    assert difference.mean() < 4
    assert difference[:, 2:6, 2:62].max() <= 4  # plain areas: no shift of colour between RGB and BT.709
    assert difference[:, -12:-4, ::8].max() <= 6  # black stays black, white white


def test_the_file_is_h264_with_declared_colours_and_rate(tmp_path: pathlib.Path):
    write_video(tmp_path / "a.mp4", clip(), 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 16 and stream.frames == 9
        assert (stream.codec_context.colorspace, stream.codec_context.color_primaries) == (1, 1)  # BT.709


def test_settings_survive_in_the_file_and_beside_it(tmp_path: pathlib.Path):
    settings = {"prompt": 'a "red" circle\nmoves — лево 左 ' + "x" * 10_000, "seed": 3, "list": [1000, 2.5, None]}
    write_video(tmp_path / "new" / "a.mp4", clip(), 16, settings)
    assert read_metadata(tmp_path / "new" / "a.mp4") == settings
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == settings
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.json", "a.mp4"]


def test_the_same_video_gives_the_same_bytes():
    assert encode_video(clip(), 16, {"a": 1}) == encode_video(clip(), 16, {"a": 1})


def test_one_frame_is_a_video_too(tmp_path: pathlib.Path):
    write_video(tmp_path / "a.mp4", clip(1), 16)
    assert read_frames(tmp_path / "a.mp4").shape == (1, 48, 64, 3)


def test_fractional_rates_are_kept(tmp_path: pathlib.Path):
    write_video(tmp_path / "a.mp4", clip(), 23.976)
    with av.open(str(tmp_path / "a.mp4")) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None and abs(float(rate) - 23.976) < 1e-3


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (clip(height=47), 16, "even height and width"),
        (clip().astype(np.float32), 16, "uint8"),
        (clip()[0], 16, r"uint8 \[F, H, W, 3\]"),
        (clip()[:0], 16, "at least 1"),
        (clip(), 0, "fps is 0"),
    ],
)
def test_frames_that_make_no_video_are_refused(tmp_path: pathlib.Path, frames: Any, fps: float, expected: str):
    with pytest.raises(UserError, match=expected):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_videos_are_refused(tmp_path: pathlib.Path):
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.mp4").touch()
    for name in ("a.mp4", "empty.mp4"):
        with pytest.raises(UserError, match="cannot be read as a video"):
            read_frames(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_metadata(tmp_path / "b.mp4")
    write_video(tmp_path / "plain.mp4", clip(), 16)
    with pytest.raises(UserError, match="carries no settings"):
        read_metadata(tmp_path / "plain.mp4")


def test_a_truncated_video_is_refused_or_shorter(tmp_path: pathlib.Path):
    data = encode_video(clip(), 16)
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        read_frames(tmp_path / "a.mp4")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: pathlib.Path):
    # A limit on the size of files gives the same failure of write() as a disk without room.
    code = f"""
import resource
import numpy as np
from x2v_jax.errors import UserError
from x2v_jax.video import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
noise = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
try:
    write_video({str(tmp_path / "a.mp4")!r}, noise, 16, {{"seed": 1}})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a.mp4" in done.stdout and "free some space" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_failing_second_file_keeps_the_first_away(tmp_path: pathlib.Path):
    (tmp_path / "blocked").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_files({tmp_path / "a.txt": b"a", tmp_path / "blocked" / "b.txt": b"b"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocked"]


def test_gifs_and_pngs_for_documents(tmp_path: pathlib.Path):
    write_gif(tmp_path / "a.gif", clip(), 16, scale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (128, 96) and getattr(gif, "n_frames", 1) == 9 and gif.info["duration"] == 60
    sheet = contact_sheet(clip(), count=3)
    assert sheet.shape == (48, 3 * 64 + 2 * 2, 3)
    np.testing.assert_array_equal(sheet[:, -64:], clip()[-1])
    write_png(tmp_path / "a.png", sheet, scale=3)
    with Image.open(tmp_path / "a.png") as png:
        assert png.size == (3 * 196, 144)


def test_a_webp_for_documents_moves_without_loss(tmp_path: pathlib.Path):
    write_webp(tmp_path / "a.webp", clip(), 16, scale=2)
    with Image.open(tmp_path / "a.webp") as webp:
        assert webp.size == (128, 96) and getattr(webp, "n_frames", 1) == 9
        for number, frame in enumerate(clip()):
            webp.seek(number)
            np.testing.assert_array_equal(np.asarray(webp.convert("RGB"))[::2, ::2], frame)


def test_sound_alone_is_said(tmp_path: pathlib.Path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
        sound.rate = 44_100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"a\.mp4 holds no video stream"):
        read_frames(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["imageio:cockatoo.mp4", "https://localhost:1/a.mp4", "<video0>"])
def test_names_that_mean_something_to_imageio_are_files(tmp_path: pathlib.Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_frames(name)


def test_a_small_video_has_the_same_bytes_whatever_memory_held_before():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    discs = [np.hypot(x - 50 + t, y - 30) < 10 for t in range(33)]
    clean = np.stack([np.where(disc[..., None], (230, 25, 25), 15) for disc in discs])
    frames = np.clip(clean + rng.normal(0, 3, clean.shape), 0, 255).astype(np.uint8)
    encoded = set()
    for _ in range(6):
        sizes = (100, 1000, 4000, 8192, 10_000, 20_000, 60_000, 100_000, 300_000)
        litter = [rng.integers(0, 255, size, dtype=np.uint8) for size in sizes for _ in range(100)]
        del litter
        encoded.add(encode_video(frames, 16))
    assert len(encoded) == 1


def test_metadata_that_is_no_unicode_text_comes_back(tmp_path):
    """A command line's bytes that are not UTF-8 reach Python as lone surrogates."""
    metadata = {"prompt": "a \udcff café"}
    write_video(tmp_path / "v.mp4", np.zeros((1, 16, 16, 3), np.uint8), 16, metadata)
    assert read_metadata(tmp_path / "v.mp4") == metadata
    assert json.loads((tmp_path / "v.json").read_text(encoding="utf-8")) == metadata


@pytest.mark.parametrize(
    ("name", "begin"), [("a.gif", b"GIF8"), ("a.WEBP", b"RIFF"), ("a.m4v", b"\0\0\0"), ("a.png", b"\x89PNG")]
)
def test_a_file_is_what_its_name_says(name: str, begin: bytes, tmp_path: pathlib.Path):
    frames = np.zeros((1 if name.endswith("png") else 3, 16, 16, 3), np.uint8)
    write_video(tmp_path / name, frames, 16, {"seed": 1})
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert json.loads((tmp_path / "a.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize("name", ["a.avi", "a", "a.webm", "a.mov", "a.png"])
def test_what_cannot_be_written_is_refused(name: str, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"give a name in \.mp4"):
        write_video(tmp_path / name, np.zeros((2, 16, 16, 3), np.uint8), 16)
    assert not list(tmp_path.iterdir())
