"""Config files: shipped ones by default, the user's own where the user names one, and what has moved."""

import pathlib
import sys
from typing import Any

import pytest

from x2v_jax import shipped
from x2v_jax.config import load
from x2v_jax.config.flags import parse
from x2v_jax.config.load import load_config
from x2v_jax.errors import UserError

T2V = "configs/shapes/t2v.py"


def own_config(folder: pathlib.Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def inference(prompt: str, module: str = "x2v_jax.config.inference") -> str:
    return f"from {module} import inference_config\ndef get_config():\n    return inference_config(prompt={prompt!r})\n"


def test_the_default_is_shipped_and_what_is_typed_may_be_the_users(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    own_config(tmp_path, inference("mine"), T2V)
    default, typed = (parse(line, default_config=T2V, options={}) for line in ([], [f"--config={T2V}"]))
    assert default.config.prompt == "a red circle moves left" and default.is_shipped
    assert typed.config.prompt == "mine" and not typed.is_shipped
    other = parse(["--config=configs/shapes/i2v.py", "--config.image=a.png"], default_config=T2V, options={})
    assert other.is_shipped and other.is_typed("image") and not other.is_typed("checkpoint")


def test_what_a_users_file_says_counts_as_typed_through_a_shipped_reader(tmp_path: pathlib.Path):
    (tmp_path / "a.json").write_text('{"model_path": "assets/shapes"}')
    line = parse([f"--config=configs/lightx2v.py:{tmp_path / 'a.json'}"], default_config=T2V, options={})
    assert line.config.checkpoint == "assets/shapes" and line.is_typed("checkpoint")


def test_a_config_on_another_takes_the_shipped_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    own_config(tmp_path, "raise SystemExit", "configs/shapes/base.py")
    config: Any = load_config("configs/shapes/i2v_base.py")
    assert config.model.in_dim == 36 and config.task == "flow_matching"


@pytest.mark.parametrize("name", ["inference", "training", "distillation", "flags"])
def test_old_names_work_in_a_clone_and_name_the_new_place(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, f"configs.{name}", raising=False)
    text = f"from configs.{name} import *\n{inference('old')}"
    with pytest.warns(DeprecationWarning, match=rf"configs\.{name} has moved; import x2v_jax\.config\.{name}"):
        config: Any = load_config(own_config(tmp_path, text))
    assert config.prompt == "old"


@pytest.mark.parametrize(
    "line",
    ["from configs.inference import inference_config", "import configs.inference", "from configs import inference"],
)
def test_an_old_name_past_its_release_is_told_the_new_one(
    line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (pathlib.Path(place) / "configs").is_dir()])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "IS_INSTALLED", True)  # so that `configs` is not brought in
    path = own_config(tmp_path, f"import math\n{line}\n{inference('old')}")
    with pytest.raises(UserError) as caught:
        load_config(path)
    advice = f"configs.inference has moved; import x2v_jax.config.inference in line 2 of {path} instead"
    assert str(caught.value) == f"--config={path}: {advice}"
    path = own_config(tmp_path, "from configs.shapes import base\n")
    with pytest.raises(UserError, match=r"with x2v_jax\.config\.load\.load_config\('configs/shapes/base\.py'\)"):
        load_config(path)


def test_another_import_that_fails_is_not_called_moved(tmp_path: pathlib.Path):
    path = own_config(tmp_path, "import no_such_package\nimport configs.shapes.base\n")
    with pytest.raises(UserError, match=r"does not load: ModuleNotFoundError: No module named 'no_such_package'"):
        load_config(path)


def test_configs_holds_config_files_and_the_old_names_alone():
    old = {f"{name.split('.')[1]}.py" for name in load.MOVED}
    assert {p.name for p in (shipped.ROOT / "configs").glob("*.py")} == {"__init__.py", "lightx2v.py"} | old
