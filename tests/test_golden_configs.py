"""Every config file as it resolves, beside a golden file of it: a default that changes shows in review."""

import difflib
import pathlib

import pytest

from x2v_jax.config.flags import load_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("")
    for path in (ROOT / "configs").rglob("*.py")
    if "get_config" in path.read_text()
)
# Of files whose get_config takes one.
ARGUMENTS = {"lightx2v": f":{ROOT / 'tests' / 'golden' / 'lightx2v_input.json'}"}
UPDATE = "pytest tests/test_golden_configs.py --update-golden"


def resolved(name: pathlib.Path) -> str:
    config = load_config(f"{ROOT / 'configs' / name}.py{ARGUMENTS.get(str(name), '')}")
    return config.to_json_best_effort(indent=1, sort_keys=True) + "\n"


@pytest.mark.filterwarnings("ignore:.*LightX2V:UserWarning")
@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_a_config_resolves_to_what_its_golden_file_says(name: pathlib.Path, update_golden: bool):
    golden, text = GOLDEN / f"{name}.json", resolved(name)
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    if not golden.is_file():
        pytest.fail(f"configs/{name}.py has no golden file; write it with: {UPDATE}", pytrace=False)
    before = golden.read_text()
    if text != before:
        changes = difflib.unified_diff(before.splitlines(), text.splitlines(), "golden", "now", n=0, lineterm="")
        head = f"configs/{name}.py resolves to something else; if that is meant: {UPDATE}"
        pytest.fail("\n".join([head, *changes]), pytrace=False)


def test_every_golden_file_belongs_to_a_config(update_golden: bool):
    left = [path for path in GOLDEN.rglob("*.json") if path.relative_to(GOLDEN).with_suffix("") not in CONFIGS]
    if update_golden:
        for path in left:
            path.unlink()
        left = []
    names = ", ".join(str(path.relative_to(ROOT)) for path in left)
    assert not left, f"no config belongs to {names}; remove them with: {UPDATE}"
