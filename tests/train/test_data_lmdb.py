"""LMDB data sets as CausVid and Self-Forcing write them: read by row, imported, checked."""

import json
import pathlib
import re
import sys

import lmdb
import numpy as np
import pytest
from PIL import Image

from train.data.check import check
from train.data.items import read_items
from train.data.latents import LatentCache
from train.data.lmdb_file import LmdbData, open_latents
from train.data.trajectories import TrajectoryCache
from train.prepare.__main__ import main
from x2v_jax.errors import UserError

ROW = (2, 16, 3, 4)  # frames, channels, height, width, as they store it


def write(path: pathlib.Path, rows: np.ndarray, *, prefix: str = "", **extra: bytes) -> pathlib.Path:
    """The keys of Self-Forcing's utils/lmdb.py. extra: keys to replace or, with b"", to leave out."""
    path.mkdir(parents=True)
    values = {"latents_shape": " ".join(map(str, rows.shape)).encode(), "prompts_shape": str(len(rows)).encode()}
    for i, row in enumerate(rows):
        values[f"latents_{i}_data"] = row.astype("<f2").tobytes()
        values[f"prompts_{i}_data"] = f"{prefix}prompt {i} · Kreis".encode()
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in (values | extra).items():
            if value:
                transaction.put(key.encode(), value)
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def last(rows: np.ndarray) -> np.ndarray:
    return np.moveaxis(rows, -3, -1).astype(np.float32)


def test_latents_are_read_channels_last(tmp_path: pathlib.Path):
    rows = numbers(3, *ROW)
    data = LmdbData(write(tmp_path / "set", rows))
    assert len(data) == 3 and data.latent_size == (2, 3, 4, 16) and data.num_states == 1 and not data.has_images
    np.testing.assert_array_equal(data.latents([2, 0]), last(rows[[2, 0]]))
    assert data.captions == [f"prompt {i} · Kreis" for i in range(3)]
    with pytest.raises(IndexError, match="3 rows"):
        data.latents([3])
    assert len(LmdbData(tmp_path / "set")) == 3, "it can be opened twice"
    assert not check(tmp_path / "set").problems


def test_trajectories_end_in_the_clean_latents(tmp_path: pathlib.Path):
    rows = numbers(2, 4, *ROW)
    data = LmdbData(write(tmp_path / "set", rows))
    assert data.num_states == 4
    np.testing.assert_array_equal(data.states([1]), last(rows[[1]]))
    np.testing.assert_array_equal(data.latents([0, 1]), last(rows[:, -1]))


def test_sharded_folders_are_one_data_set(tmp_path: pathlib.Path):
    parts = {number: numbers(count, *ROW, seed=number) for number, count in ((0, 2), (2, 1), (10, 3))}
    for number, rows in parts.items():
        write(tmp_path / f"shard_{number}", rows, prefix=f"{number} ", prompts_shape=b"3 2 16 3 4")
    data = open_latents(tmp_path, (2, 3, 4, 16))
    assert isinstance(data, LmdbData) and len(data) == 6
    np.testing.assert_array_equal(data.latents(range(6)), last(np.concatenate(list(parts.values()))))
    assert data.captions[2] == "2 prompt 0 · Kreis" and data.captions[5] == "10 prompt 2 · Kreis"
    with pytest.raises(UserError, match="needs 2 x 9 x 9 x 16"):
        open_latents(tmp_path, (2, 9, 9, 16))
    write(tmp_path / "shard_11", numbers(1, 4, *ROW))
    with pytest.raises(UserError, match="parts hold rows of different shapes"):
        LmdbData(tmp_path)


def test_latents_are_imported(tmp_path: pathlib.Path, capsys):
    rows = numbers(3, *ROW)
    source = write(tmp_path / "set", rows)
    assert main(["lmdb", str(source), str(tmp_path / "out")]) == 0
    cache = open_latents(tmp_path / "out")
    assert isinstance(cache, LatentCache) and cache.captions[1] == "prompt 1 · Kreis"
    np.testing.assert_array_equal(cache.latents(range(3)), last(rows))
    assert main(["lmdb", str(source), str(tmp_path / "new"), "--timesteps", "1000,0"]) == 2
    assert "have no timesteps" in capsys.readouterr().err


def test_trajectories_are_imported_with_their_timesteps(tmp_path: pathlib.Path, capsys):
    rows = numbers(3, 4, *ROW)
    command = ["lmdb", str(write(tmp_path / "set", rows)), str(tmp_path / "out")]
    assert main(command) == 2
    assert "trajectories of 4 states; say at which timesteps" in capsys.readouterr().err
    assert main([*command, "--timesteps", "1000,0"]) == 2
    assert "2 are given" in capsys.readouterr().err
    assert main([*command, "--timesteps", "1000,757,522,0"]) == 0
    cache = TrajectoryCache.open(tmp_path / "out", (2, 3, 4, 16), (1, 0.757, 0.522, 0))
    np.testing.assert_array_equal(cache.states([2, 1]), last(rows[[2, 1]]))
    assert cache.prompts[0] == "prompt 0 · Kreis" and not check(tmp_path / "out").problems


def test_first_frames_are_written_as_pictures(tmp_path: pathlib.Path, capsys):
    pictures = np.random.default_rng(1).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    images = {f"img_{i}_data": picture.tobytes() for i, picture in enumerate(pictures)}
    source = write(tmp_path / "set", numbers(2, *ROW), img_shape=b"2 6 5 3", **images)
    command = ["lmdb", str(source), str(tmp_path / "out"), "--images", str(tmp_path / "pictures")]
    assert main(command) == 0 and main(command) == 0
    items = read_items(tmp_path / "pictures" / "captions.jsonl", "image")
    assert [item.caption for item in items] == ["prompt 0 · Kreis", "prompt 1 · Kreis"]
    np.testing.assert_array_equal(np.asarray(Image.open(items[1].path)), pictures[1])
    assert json.loads((tmp_path / "pictures" / "captions.jsonl").read_text().splitlines()[0])["image"] == "000000.png"
    plain = write(tmp_path / "plain", numbers(1, *ROW))
    assert main(["lmdb", str(plain), str(tmp_path / "p"), "--images", str(tmp_path / "q")]) == 2
    assert "has no pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"latents_shape": b""}, "has no latents_shape"),
        ({"latents_shape": b"3 0"}, "latents_shape is '3 0', not N"),
        ({"latents_shape": b"2 2 16 3 4"}, "says that it has 2 rows and holds more"),
        ({"latents_1_data": b""}, "has no latents_1_data"),
        ({"latents_1_data": b"12"}, "latents_1_data has 2 bytes and latents_shape .* asks for 768"),
        ({"latents_2_data": np.full(ROW, np.nan, "<f2").tobytes()}, "2_data holds NaN"),
        ({"prompts_0_data": b""}, "has no prompts_0_data"),
        ({"prompts_0_data": b" "}, "prompts_0_data is blank"),
        ({"prompts_0_data": b"\xff"}, "prompts_0_data is not UTF-8"),
        ({"img_0_data": b"123", "img_1_data": b"123", "img_2_data": b"123"}, "img_0_data has 3 bytes"),
    ],
)
def test_check_names_what_is_broken(tmp_path: pathlib.Path, extra: dict[str, bytes], message: str, capsys):
    source = write(tmp_path / "set", numbers(3, *ROW), **extra)
    assert main(["check", str(source)]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_what_is_no_lmdb_is_a_sentence(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="holds no LMDB"):
        LmdbData(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        LmdbData(tmp_path / "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "data.mdb").write_bytes(b"no LMDB at all" * 1000)
    with pytest.raises(UserError, match="cannot be read as an LMDB"):
        LmdbData(tmp_path / "bad")


def test_without_the_package_the_message_says_how_to_get_it(tmp_path: pathlib.Path, monkeypatch):
    source = write(tmp_path / "set", numbers(1, *ROW))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        LmdbData(source)
