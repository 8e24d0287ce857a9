"""What low precision costs: recordings, errors of operations and of videos, and the tables that tell them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from benchmarks.errors import table
from benchmarks.errors.ops import ATTENTION, LINEAR, attention_error, linear_error
from benchmarks.errors.record import (
    ATTENTIONS,
    MATRICES,
    Recording,
    kept_rows,
    listening,
    smoothed_case,
    smoothed_cases,
)
from benchmarks.errors.table import plot
from benchmarks.errors.videos import fill, psnr
from benchmarks.reports import part
from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.checkpoint.quantize.calibration import Calibration
from x2v_jax.checkpoint.quantize.smoothing import smoothing_factors
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import abstract, flatten, merge, split
from x2v_jax.models.wan import WanModel

CONFIG = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=32, text_len=12)
SHAPE = (1, 2, 4, 4, 16)


@pytest.fixture(scope="module")
def network():
    graphdef, _ = abstract(lambda: WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return graphdef, jax.jit(lambda: split(WanModel(CONFIG, rngs=nnx.Rngs(0)))[1])()


@pytest.mark.slow
def test_every_matrix_and_attention_of_every_block_is_recorded_in_order(network):
    graphdef, params = network
    with listening() as heard:
        call = jax.jit(lambda params, *x: merge(graphdef, params)(*x))
        call(params, jnp.ones(SHAPE), jnp.array([500.0]), jnp.ones((1, 12, 24))).block_until_ready()
    assert tuple(sorted(heard.matrices)) == tuple(sorted(MATRICES)) and tuple(heard.attentions) == ATTENTIONS
    assert {len(cases) for cases in (*heard.matrices.values(), *heard.attentions.values())} == {CONFIG.num_layers}
    names = {
        "self q": "self_attn.q", "self k": "self_attn.k", "self v": "self_attn.v", "self o": "self_attn.o",
        "cross q": "cross_attn.q", "cross k": "cross_attn.k", "cross v": "cross_attn.v", "cross o": "cross_attn.o",
        "ffn 1": "ffn.linear_1", "ffn 2": "ffn.linear_2",
    }  # fmt: skip
    flat = flatten(params)
    for name, path in names.items():
        for layer, (x, kernel, bias) in enumerate(heard.matrices[name]):
            np.testing.assert_array_equal(kernel, flat[f"blocks.{path}.kernel"][layer], err_msg=name)
            assert x.shape[-1] == kernel.shape[0] and bias.shape == kernel.shape[1:]
    assert heard.attentions["self"][0][0].shape == (1, 8, 2, 16)
    assert heard.attentions["cross"][0][1].shape == (1, 12, 2, 16)


def test_nothing_is_recorded_afterwards(network):
    graphdef, params = network
    with listening() as heard:
        pass
    call = jax.jit(lambda params, *x: merge(graphdef, params)(*x))
    call(params, jnp.ones(SHAPE), jnp.array([500.0]), jnp.ones((1, 12, 24))).block_until_ready()
    assert not heard.matrices and not heard.attentions


@pytest.mark.slow
def test_errors_of_normal_numbers_are_those_of_the_bits():
    x, kernel = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
    errors = {name: linear_error(name, x, kernel, jnp.zeros(64)) for name in LINEAR}
    assert errors["bfloat16"] < errors["int8, weights only"] < errors["int8, W8A8"] < 0.02
    assert errors["int8, W8A8"] < errors["fp8, W8A8"] < 0.06
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 128, 1, 128)) for i in range(3))
    errors = {name: attention_error(name, q, k, v) for name in ATTENTION}
    assert errors["bfloat16"] < errors["int8"] < errors["e4m3"] < errors["e4m3_all"] < 0.1
    assert errors["int8"] < errors["int8_e4m3"] < errors["e4m3_all"]


@pytest.mark.parametrize("quantization", ["int8", "float8_e4m3fn"])
def test_a_quantized_network_is_filled_from_float_weights(network, quantization: str):
    _, params = network
    shapes = abstract(lambda: WanModel(CONFIG, rngs=nnx.Rngs(0), quantization=quantization))[1]
    filled = flatten(fill(shapes, params))
    wanted = flatten(shapes)
    assert {n: (x.shape, x.dtype) for n, x in filled.items()} == {n: (x.shape, x.dtype) for n, x in wanted.items()}
    name = "blocks.ffn.linear_1"
    again = np.asarray(filled[f"{name}.weight"], np.float32) * np.asarray(filled[f"{name}.scale"])[..., None]
    kernel = np.asarray(flatten(params)[f"{name}.kernel"])
    assert np.abs(again.swapaxes(1, 2) - kernel).max() < 0.04 * np.abs(kernel).max()


def test_smoothing_takes_what_two_large_channels_cost():
    x, kernel = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
    x = x.at[:, :2].multiply(50)
    plain = linear_error("int8, W8A8", x, kernel, jnp.zeros(64))
    case = smoothed_case(x, kernel, jnp.zeros(64), jnp.abs(x).max(0), jnp.abs(kernel).max(1))
    np.testing.assert_allclose(case[0] @ case[1], x @ kernel, rtol=1e-3, atol=1e-2)
    assert linear_error("int8, W8A8", *case) < plain / 2


def test_recorded_matrices_of_one_input_share_its_factors():
    rng = np.random.default_rng(0)
    cases = {
        name: [
            tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 8), (8,))) for _ in range(4)
        ]
        for name in MATRICES
    }
    maxima = {name: np.exp(rng.standard_normal((2, 8))).astype(np.float32) for name in GROUPS}
    even = list(smoothed_cases(Recording(cases, {}), Calibration(maxima, {}, pathlib.Path("c"))))
    plain = [case for own in cases.values() for case in own]
    assert len(even) == len(plain) == 40
    by_name = dict(zip(cases, (even[i : i + 4] for i in range(0, 40, 4)), strict=True))
    largest = np.max([np.abs(cases[name][3][1]).max(1) for name in ("self q", "self k", "self v")], axis=0)
    s = smoothing_factors(maxima["self_attn.q"][1], largest, 0.5)
    for name in ("self q", "self k", "self v"):  # the fourth is the second of two layers, in the second step
        np.testing.assert_allclose(by_name[name][3][0], cases[name][3][0] / s, rtol=1e-6)
        np.testing.assert_allclose(by_name[name][3][1], cases[name][3][1] * s[:, None], rtol=1e-6)
    for name in ("cross k", "cross v", "ffn 2"):
        assert by_name[name] == cases[name]


def test_rows_of_variants_that_are_not_measured_stay():
    report = {
        "date": "then",
        "videos": [_video("bfloat16", 0.99), _video("int8", 0.98), _video("fp8", 0.9) | {"n": 10}],
    }
    kept = kept_rows(report, ["int8"], 200)
    assert kept == [report["videos"][0] | {"measured": "then"}]
    assert kept_rows({"date": "now", "videos": kept}, [], 200) == kept


def test_decibels_of_equal_videos_are_as_many_as_there_are():
    video = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(video, video) == 99.0
    assert psnr(video, video + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))


def _video(variant: str, right: float) -> dict:
    return {"variant": variant, "n": 200, "all": right, "all_low": right - 0.02, "all_high": right}


def test_more_than_a_point_below_bfloat16_is_too_inaccurate():
    rows = [_video("float32", 1.0), _video("bfloat16", 0.99), _video("int8", 0.98), _video("fp8", 0.975)]
    assert table.too_inaccurate(rows) == ["fp8: 97.5% right, bfloat16 99.0%"]
    assert table.too_inaccurate(rows[2:]) == []


def _operation(operation: str, kind: str, median: float, worst: float, cases: int) -> dict:
    return {"operation": operation, "precision": "int8", "data": kind, "median": median, "worst": worst, "cases": cases}


def test_tables_have_an_empty_cell_for_what_was_not_measured(tmp_path):
    rows = [_operation("linear", "recorded", 0.01, 0.02, 3), _operation("KV cache", "normal", 0.03, 0.03, 1)]
    text = table.operations_table(rows)
    assert "| linear, int8 | 1.00% / 2.00% |  |" in text and "| KV cache, int8 |  | 3.00% |" in text
    assert "| int8 | 99.0% of 200 | 97.0% – 99.0% |  |  |" in table.videos_table([_video("int8", 0.99)])
    plot(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000


def test_the_document_says_what_the_committed_numbers_say():
    document, report = table.DOCUMENT.read_text(), json.loads(table.DEFAULT_OUTPUT.read_text())
    assert part(document, table.OPERATIONS_PART) == table.operations_table(report["operations"])
    assert part(document, table.VIDEOS_PART) == table.videos_table(report["videos"])
    assert table.too_inaccurate(report["videos"]) == []


def test_attention_of_the_committed_numbers_is_within_the_aims():
    rows = json.loads(table.DEFAULT_OUTPUT.read_text())["operations"]
    recorded = {row["precision"]: row for row in rows if (row["operation"], row["data"]) == ("attention", "recorded")}
    assert recorded["int8"]["median"] < 0.03 and recorded["e4m3_all"]["median"] < 0.06
