"""The documents' recipes work as they are written: what `convert` is told to make is what the configs look for."""

import pathlib
import re
import shlex

import pytest
from small_checkpoints import official_folder, save
from tiny_models import BASE, write_checkpoint

from convert.__main__ import main
from convert.next_command import next_command
from infer.cli import DEFAULT_CONFIG
from infer.settings import read_settings
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.published_schedules import SCHEDULES
from x2v_jax.config import flags
from x2v_jax.config.load import load_config
from x2v_jax.models.config import Schedule

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*/wan_*.py")])
DEFAULTS = {str(load_config(str(path)).checkpoint) for path in ROOT.glob("configs/[bcds]*/wan_*.py")}


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of a program's commands in fenced blocks of a document."""
    lines = "\n".join(re.findall(r"^```bash.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in lines.splitlines()]
    return [line[3:] for line in found if line[:3] == ["python", "-m", program]]


def settings_of(arguments: list[str]):
    return read_settings(flags.parse(arguments, default_config=DEFAULT_CONFIG, options={}, other_names={}))


def published(folder: pathlib.Path) -> None:
    """LightX2V's folder of a distilled model, beside the base weights."""
    made = official_folder(folder)
    save(folder / "distill_models/distill_model.safetensors", made["transformer"])


def test_readmes_commands_for_a_published_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "Wan2.1-T2V-14B")
    text = (ROOT / "README.md").read_text()
    text = text[text.index("## What it is for") : text.index("| you have |")]
    inspected, converted = commands(text, "convert")
    (run,) = commands(text, "infer")
    assert main(inspected) == 0 and main(converted) == 0
    settings = settings_of(run)
    assert settings.checkpoint.path.resolve() == (tmp_path / converted[2]).resolve()
    assert settings.config.prompt == "a fox runs through snow at dusk"
    told = capsys.readouterr().out.splitlines()[-1].removeprefix("run it with: ")
    assert told.startswith(
        f"python -m infer --config=configs/distill/wan_t2v_4step.py --config.checkpoint={converted[2]} "
    )
    assert settings_of(shlex.split(told)[3:]).checkpoint.schedule == SCHEDULES["distill"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_of_full_size_checkpoints_are_those_that_a_config_looks_for(document):
    text = document.read_text()
    for name in re.findall(r"checkpoints/wan_\w+", text):
        assert name in DEFAULTS, f"{document.name} speaks of {name}, which is no config's default"
    if document.suffix == ".py" and (told := re.search(r"convert wan \S+ (\S+)", text)):
        assert told[1] == load_config(str(document)).checkpoint
    for block in re.findall(r"^```bash.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        made = None
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"python -m convert wan \S+ (\S+)", line):
                made = match[1]
            config = re.match(r"python -m infer --config=(configs/(?!shapes)\S+?\.py)\s", line)
            if made and config and "--config.checkpoint" not in line and "4step_lora" not in line:
                assert load_config(str(ROOT / config[1])).checkpoint == made, line


@pytest.mark.parametrize(
    ("image", "schedule", "config"),
    [
        (False, SCHEDULES["t2v_1_3b"], "base/wan_t2v_1_3b"),
        (False, SCHEDULES["t2v_14b"], "base/wan_t2v_14b"),
        (True, SCHEDULES["i2v_720p"], "base/wan_i2v_720p"),
        (True, SCHEDULES["distill"], "distill/wan_i2v_4step"),
        (False, SCHEDULES["causvid"], "causvid/wan_t2v_causvid"),
        (False, SCHEDULES["self_forcing"], "self_forcing/wan_t2v_self_forcing"),
        (False, BASE, None),
    ],
)
def test_the_next_command_has_the_config_that_agrees_with_the_checkpoint(tmp_path, image, schedule: Schedule, config):
    fragments = schedule.causal is not None and schedule.causal.mode == "fragments"
    changes = {"variant": "causvid"} if fragments else None
    path = write_checkpoint(tmp_path / "it is", image=image, schedule=schedule, changes=changes)
    command = next_command(path)
    assert command is not None
    given = "" if config is None else f"--config=configs/{config}.py "
    assert command.startswith(f"python -m infer {given}--config.checkpoint='{path}' ")
    assert ("--config.image=FILE" in command) == image
    if not image:
        assert settings_of(shlex.split(command)[3:]).checkpoint.schedule == schedule


def test_what_cannot_run_yet_gets_no_command(tmp_path, capsys):
    official_folder(tmp_path / "src")
    assert main(["wan", str(tmp_path / "src"), str(tmp_path / "out"), "--component", "vae"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    assert next_command(tmp_path / "out") is None
    assert open_checkpoint(tmp_path / "out").task is None
