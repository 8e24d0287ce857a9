import json
import shutil

import pytest

from benchmarks.errors import parity
from tests.reference.cases_lib.case import DEFAULT_CASES, Case
from tests.reference.cases_lib.measure import Measurement


@pytest.fixture
def case():
    return Case.load(DEFAULT_CASES / "step_distill_4")


def test_report_has_a_row_for_every_output_and_marks_failures(case):
    measurements = [Measurement("sigmas", 0.0, 2e-4), Measurement("trajectory", 3e-3, 2e-4)]
    text = parity.report([parity.Section(case, "sampling", measurements)], platform="jax 0 on CPU")
    assert "| step_distill_4 | sampling | sigmas | 0.0e+00 | 2e-04 |" in text
    assert "|  |  | trajectory | **3.0e-03** | 2e-04 |" in text
    assert "jax 0 on CPU" in text and case.source in text


def test_report_shortens_many_outputs_to_the_farthest_and_nan_is_farthest(case):
    measurements = [Measurement(f"w{i}", i * 1e-8, 2e-4) for i in range(9)]
    text = parity.report([parity.Section(case, "", measurements)], platform="")
    assert "9 outputs, farthest w8 | 8.0e-08" in text
    measurements[3] = Measurement("w3", float("nan"), 2e-4)
    text = parity.report([parity.Section(case, "", measurements)], platform="")
    assert "9 outputs, farthest w3 | **nan**" in text


def test_command_writes_the_report(tmp_path, capsys):
    for name in ("step_distill_4", "lora_peft"):
        shutil.copytree(DEFAULT_CASES / name, tmp_path / "cases" / name)
    output = tmp_path / "parity.md"
    assert parity.main(["--cases", str(tmp_path / "cases"), "--output", str(output)]) == 0
    text = output.read_text()
    assert "| step_distill_4 |" in text and "| lora_peft |" in text
    assert "2 cases, 0 outputs outside" in capsys.readouterr().out


def test_command_fails_where_a_record_differs(tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(DEFAULT_CASES / "unipc_12", folder)
    fields = json.loads((folder / "case.json").read_text())
    fields["config"]["sample_shift"] = 3.0
    (folder / "case.json").write_text(json.dumps(fields))
    assert parity.main(["--cases", str(tmp_path), "--output", str(tmp_path / "parity.md")]) == 1
    assert "unipc_12: trajectory" in capsys.readouterr().err


def test_a_folder_without_cases_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parity.main(["--cases", str(tmp_path)])
    assert "no folder with a case.json" in capsys.readouterr().err
