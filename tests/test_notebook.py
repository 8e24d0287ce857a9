"""The notebook runs, cell by cell, and carries no outputs."""

import ast
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_every_cell_of_a_notebook_runs(path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names: dict[str, object] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells, 1):
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None  # a cell shows what its last line is
        exec(compile(ast.Module(body, []), f"{path.name}, cell {number}", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), names))
    assert repr(shown[0]).startswith("Pipeline(") and shown[1] == ((9, 64, 64, 3), names["frames"].dtype)  # type: ignore[attr-defined]
