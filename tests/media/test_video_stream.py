"""A growing mp4 is playable at every moment, whatever ends it."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import tracemalloc
from typing import Any

import av
import numpy as np
import pytest

from x2v_jax.errors import UserError
from x2v_jax.media import growing_mp4
from x2v_jax.media.growing_mp4 import VideoStream
from x2v_jax.media.video import encode_video, read_frames, read_metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER_BOXES = ["ftyp", "moov"]


def clip(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A green square that moves over red, with a grey ramp below."""
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = (200, 30, 60)
    for i in range(frames):
        video[i, 8:24, i % 40 : i % 40 + 16] = (20, 190, 40)
    video[:, -16:] = np.linspace(0, 255, width).astype(np.uint8)[None, None, :, None]
    return video


def blocks(*lengths: int, **size: int) -> list[np.ndarray]:
    ends = np.cumsum(lengths)
    return np.split(clip(int(ends[-1]), **size), ends[:-1])


def written(path: pathlib.Path, pieces: list[np.ndarray], fps: float = 16, **settings: Any) -> bytes:
    with VideoStream(path, fps, **settings) as stream:
        for piece in pieces:
            stream.append(piece)
    return path.read_bytes()


def boxes(data: bytes) -> list[tuple[str, int, int]]:
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        found.append((data[at + 4 : at + 8].decode(), at, at + size))
        at += size
    return found


@pytest.mark.slow
def test_every_block_can_be_read_when_append_returns(tmp_path: pathlib.Path):
    pieces = blocks(9, 12, 12)
    stream = VideoStream(tmp_path / "new" / "a.mp4", 16)
    assert not (tmp_path / "new").exists()
    for count, piece in enumerate(pieces, 1):
        stream.append(piece)
        frames, given = read_frames(stream.path), np.concatenate(pieces[:count])
        assert frames.shape == given.shape and stream.num_frames == len(given)
        difference = np.abs(frames.astype(int) - given)
        assert difference.mean() < 4 and difference[:, 2:6, 2:62].max() <= 4
    stream.close()
    assert [p.name for p in stream.path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("fps", [16, 24, 23.976])
@pytest.mark.parametrize("lengths", [(9, 12, 12), (1, 12, 12), (12, 1, 2, 3), (1, 1, 1), (5,)])
def test_frames_follow_each_other_evenly(tmp_path: pathlib.Path, fps: float, lengths: tuple[int, ...]):
    written(tmp_path / "a.mp4", blocks(*lengths), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        assert rate is not None and float(rate) == pytest.approx(fps, rel=1e-4)
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]  # type: ignore[operator]
        np.testing.assert_allclose(np.diff(times), 1 / fps, rtol=1e-3)
        assert len(times) == sum(lengths)
        assert container.duration == pytest.approx(sum(lengths) / fps * 1e6, rel=0.01)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [packet.dts for packet in container.demux(video=0) if packet.dts is not None]
        assert (np.diff(decoded) > 0).all()


def test_colours_and_quality_are_those_of_whole_videos(tmp_path: pathlib.Path):
    (piece,) = blocks(9)
    written(tmp_path / "a.mp4", [piece])
    (tmp_path / "b.mp4").write_bytes(encode_video(piece, 16))
    np.testing.assert_array_equal(read_frames(tmp_path / "a.mp4"), read_frames(tmp_path / "b.mp4"))
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_primaries) == ("h264", "yuv420p", 1, 1)


def test_the_same_blocks_give_the_same_bytes(tmp_path: pathlib.Path):
    pieces = blocks(9, 12)
    first = written(tmp_path / "a.mp4", pieces, metadata={"seed": 1})
    assert first == written(tmp_path / "b.mp4", pieces, metadata={"seed": 1})


def test_settings_are_in_the_header_and_in_the_end_beside_it(tmp_path: pathlib.Path):
    settings = {"prompt": 'a "red" circle лево ' + "x" * 5000, "seed": 3}
    (tmp_path / "a.json").write_text("of an older video")
    stream = VideoStream(tmp_path / "a.mp4", 16, settings)
    stream.append(clip(9))
    assert read_metadata(tmp_path / "a.mp4") == settings
    assert not (tmp_path / "a.json").exists()
    stream.close(settings | {"size": {"frames": stream.num_frames}})
    assert '"frames": 9' in (tmp_path / "a.json").read_text()
    stream.close({"never": "written"})
    assert "never" not in (tmp_path / "a.json").read_text()


def test_the_layout_is_a_header_and_two_boxes_a_block(tmp_path: pathlib.Path):
    data = written(tmp_path / "a.mp4", blocks(9, 12, 12))
    assert [name for name, _, _ in boxes(data)] == HEADER_BOXES + ["moof", "mdat"] * 3
    numbers = [int.from_bytes(data[begin + 20 : begin + 24]) for name, begin, _ in boxes(data) if name == "moof"]
    assert numbers == [1, 2, 3]


def test_each_block_can_be_shown_without_those_before(tmp_path: pathlib.Path):
    data = written(tmp_path / "a.mp4", blocks(9, 12, 12))
    spans = boxes(data)
    (tmp_path / "b.mp4").write_bytes(data[: spans[1][2]] + data[spans[4][1] :])
    np.testing.assert_array_equal(read_frames(tmp_path / "b.mp4"), read_frames(tmp_path / "a.mp4")[9:])


def test_a_write_that_is_cut_short_at_any_byte_costs_only_its_own_block(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """As a kill or a power cut leaves it, and as a player sees it in the middle of a write."""
    pieces = blocks(3, 4, 2)
    whole = written(tmp_path / "a.mp4", pieces)
    last = [begin for name, begin, _ in boxes(whole) if name == "moof"][-1]
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append((at, len(data))) or len(data))
    stream = VideoStream(tmp_path / "b.mp4", 16)
    for piece in pieces[:2]:
        stream.append(piece)
    monkeypatch.undo()
    # The block, marked as one to be skipped, and when all of it is there the mark.
    assert [size for _, size in calls][-1] == 4 and calls[-1][0] == calls[-2][0] + 4
    torn = tmp_path / "torn.mp4"
    unmarked = whole[: last + 4] + b"free" + whole[last + 8 :]
    step = (len(whole) - last) // 16
    for length in [*range(last, last + 12, 3), *range(last + 12, len(whole), step), len(whole)]:
        torn.write_bytes(unmarked[:length])
        assert len(read_frames(torn)) == 7, length


def test_frames_of_another_size_are_refused_and_the_rest_goes_on(tmp_path: pathlib.Path):
    with VideoStream(tmp_path / "a.mp4", 16) as stream:
        stream.append(clip(3))
        with pytest.raises(UserError, match=r"frames are \(32, 64\) in a video of \(48, 64\)"):
            stream.append(clip(3, height=32))
        with pytest.raises(UserError, match="uint8"):
            stream.append(clip(3).astype(np.float32))
        stream.append(clip(3))
    assert len(read_frames(tmp_path / "a.mp4")) == 6


def test_without_a_first_block_there_is_no_file(tmp_path: pathlib.Path):
    (tmp_path / "a.mp4").write_text("an older video")
    stream = VideoStream(tmp_path / "a.mp4", 16)
    with pytest.raises(UserError, match="even height"):
        stream.append(clip(3, height=47))
    stream.close({"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "an older video"


def test_an_error_in_between_leaves_the_blocks_before(tmp_path: pathlib.Path):
    with pytest.raises(RuntimeError), VideoStream(tmp_path / "a.mp4", 16) as stream:
        stream.append(clip(9))
        raise RuntimeError
    assert len(read_frames(tmp_path / "a.mp4")) == 9


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1, 7, 500])
def test_a_full_disk_is_said_and_what_exists_stays_playable(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, room: int
):
    stream = VideoStream(tmp_path / "a.mp4", 16)
    stream.append(clip(9))
    size, write = stream.path.stat().st_size, os.pwrite

    def full(descriptor: int, data: Any, position: int) -> int:
        fits = size + room - position
        if fits <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data[:fits]), position)

    monkeypatch.setattr(growing_mp4.os, "pwrite", full)
    with pytest.raises(UserError) as caught:
        stream.append(clip(12))
    assert "No space left" in str(caught.value) and "free some space" in str(caught.value)
    assert "Its first 9 frames are kept and playable" in str(caught.value)
    monkeypatch.undo()
    assert stream.path.stat().st_size == size and len(read_frames(stream.path)) == 9
    stream.append(clip(12))  # when there is room again
    stream.close()
    assert len(read_frames(stream.path)) == 21


def test_a_limit_of_the_system_is_met_in_the_same_way(tmp_path: pathlib.Path):
    # A limit on the size of files gives the same failure of write() as a disk without room.
    code = f"""
import resource
import numpy as np
from x2v_jax.errors import UserError
from x2v_jax.media.growing_mp4 import VideoStream
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
stream = VideoStream({str(tmp_path / "a.mp4")!r}, 16)
try:
    for _ in range(20):
        stream.append(noise)
except UserError as error:
    print(stream.num_frames, error)
stream.close({{"seed": 1}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    frames = int(done.stdout.split()[0])
    assert 0 < frames < 60 and f"{frames} frames are kept" in done.stdout
    assert len(read_frames(tmp_path / "a.mp4")) == frames and (tmp_path / "a.json").exists()


@pytest.mark.slow
def test_a_killed_program_leaves_every_block_that_it_had_appended(tmp_path: pathlib.Path):
    code = f"""
import numpy as np
from x2v_jax.media.growing_mp4 import VideoStream
noise = np.random.default_rng(0).integers(0, 255, (4, 256, 256, 3), np.uint8)
stream = VideoStream({str(tmp_path / "a.mp4")!r}, 16, {{"seed": 1}})
while True:
    stream.append(noise)
    print(stream.num_frames, flush=True)
"""
    for kill_after in (1, 2, 5):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(kill_after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)
        said = max([4 * kill_after, *map(int, rest.split())])
        frames = len(read_frames(tmp_path / "a.mp4"))
        assert said <= frames <= said + 4 and frames % 4 == 0
        assert read_metadata(tmp_path / "a.mp4") == {"seed": 1}


def test_memory_does_not_grow_with_the_video(tmp_path: pathlib.Path):
    (piece,) = blocks(4)
    with VideoStream(tmp_path / "a.mp4", 16) as stream:
        for _ in range(5):
            stream.append(piece)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            stream.append(piece)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 10_000


def test_long_videos_keep_time(tmp_path: pathlib.Path):
    """Past 2^32 ticks of the clock, where a 32-bit count would begin again: a day and a half at 16 frames a second."""
    stream = VideoStream(tmp_path / "a.mp4", 16)
    stream.append(clip(3))
    stream.num_frames = 5_000_000
    stream.append(clip(3))
    stream.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times[3] is not None and times[0] is not None
    assert times[3] - times[0] == pytest.approx(5_000_000 / 16)
