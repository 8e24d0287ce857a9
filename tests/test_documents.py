"""Documents: links lead somewhere, the example shown is the example run."""

import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document: pathlib.Path):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_example_that_is_shown_is_the_one_that_runs():
    code = (ROOT / "docs/example.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs/example.md").read_text()


def test_commands_of_documents_are_found():
    from run_documented_commands import blocks

    assert blocks("text\n```bash run\na\nb\n```\n```bash\nc\n```\n") == ["a\nb\n"]
    assert any(blocks(document.read_text()) for document in DOCUMENTS)
