"""The wheel from the outside, installed without its dependencies (those are the test's own), in an empty folder.

`.ci/run` does the same in an empty environment: tools/check_wheel.py.
"""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from tools import check_wheel
from x2v_jax import shipped

# Builds a wheel of 19 MB, and makes a video with it: 20 s and more.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    # Without setuptools here, pip fetches it.
    options = ("--no-build-isolation",) if importlib.util.find_spec("setuptools") else ()
    return check_wheel.build(tmp_path_factory.mktemp("wheel"), *options)


@pytest.fixture(scope="module")
def site(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


@pytest.fixture
def x2v(site: pathlib.Path, tmp_path: pathlib.Path):
    def run(*arguments: str, code: int = 0) -> str:
        # -P: the folder of the script, not the working directory, is what an installed script has on its path.
        result = subprocess.run(
            [sys.executable, "-P", str(site / "bin/x2v"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=check_wheel.environment() | {"PYTHONPATH": str(site)},
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout if code == 0 else result.stderr

    return run


def test_it_is_small_and_brings_one_name(wheel: pathlib.Path, site: pathlib.Path):
    assert check_wheel.problems_of(wheel) == []
    assert sorted(p.name for p in site.iterdir() if "dist-info" not in p.name) == ["bin", "x2v_jax"]


def test_it_holds_every_program_model_and_config_of_the_repository(site: pathlib.Path):
    library = site / "x2v_jax"
    for program in ("infer", "convert", "train"):
        files = {p.relative_to(shipped.ROOT) for p in (shipped.ROOT / program).rglob("*.py")}
        assert {p.relative_to(library / "cli") for p in (library / "cli" / program).rglob("*.py")} == files
    ours = {p.relative_to(shipped.ROOT).as_posix() for p in (shipped.ROOT / "assets").rglob("*.*")}
    its = {p.relative_to(library / "shipped").as_posix() for p in (library / "shipped/assets").rglob("*.*")}
    assert ours - its == {"assets/shapes/transformer.safetensors"} and its <= ours


def test_readmes_first_video_is_made_in_a_folder_with_misleading_names(x2v, tmp_path: pathlib.Path):
    check_wheel.decoys(tmp_path)
    assert x2v("infer") == "outputs/a-red-circle-moves-left-seed0.mp4\n"
    assert x2v("infer", "--rerun", "outputs/a-red-circle-moves-left-seed0.mp4", "--config.output=again.mp4")
    again = (tmp_path / "again.mp4").read_bytes()
    assert again == (tmp_path / "outputs/a-red-circle-moves-left-seed0.mp4").read_bytes()
    assert b'"checkpoint": "assets/shapes_t2v_4step"' in again  # where it was found is nobody's business


def test_a_model_that_takes_parts_of_another_and_a_shipped_picture_work(x2v, tmp_path: pathlib.Path):
    x2v(
        "infer", "--config=configs/shapes/i2v.py", "--config.image=docs/images/first_frame.png", "--config.output=a.mp4"
    )
    assert (tmp_path / "a.mp4").is_file() and '"docs/images/first_frame.png"' in (tmp_path / "a.json").read_text()


def test_the_model_that_is_left_out_is_said(x2v):
    for arguments in (
        ("infer", "--config=configs/shapes/t2v_50step.py"),
        ("convert", "export", "assets/shapes", "out", "--layout", "wan"),
    ):
        assert x2v(*arguments, code=2) == (
            "error: assets/shapes/transformer.safetensors is left out of the installed package to keep it small; it "
            "lies in a clone of the project's repository, so give the path of that clone's assets/shapes\n"
        )


def test_an_old_name_in_a_users_config_is_told_the_new_one(x2v, tmp_path: pathlib.Path):
    (tmp_path / "mine.py").write_text("from configs.inference import inference_config\n")
    assert x2v("infer", "--config=mine.py", code=2) == (
        "error: --config=mine.py: configs.inference has moved; import x2v_jax.config.inference in line 1 of mine.py "
        "instead\n"
    )


def test_each_config_file_loads(site: pathlib.Path, tmp_path: pathlib.Path):
    code = (
        "from x2v_jax.config.load import load_config, shipped_configs\n"
        "for name in shipped_configs(): load_config(name)\n"
        "print(len(shipped_configs()))"
    )
    environment = check_wheel.environment() | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len([p for p in (shipped.ROOT / "configs").glob("*/[!_]*.py")])


def test_training_and_conversion_run_from_it_and_say_x2v(x2v):
    assert "in all" in x2v("train", "--config=configs/train/shapes_t2v_dmd.py", "--dry_run")
    assert "x2v infer --config.checkpoint=" in x2v("convert", "inspect", "assets/shapes_causal")
    assert "`x2v convert --help`" in x2v("convert", code=2)
    assert x2v("completion", "words", "zsh", "x2v conv") == "convert\n"
