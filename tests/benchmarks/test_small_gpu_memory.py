"""The committed table of small GPUs: what it says fits does, and the document shows it."""

import json
import pathlib
from typing import Any

import pytest

from benchmarks.aot import small_gpu_memory
from benchmarks.reports import part
from x2v_jax.memory import predict

ROWS = json.loads(small_gpu_memory.DEFAULT_OUTPUT.read_text())["cases"]
# What jax is given of a card of so many GiB; see infer.start.
SHARE = 0.92 * (1 << 30)


def test_every_case_is_there():
    names = [field for field in ROWS[0] if field in small_gpu_memory.Case.__dataclass_fields__]
    assert [small_gpu_memory.Case(**{name: row[name] for name in names}) for row in ROWS] == list(
        small_gpu_memory.CASES
    )


def test_14b_fits_24_gb_and_with_its_blocks_on_the_host_16():
    def most(offload: str) -> int:
        # The VAE streams where that fits, and else works in tiles: "auto".
        return max(row["device"] for row in ROWS if row["offload"] == offload and row["vae_decode"] == "tiled")

    assert most("none") < 24 * SHARE
    others = max(row["device"] for row in ROWS if row["phase"] in ("text", "image"))
    assert max(most("blocks"), others) < 16 * SHARE
    for row in ROWS:
        assert (row["arguments_on_host"] > 10e9) == (row["offload"] == "blocks" and row["phase"] == "denoise")


@pytest.mark.parametrize("case", small_gpu_memory.CASES, ids=str)
def test_predictions_are_near_what_was_compiled(case: small_gpu_memory.Case):
    row = ROWS[small_gpu_memory.CASES.index(case)]
    assert 1 <= row["predicted"] / row["device"] < 1.3
    sizes = small_gpu_memory.Sizes(small_gpu_memory._configs(case.model))
    options: dict[str, Any] = {"offload": case.offload, "vae_decode": case.vae_decode, "vae_dtype": case.vae_dtype}
    plan = predict.plan(sizes, sizes.configs, predict.Workload(small_gpu_memory.LATENTS, guided=False, **options))
    assert plan.phases[case.phase] == row["predicted"]


def test_the_document_shows_the_table():
    document = (pathlib.Path(__file__).parents[2] / "docs/small_gpus.md").read_text()
    assert part(document, "small gpus") == small_gpu_memory.table(ROWS)


def test_without_the_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(small_gpu_memory, "prepare", lambda wheels: False)
    assert small_gpu_memory.main([]) == 1 and "jax-cuda13-plugin" in capsys.readouterr().err
