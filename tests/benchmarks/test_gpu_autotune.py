"""Tables of tile sizes that a tuning run writes."""

from benchmarks.gpu import autotune, shapes
from x2v_jax.ops.attention.hopper_config import HopperConfig, shape_class
from x2v_jax.ops.attention.hopper_table import ENTRIES


def _attention(seconds: float | None, implementation: str = "hopper", precision: str = "full", **config) -> dict:
    row = {"operation": "attention", "precision": precision, "class": "long", "implementation": implementation}
    row |= {"config": {"block_kv": 128, "stages": 2, "warpgroups": 2, **config}}
    return row | ({"failed": "Wrong"} if seconds is None else {"seconds": seconds})


def _entries(text: str, name: str) -> dict:
    values: dict = {}
    exec(text, values)
    return values[name]


def test_a_table_without_measurements_is_the_one_that_is_there():
    assert _entries(autotune.attention_table(ENTRIES, []), "ENTRIES") == ENTRIES
    assert (
        autotune.attention_table(ENTRIES, []).splitlines()[:6] == autotune.ATTENTION_TABLE.read_text().splitlines()[:6]
    )


def test_the_fastest_right_candidate_is_written_and_compared_with_cudnn():
    rows = [_attention(0.03), _attention(0.02, stages=3), _attention(None, stages=4), _attention(0.025, "cudnn")]
    entry = _entries(autotune.attention_table(ENTRIES, rows), "ENTRIES")["full/long"]
    assert entry["config"]["stages"] == 3
    assert entry["measured"] is True and entry["faster_than_cudnn"] is True
    HopperConfig(**entry["config"])


def test_cudnn_stays_where_it_is_faster():
    rows = [_attention(0.03), _attention(0.025, "cudnn")]
    assert _entries(autotune.attention_table(ENTRIES, rows), "ENTRIES")["full/long"]["faster_than_cudnn"] is False


def test_every_class_of_shapes_has_its_shape():
    by_name = {shape.name: shape for shape in (*shapes.SELF_ATTENTION, *shapes.CROSS_ATTENTION)}
    for kind, name in autotune._CLASSES.items():
        assert shape_class(by_name[name].queries, by_name[name].keys) == kind


def test_candidates_fit_and_are_not_repeated():
    for precision in ("full", "int8", "e4m3", "e4m3_all"):
        found = autotune.attention_candidates(precision)
        assert found and len(set(found)) == len(found) and all(config.fits(precision) for config in found)
        quick = autotune.attention_candidates(precision, quick=True)
        assert set(quick) < set(found) and HopperConfig() in quick
    linear = autotune.linear_candidates(shapes.LINEAR[0], "int8", "plain")
    assert len(set(linear)) == len(linear) > 30 and all(config.measured for config in linear)
    quick = autotune.linear_candidates(shapes.LINEAR[0], "int8", "plain", quick=True)
    assert linear[0] in quick and set(quick) < set(linear) and len(quick) < len(linear) / 3


def test_tiles_of_a_matrix_keep_those_of_others():
    row = {"operation": "linear", "n": 1536, "k": 1536, "dtype": "int8", "kind": "plain"}
    rows = [{**row, "seconds": 2.0, "config": {"tile_n": 128}}, {**row, "seconds": 1.0, "config": {"tile_n": 256}}]
    before = {(5120, 5120, "int8", "plain"): {"tile_n": 128}}
    table = _entries(autotune.linear_table(before, rows), "ROWS")
    assert table == {**before, (1536, 1536, "int8", "plain"): {"tile_n": 256}}


def test_without_a_gpu_there_is_nothing_to_tune(tmp_path, capsys):
    assert autotune.main([f"--out={tmp_path}"]) == 2
    assert "no GPU" in capsys.readouterr().err
