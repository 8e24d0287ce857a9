"""Documents: links lead somewhere, the example shown is the example run, the table of rooms is that of the imports."""

import pathlib
import re
import sys

import pytest
from test_structure import LAYERS

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
sys.path.insert(0, str(ROOT / "tools"))
# The public names have the reference's first page; the others are programs, which --help describes, or old places.
NOT_IN_THE_REFERENCE = {"", "video", "configs", "cli", "__main__", "convert", "infer", "benchmarks", "tools"}


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


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<a href="https://a.org">a</a><link rel="canonical" href="https://a.org">', False),
        ('<script src="bundle.js"></script><img src="../a.png">', False),
        ('<script src="https://a.org/a.js"></script>', True),
        ('<link rel="stylesheet" href="//a.org/a.css">', True),
        ('<link rel="preconnect" href="https://a.org">', True),
        ('<img srcset="a.png, https://a.org/b.png 2x">', True),
        ("<style>a { background: url(https://a.org/a.png) }</style>", True),
    ],
)
def test_what_a_page_of_the_site_loads_from_another_host_is_seen(text: str, loads: bool):
    from check_site import POLICY, foreign

    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    assert bool(foreign("index.html", policy + text)) == loads
    assert foreign("index.html", text), "a page without the policy"
    assert bool(foreign("a.css", "@import 'https://a.org/a.css';"))


def test_every_room_has_a_page_in_the_reference():
    nav = set(re.findall(r"- reference/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())) - {"index"}
    assert nav == {layer.split(".")[0] for layer in LAYERS} - NOT_IN_THE_REFERENCE


def test_the_table_of_rooms_is_that_of_the_imports():
    rows = re.findall(r"^\| `(\w+(?:\.\w+)?)` \| .+ \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [room for room, _ in rows] == [layer or "x2v_jax" for layer in LAYERS]
    programs = ("convert", "infer", "train", "benchmarks", "tools")  # these may touch the whole library
    for room, touched in rows:
        layer = "" if room == "x2v_jax" else room
        if layer in programs:
            assert touched.startswith("the library, ")
            continue
        names = {name for group in re.findall(r"`([\w.{},]+)`", touched) for name in _expanded(group)}
        assert names == set(LAYERS[layer]) - {"errors"}, f"CONTRIBUTING.md's line of {room}"


def _expanded(text: str) -> list[str]:
    """a.{b,c} -> a.b, a.c"""
    match = re.fullmatch(r"(.*)\{(.*)\}", text)
    return [match[1] + name for name in match[2].split(",")] if match else [text]
