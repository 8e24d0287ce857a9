"""LoRA merging against numbers recorded from PyTorch."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into

CASES = pathlib.Path(__file__).parents[2] / "reference" / "cases"


@pytest.mark.parametrize("name", ["lora_lightx2v", "lora_peft", "lora_kohya_alpha"])
def test_merged_weights_agree_with_the_recorded_ones(name):
    case = json.loads((CASES / name / "case.json").read_text())
    weights = read_safetensors(CASES / case["weights_from"] / "weights.safetensors")
    lora = LoraFile.open(CASES / name / "inputs.safetensors")
    merged, report = merge_into(weights, [(lora, case["config"]["strength"])])
    recorded = safetensors.numpy.load_file(CASES / name / "outputs.safetensors")
    (account,) = report.files
    assert set(account.parameters) == set(recorded)
    assert set(account.matched) == set(case["inputs"])
    for key, wanted in recorded.items():
        got = merged[key].read()
        assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted), key
    assert all(merged[key] is weights[key] for key in weights if key not in recorded)
