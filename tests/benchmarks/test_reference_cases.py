"""The measuring itself: it must not pass what it did not compare."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.reference.cases_lib.case import DEFAULT_CASES, Case, find_cases
from tests.reference.cases_lib.measure import Measurement, measure, relative_error
from tests.reference.cases_lib.registry import UnknownKind

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def copy_case(tmp_path):
    """Copies a default case to a folder of its own, with changed fields of case.json and changed outputs."""

    def copy(name, to, change_outputs=None, **fields):
        folder = tmp_path / to
        shutil.copytree(DEFAULT_CASES / name, folder)
        case = json.loads((folder / "case.json").read_text()) | {"name": to} | fields
        (folder / "case.json").write_text(json.dumps(case))
        if change_outputs is not None:
            outputs = load_file(folder / "outputs.safetensors")
            save_file(change_outputs(outputs), folder / "outputs.safetensors")
        return Case.load(folder)

    return copy


def test_relative_error_is_the_ratio_of_norms():
    assert relative_error([1.0, 2.0], [1.0, 2.0]) == 0
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert relative_error([0.5, 0.0], [0.0, 0.0]) == 0.5
    with pytest.raises(ValueError, match=r"shape \(1, 2\) where \(2,\) was recorded"):
        relative_error([[1.0, 2.0]], [1.0, 2.0])


def test_nan_does_not_pass():
    assert not Measurement("x", relative_error([np.nan], [1.0]), 2e-4).passed
    assert not Measurement("x", relative_error([np.inf], [1.0]), 2e-4).passed


def test_every_recorded_output_is_measured_or_it_is_an_error(copy_case):
    assert [m.output for m in measure(copy_case("unipc_12", "same"))] == ["timesteps", "sigmas", "trajectory"]
    extra = copy_case("unipc_12", "extra", lambda outputs: outputs | {"more": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="does not compute more"):
        measure(extra)
    short = copy_case("unipc_12", "short", lambda outputs: {"sigmas": outputs["sigmas"][:-1].copy()})
    with pytest.raises(ValueError, match=r"sigmas: shape \(13,\) where \(12,\) was recorded"):
        measure(short)


def test_a_weight_that_should_not_change_is_noticed(copy_case):
    case = copy_case("lora_peft", "less", lambda outputs: dict(list(outputs.items())[1:]))
    with pytest.raises(ValueError, match="was changed and should not be"):
        measure(case)


def test_unknown_kind_is_an_error(copy_case):
    with pytest.raises(UnknownKind, match="'sculpture'"):
        measure(copy_case("unipc_12", "odd", kind="sculpture"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("causal_rollout", {"slide": 1}, "config has slide"),
        ("causal_rollout", {"qk_norm": False}, "qk_norm is false"),
        ("causal_rollout", {"local_attn_size": 0.5}, r"local_attn_size is 0\.5"),
        ("causal_rollout", {"warp_denoising_step": "yes"}, "warp_denoising_step is 'yes'"),
        ("causal_training_forward", {"model_type": "i2v"}, "model_type is 'i2v'"),
        ("causvid_rollout", {"num_blocks": 3}, "num_frames 6 is not num_blocks blocks of 3"),
        ("causvid_rollout", {"frame_seq_length": 1560}, "frame_seq_length is 1560"),
        ("causvid_rollout", {"num_fragments": 3}, "noise for 3 blocks"),
        ("dmd_g5", {"real_x0": "cond"}, "real_x0 is 'cond'"),
        ("dmd_g5", {"score": "v = x"}, "score is 'v = x'"),
        ("dmd_g5", {"weight": 1}, "config has weight"),
    ],
)
def test_settings_that_are_not_understood_are_an_error(copy_case, name, change, message):
    config = Case.load(DEFAULT_CASES / name).config
    with pytest.raises(ValueError, match=message):
        measure(copy_case(name, "odd", config=config | change))


def test_shared_weights_come_from_beside_the_case_first(copy_case, tmp_path):
    case = copy_case("lora_peft", "mine")
    assert case.weights_path == DEFAULT_CASES / "lora_lightx2v" / "weights.safetensors"
    beside = tmp_path / "lora_lightx2v" / "weights.safetensors"
    beside.parent.mkdir()
    beside.touch()
    assert case.weights_path == beside
    with pytest.raises(FileNotFoundError, match="'nowhere'"):
        _ = copy_case("lora_peft", "lost", weights_from="nowhere").weights_path


def test_cases_are_found_at_any_depth_and_a_case_folder_finds_itself(copy_case, tmp_path):
    case = copy_case("unipc_12", "deep/down")
    assert find_cases(tmp_path) == [case.path] == find_cases(case.path)


@pytest.mark.slow
def test_the_pytest_run_reports_each_case_by_its_outcome(copy_case, tmp_path):
    copy_case("unipc_12", "a_good")
    copy_case("step_distill_4", "b_wrong", lambda outputs: outputs | {"trajectory": 1.01 * outputs["trajectory"]})
    copy_case("unipc_12", "c_odd", kind="sculpture")
    copy_case("dmd_g5", "d_good")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/reference",
        "--reference-cases",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout
    table = [line.split() for line in done.stdout[done.stdout.index("relative errors") :].splitlines()]
    assert ["a_good", "sigmas", "0.0e+00", "2e-04"] in table
    assert ["b_wrong", "trajectory", "9.9e-03", "2e-04", "FAILED"] in table
    assert ["c_odd", "FAILED:", "UnknownKind"] in table
    assert any(row[:2] == ["d_good", "loss_gradient"] and row[-1] == "2e-04" for row in table)


@pytest.mark.slow
def test_the_pytest_run_refuses_a_folder_without_cases(tmp_path):
    command = [sys.executable, "-m", "pytest", "tests/reference", "-n", "0", "--reference-cases", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0 and "no folder with a case.json" in done.stdout + done.stderr
