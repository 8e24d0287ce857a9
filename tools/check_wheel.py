"""Builds the wheel, installs it into an empty environment, and uses it in a folder that has nothing of the repository.

    python tools/check_wheel.py

The folder holds what could be mistaken for the project's own: train/, configs/, convert.py and a model of the default's
name. Exit code 1 if anything fails.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv
import zipfile

_ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_BYTES = 20_000_000
# What a user does with it -> what is there, or is printed, afterwards. In this order.
COMMANDS = (
    (("--version",), "x2v "),
    (("infer", "--config.output=default.mp4"), "default.mp4"),
    (("convert", "export", "assets/shapes_causal", "exported", "--layout", "wan"), "wrote exported"),
    (("convert", "wan", "exported", "converted", "--quantize", "int8"), "wrote converted"),
    (("convert", "inspect", "converted"), "x2v infer --config.checkpoint=converted"),
    (("train", "--config=configs/train/shapes_i2v_dmd.py", "--dry_run"), "in all"),
    (("prepare", "--help"), "x2v prepare"),
    (("completion", "bash"), "complete -o default"),
)


def build(folder: pathlib.Path, *options: str) -> pathlib.Path:
    """Makes the wheel in `folder`; `options` are pip's."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *options]
    subprocess.run([*command, str(_ROOT)], check=True)
    (wheel,) = folder.glob("x2v_jax-*.whl")
    return wheel


def problems_of(wheel: pathlib.Path) -> list[str]:
    """What is wrong with a wheel's size and names."""
    problems = []
    if (size := wheel.stat().st_size) > MOST_BYTES:
        problems.append(f"{wheel.name} has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    if others := sorted(top for top in tops if top != "x2v_jax" and not top.endswith(".dist-info")):
        problems.append(f"{wheel.name} would put {', '.join(others)} into site-packages")
    return problems


def decoys(folder: pathlib.Path) -> None:
    """Puts files into a user's folder that have names of the project's own."""
    for name in ("train", "configs", "configs/shapes", "infer", "assets/shapes_t2v_4step"):
        (folder / name).mkdir(parents=True)
    for name in (
        "train/__init__.py",
        "configs/__init__.py",
        "configs/shapes/t2v.py",
        "infer/__init__.py",
        "convert.py",
    ):
        (folder / name).write_text("raise SystemExit('a file of the user ran')\n")
    (folder / "assets/shapes_t2v_4step/model.json").write_text("{}")


def environment() -> dict[str, str]:
    """This process's without what would show it the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        wheel = build(place)
        problems = problems_of(wheel)
        venv.create(place / "venv", with_pip=True)
        scripts = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
        begin = time.monotonic()
        subprocess.run([scripts / "python", "-m", "pip", "install", "--quiet", wheel], check=True, env=environment())
        print(f"installed {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, in {time.monotonic() - begin:.0f} s")
        (folder := place / "empty").mkdir()
        decoys(folder)
        for arguments, expected in COMMANDS:
            begin = time.monotonic()
            result = subprocess.run(
                [scripts / "x2v", *arguments], cwd=folder, capture_output=True, text=True, env=environment()
            )
            is_right = result.returncode == 0 and expected in result.stdout
            seconds = time.monotonic() - begin
            print(f"{'ok    ' if is_right else 'FAILED'} {seconds:6.1f} s  x2v {' '.join(arguments)}", flush=True)
            if not is_right:
                problems.append(f"x2v {' '.join(arguments)}: {result.stdout[-2000:]}{result.stderr[-4000:]}")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
