"""`pytest tests/reference --reference-cases DIR`: one test a case folder in DIR, and a table of errors at the end."""

import pathlib

import pytest

from tests.reference.cases_lib.case import DEFAULT_CASES, find_cases

_PROPERTY = "reference_rows"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-cases",
        metavar="DIR",
        default=str(DEFAULT_CASES),
        help="folder of recorded cases to test (default: tests/reference/cases)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" not in metafunc.fixturenames:
        return
    # Where the whole suite runs, this file is met after the command line was read, and the option is unknown.
    folder = pathlib.Path(metafunc.config.getoption("--reference-cases", default=str(DEFAULT_CASES))).resolve()
    paths = find_cases(folder)
    if not paths:
        raise pytest.UsageError(f"--reference-cases {folder}: no folder with a case.json in it")
    ids = [path.relative_to(folder).as_posix() if path != folder else path.name for path in paths]
    metafunc.parametrize("case_path", paths, ids=ids)


@pytest.fixture
def record_rows(record_property):
    """Takes (case, output, error, tolerance) rows for the table."""
    return lambda rows: record_property(_PROPERTY, rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for outcome in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(outcome, [])]
    properties = [value for r in reports for name, value in getattr(r, "user_properties", ()) if name == _PROPERTY]
    rows = sorted((row for value in properties for row in value), key=lambda row: row[0])
    if not rows:
        return
    terminalreporter.section("relative errors against the recorded cases")
    cells = [("case", "output", "error", "tolerance"), *(_cells(*row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    for row in cells:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _cells(case: str, output: str, error: float | None, tolerance: float | None) -> tuple[str, str, str, str]:
    if error is None or tolerance is None:
        return case, output, "", ""
    return case, output, f"{error:.1e}", f"{tolerance:.0e}" + ("" if error <= tolerance else "  FAILED")
