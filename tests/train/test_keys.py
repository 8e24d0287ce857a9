"""`python -m train --help` speaks of every key that a shipped config has."""

import importlib
import pathlib
import re

import pytest

from train.cli import OPTIONAL_KEYS, main
from train.keys import flat, sections

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAININGS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("train", "shapes")
    for path in sorted((ROOT / "configs" / folder).glob("*.py"))
    if "run_dir" in path.read_text() or (folder == "train" and path.stem != "__init__")
]
MEANINGS = {name: meaning for _, _, meanings in sections() for name, meaning in meanings.items()}


@pytest.mark.parametrize("name", TRAININGS)
def test_every_key_of_a_config_has_a_meaning(name: str):
    keys = {re.sub(r"phases\.\d+", "phases.0", key) for key in flat(importlib.import_module(name).get_config())}
    sizes = ("model.", "text_encoder.", "image_encoder.")
    assert not {key for key in keys if not key.startswith(sizes)} - MEANINGS.keys()


def test_keys_that_configs_leave_out_have_one_too():
    assert OPTIONAL_KEYS.keys() <= MEANINGS.keys()


def test_help_lists_them_with_their_defaults(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in MEANINGS)
    assert re.search(r"ema_decay +of the averaged weights.* \[0\.995\]", said)
    assert re.search(r"dmd\.real_guidance_scale .* \[6\.0\]", said)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config=configs/train/wan_t2v_dmd.py", "--dry-run"],
            "config.teacher is empty; give --config.teacher=FOLDER",
        ),
        ([], "--config=configs/shapes/vae.py` makes it, or give --config.vae=FOLDER"),
        (["--config.vae="], "config.vae is empty"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named_by_its_key(
    arguments: list[str], sentence: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
