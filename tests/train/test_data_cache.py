"""Caches on disk: resumable, complete or not readable, every damage found and named."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from train.data.cache import Cache, CacheWriter
from train.data.cache_format import Plan, TensorSpec
from train.data.check import check
from train.data.latents import LatentCache
from train.data.trajectories import TrajectoryCache, TrajectoryWriter
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_metadata
from x2v_jax.errors import UserError

SIZE = (2, 3, 4, 5)


def plan(count: int = 5, **settings: object) -> Plan:
    items = [{"text": f"caption {i}", "file": f"{i}.mp4"} for i in range(count)]
    return Plan("latents", {"fps": 16, **settings}, {"latents": TensorSpec("float16", SIZE)}, items, 2)


def values(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SIZE).astype(np.float16)


def write(writer: CacheWriter, shards: list[int]) -> None:
    for shard in shards:
        writer.write(shard, {"latents": np.stack([values(row) for row in writer.plan.rows(shard)])})


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    writer = CacheWriter(tmp_path / "cache", plan())
    write(writer, writer.pending())
    assert writer.finish()
    return tmp_path / "cache"


def test_rows_come_back_in_any_order(cache: pathlib.Path):
    latents = LatentCache.open(cache, SIZE)
    assert len(latents) == 5 and latents.latent_size == SIZE and latents.captions[3] == "caption 3"
    rows = [4, 0, 0, 3]
    assert latents.latents(rows).dtype == np.float32
    np.testing.assert_array_equal(latents.latents(np.array(rows)), np.stack([values(row) for row in rows]))
    assert latents.latents([]).shape == (0, *SIZE)
    for row in (5, -1):
        with pytest.raises(IndexError, match="5 rows"):
            latents.latents([row])


def test_an_interrupted_cache_goes_on_where_it_stopped(tmp_path: pathlib.Path):
    path = tmp_path / "cache"
    write(CacheWriter(path, plan()), [1])
    with pytest.raises(UserError, match="not complete: 1 of 3 shards are there; run the command"):
        LatentCache.open(path)
    (path / ".shard-00000-of-00003.safetensors.incomplete").write_bytes(b"half")
    before = (path / "shard-00001-of-00003.safetensors").stat().st_mtime_ns
    writer = CacheWriter(path, plan())
    assert writer.pending() == [0, 2] and not writer.finish()
    write(writer, writer.pending())
    assert writer.finish()
    assert (path / "shard-00001-of-00003.safetensors").stat().st_mtime_ns == before
    np.testing.assert_array_equal(LatentCache.open(path).latents([2])[0], values(2))


def test_hosts_share_a_folder(tmp_path: pathlib.Path):
    hosts = [CacheWriter(tmp_path / "cache", plan()) for _ in range(2)]
    assert [writer.pending(i, 2) for i, writer in enumerate(hosts)] == [[0, 2], [1]]
    write(hosts[0], [0, 2])
    assert not hosts[0].finish()
    write(hosts[1], [1])
    assert hosts[1].finish() and hosts[0].finish()
    assert len(Cache.open(tmp_path / "cache", "latents")) == 5


def test_other_settings_or_another_source_are_refused(cache: pathlib.Path):
    with pytest.raises(UserError, match="fps was 16 and is 8"):
        CacheWriter(cache, plan(fps=8))
    with pytest.raises(UserError, match="had 5 other entries, now 4"):
        CacheWriter(cache, plan(4))
    with pytest.raises(UserError, match="holds something else"):
        CacheWriter(cache.parent, plan())
    with pytest.raises(UserError, match="nothing to put"):
        CacheWriter(cache.parent / "new", plan(0))


def test_a_shard_of_another_run_is_refused(cache: pathlib.Path, tmp_path: pathlib.Path):
    other = CacheWriter(tmp_path / "other", plan(seed=2))
    shutil.copy(cache / "shard-00001-of-00003.safetensors", tmp_path / "other")
    with pytest.raises(UserError, match="made from another source or with other settings"):
        other.pending()


def test_rows_that_could_not_be_used_are_left_out(tmp_path: pathlib.Path):
    writer = CacheWriter(tmp_path / "cache", plan())
    write(writer, [0, 2])
    writer.write(1, {"latents": values(3)[None]}, [3])
    assert writer.finish()
    cache = LatentCache.open(tmp_path / "cache")
    assert cache.captions == [f"caption {i}" for i in (0, 1, 3, 4)]
    np.testing.assert_array_equal(cache.latents([2, 3]), np.stack([values(3), values(4)]))
    assert not check(tmp_path / "cache").problems


def test_a_shard_that_does_not_fit_the_plan_is_not_written(tmp_path: pathlib.Path):
    writer = CacheWriter(tmp_path / "cache", plan())
    for wrong in (
        np.zeros((1, *SIZE), np.float16),
        np.zeros((2, *SIZE), np.float32),
        np.full((2, *SIZE), np.nan, "f2"),
    ):
        with pytest.raises(ValueError, match="shard 0"):
            writer.write(0, {"latents": wrong})
    assert writer.pending() == [0, 1, 2]


def test_latents_of_another_size_are_refused_with_both_sizes(cache: pathlib.Path):
    with pytest.raises(UserError, match=r"latents of 2 x 3 x 4 x 5 .*needs 2 x 3 x 8 x 5"):
        LatentCache.open(cache, (2, 3, 8, 5))


def test_what_is_no_cache_is_a_sentence(cache: pathlib.Path, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="does not exist"):
        LatentCache.open(tmp_path / "none")
    with pytest.raises(UserError, match="no cache of training data"):
        LatentCache.open(tmp_path)
    with pytest.raises(UserError, match="holds latents, not prompts"):
        Cache.open(cache, "prompts")
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(index | {"format_version": 9}))
    with pytest.raises(UserError, match="format_version is 9"):
        LatentCache.open(cache)


def _flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def _put_nan(path: pathlib.Path) -> None:
    note = read_metadata(path)
    with SafetensorsWriter(path, {"latents": ((2, *SIZE), np.float16)}, note) as writer:
        writer.write("latents", np.full((2, *SIZE), np.nan, np.float16))


def _edit_index(path: pathlib.Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "a bit": (lambda c: _flip(c / "shard-00001-of-00003.safetensors"), "SHA-256 differs"),
    "a shard": (lambda c: (c / "shard-00002-of-00003.safetensors").unlink(), "00002-of-00003.safetensors: is missing"),
    "cut": (lambda c: (c / "shard-00000-of-00003.safetensors").write_bytes(b"12345678{}"), "00000-of-00003"),
    "nan": (lambda c: _put_nan(c / "shard-00000-of-00003.safetensors"), "NaN"),
    "items": (lambda c: (c / "items.jsonl").write_text('{"text": "x"}\n'), "items.jsonl: is not the file"),
    "count": (lambda c: _edit_index(c / "index.json", count=7), "says 7 rows, and the shards hold 5"),
    "index": (lambda c: (c / "index.json").write_text("{"), "index.json"),
    "settings": (lambda c: _edit_index(c / "index.json", settings={"fps": 8}), "with other settings"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_names_what_is_broken(cache: pathlib.Path, damage: str):
    assert not check(cache).problems
    break_it, expected = DAMAGES[damage]
    break_it(cache)
    report = check(cache)
    assert any(expected in problem for problem in report.problems), report


def test_a_damaged_shard_is_made_again_after_it_is_deleted(cache: pathlib.Path):
    (cache / "shard-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="is missing; run the command"):
        LatentCache.open(cache).latents([2])
    writer = CacheWriter(cache, plan())
    assert writer.pending() == [1]
    write(writer, [1])
    assert writer.finish() and not check(cache).problems


SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)


def trajectories(path: pathlib.Path, **changes: object) -> TrajectoryWriter:
    arguments = {"prompts": ["a", "b", "c"], "latent_size": SIZE, "sigmas": SIGMAS, "rows_per_shard": 2}
    return TrajectoryWriter(path, **(arguments | {"settings": {"seed": 1}} | changes))  # type: ignore[arg-type]


def test_trajectories_are_written_by_shard_and_read_by_row(tmp_path: pathlib.Path):
    states = np.random.default_rng(0).standard_normal((3, len(SIGMAS), *SIZE))
    writer = trajectories(tmp_path / "pairs", prompt_rows=[7, 7, 2])
    for shard, rows in writer.pending(1, 2):
        writer.write(shard, states[rows.start : rows.stop])
    assert not writer.finish()
    again = trajectories(tmp_path / "pairs", prompt_rows=[7, 7, 2])
    assert [(shard, list(rows)) for shard, rows in again.pending()] == [(0, [0, 1])]
    again.write(0, states[:2])
    assert again.finish()
    cache = TrajectoryCache.open(tmp_path / "pairs", SIZE, SIGMAS)
    assert cache.sigmas == SIGMAS and cache.prompts == ["a", "b", "c"] and cache.prompt_rows.tolist() == [7, 7, 2]
    assert cache.settings["seed"] == 1 and len(cache) == 3
    np.testing.assert_allclose(cache.states([2, 0]), states[[2, 0]], atol=2e-3)


def test_trajectories_of_another_student_or_size_are_refused(tmp_path: pathlib.Path):
    writer = trajectories(tmp_path / "pairs")
    for shard, rows in writer.pending():
        writer.write(shard, np.zeros((len(rows), len(SIGMAS), *SIZE)))
    writer.finish()
    with pytest.raises(UserError, match=r"1000, 937.5, 833.3, 625, 0, and this student is trained at 1000, 500, 0"):
        TrajectoryCache.open(tmp_path / "pairs", sigmas=(1, 0.5, 0))
    with pytest.raises(UserError, match="latents of 2 x 3 x 4 x 5"):
        TrajectoryCache.open(tmp_path / "pairs", (1, 3, 4, 5))
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        trajectories(tmp_path / "pairs", settings={"seed": 2})


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.5), (0.5, 0.7, 0.0), (1000.0, 500.0, 0.0)])
def test_sigmas_that_do_not_fall_to_zero_are_refused(tmp_path: pathlib.Path, sigmas: tuple[float, ...]):
    with pytest.raises(UserError, match="do not fall from at most 1000 to 0"):
        trajectories(tmp_path / "pairs", sigmas=sigmas)


def test_states_that_are_not_finite_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="trajectories 0 to 1 hold NaN"):
        trajectories(tmp_path / "pairs").write(0, np.full((2, len(SIGMAS), *SIZE), 1e6))
