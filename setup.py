"""Builds the wheel: x2v_jax, and in it the programs, config files and models that lie beside it in the repository.

The rest of the package's description is in pyproject.toml. An editable install takes everything where it lies.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = ("infer", "convert", "train")
# 7 MB that only distillation and the 50-step config read: x2v_jax.shipped.missing tells who asks where it is.
LEFT_OUT = ("assets/shapes/transformer.safetensors",)
SHIPPED = (
    "configs/*/*.py",
    "configs/lightx2v.py",
    "assets/*/model.json",
    "assets/*/tokenizer.json",
    "assets/*/*.safetensors",
    "docs/images/first_frame.png",  # that the image-to-video configs begin with
)


class BuildEverything(build_py):
    def run(self) -> None:
        target = pathlib.Path(self.build_lib) / "x2v_jax"
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left there would be in the wheel
        super().run()
        if self.editable_mode:
            return
        for program in PROGRAMS:
            for path in sorted((HERE / program).rglob("*.py")):
                _copy(path, target / "cli" / path.relative_to(HERE))
        for pattern in SHIPPED:
            for path in sorted(HERE.glob(pattern)):
                if path.relative_to(HERE).as_posix() not in LEFT_OUT and path.name != "__init__.py":
                    _copy(path, target / "shipped" / path.relative_to(HERE))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildEverything})
