"""What the shells are offered: by the function that they ask, and by real shells."""

import os
import pathlib
import select
import shutil
import subprocess
import sys
import time

import pytest

from x2v_jax.cli.completion import words

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x2v con", ["convert"]),
        ("x2v completion ", ["bash", "zsh"]),
        ("x2v infer --config=configs/shapes/t2v_c", ["t2v_causal", "t2v_causvid"]),
        ("x2v train --config configs/train/wan_t2v", ["configs/train/wan_t2v_dmd.py"]),
        ("x2v infer --config.seeds", []),
        ("x2v infer --config.se", ["--config.seconds=", "--config.seed=", "--config.sequential_guidance="]),
        ("x2v infer --re", ["--rerun="]),
        ("x2v train --config=configs/train/wan_t2v_dmd.py --config.dmd.t", ["--config.dmd.timestep_shift="]),
        ("x2v train --config.caption", ["--config.caption_dropout="]),
        ("x2v train --config=nowhere.py --config.", []),
        ("x2v convert ex", ["export", "extract-lora"]),
        ("x2v convert wan --smooth", ["--smooth", "--smooth-alpha"]),
        ("x2v prepare lmdb --t", ["--timesteps"]),
        ("x2v nothing ", []),
        ("x2v infer --config.prompt='a ", []),
        ("x2v infer --config.image=", []),  # file names
    ],
)
def test_words_that_may_follow(line: str, expected: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = words(line)
    if "=configs/shapes" in line:
        expected = [f"--config=configs/shapes/{name}.py" for name in expected]
    assert found == expected


def test_config_files_of_the_user_are_offered_too(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/one.py").touch()
    (tmp_path / "mine/other.txt").touch()
    assert words("x2v infer --config=mi") == ["--config=mine/"]
    assert words("x2v infer --config=mine/") == ["--config=mine/one.py"]


def test_bash_gets_what_comes_behind_the_last_place_where_it_cuts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert words("x2v infer --config=configs/shapes/t2v_50", shell="bash") == ["configs/shapes/t2v_50step.py"]
    assert words("x2v infer --config=configs/lightx2v", shell="bash") == ["configs/lightx2v.py:"]


def program(folder: pathlib.Path) -> dict[str, str]:
    """An environment in which `x2v` is this clone's."""
    (script := folder / "x2v").write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from x2v_jax.cli import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x2v con", ["convert"]),
        ("x2v infer --config=configs/shapes/t2v_50", ["configs/shapes/t2v_50step.py"]),
        ("x2v infer --config.seed", ["--config.seed="]),
        ("x2v infer --config.image=some.", []),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: pathlib.Path):
    # What bash does at the tab key: it cuts the line into words at blanks and =, and calls the registered function.
    script = """
eval "$(x2v completion bash)" || exit 1
complete -p x2v | grep -q -- '-o default -F _x2v x2v' || exit 1
COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDS=(${1//=/ = }) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { printf 'option %s\\n' "$2"; }
_x2v x2v "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    result = subprocess.run(
        ["bash", "-c", script, "bash", line], env=program(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [found for found in lines if found and not found.startswith("option")] == expected
    assert ("option nospace" in lines) == any(found.endswith("=") for found in expected)


def test_a_bash_in_a_terminal_completes_at_the_tab_key(tmp_path: pathlib.Path):
    ours, its = os.openpty()
    environment = program(tmp_path) | {"PS1": "READY> ", "TERM": "dumb"}
    bash = subprocess.Popen(
        ["bash", "--noprofile", "--norc", "-i"], stdin=its, stdout=its, stderr=its, env=environment, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip

    def type_and_wait(keys: str, for_text: str) -> str:
        os.write(ours, keys.encode())
        shown, end = "", time.monotonic() + 120
        while for_text not in shown and time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 4096).decode()
        assert for_text in shown, f"{keys!r} showed {shown!r}"
        return shown

    try:
        type_and_wait("", "READY> ")
        type_and_wait('eval "$(x2v completion bash)"; PS1="DO> "\n', "\r\nDO> ")
        type_and_wait("x2v compl\t", "x2v completion ")
        type_and_wait("z\t\n", "#compdef x2v")
        type_and_wait("\nx2v infer --config=configs/shapes/t2v_50\t", "t2v_50step.py")
    finally:
        bash.kill()
        bash.wait()
        os.close(ours)
        os.close(its)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_its_script(tmp_path: pathlib.Path):
    script = 'autoload -U compinit; compinit -u; eval "$(x2v completion zsh)"; print $_comps[x2v]'
    result = subprocess.run(
        ["zsh", "-fc", script], env=program(tmp_path) | {"ZDOTDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "_x2v", result.stderr
