"""The shape of the house: every file in one layer, no import that its layer may not, and nothing that goes round."""

import ast
import functools
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("x2v_jax", "configs", "convert", "infer", "train", "benchmarks", "tools")

# Layer -> layers that it may import, besides itself. A file is in the layer with the longest name that begins its own.
# From the bottom up: nothing may import a layer that stands further down in this table, so that no arrow runs upward.
_CHECKPOINT = ("checkpoint.files", "checkpoint.names", "checkpoint.quantize", "checkpoint.native")
_DRAWERS = (*_CHECKPOINT, "checkpoint.published", "checkpoint.lora", "checkpoint.conversion")
_LIBRARY = (
    "errors", "shipped", "cli", "models.config", "ops", "models", "diffusion", "parallel", *_DRAWERS, "request",
    "memory", "media", "generate", "pipeline",
)  # fmt: skip
LAYERS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "shipped": ("errors",),
    "config": ("errors", "shipped"),
    "cli": ("errors", "shipped", "config"),  # loads the programs by their names
    "ops": ("errors",),
    "models.config": ("errors",),
    "models": ("errors", "ops", "models.config"),
    "diffusion": ("errors", "ops", "models.config", "models"),
    "parallel": ("errors",),
    "checkpoint": (),  # its drawers:
    "checkpoint.files": ("errors",),
    "checkpoint.names": ("errors", "models.config"),
    "checkpoint.quantize": ("errors", "shipped", "models.config", "checkpoint.files", "checkpoint.names"),
    "checkpoint.native": (
        "errors", "shipped", "models.config", "checkpoint.files", "checkpoint.names", "checkpoint.quantize",
    ),
    "checkpoint.published": ("errors", "shipped", "models.config", *_CHECKPOINT),
    "checkpoint.lora": ("errors", "shipped", "models.config", *_CHECKPOINT),
    "checkpoint.conversion": (
        "errors", "shipped", "models.config", *_CHECKPOINT, "checkpoint.published", "checkpoint.lora",
    ),
    "media": ("errors", "shipped", "checkpoint.files"),
    "request": ("errors", "shipped", "ops", "models.config", "models", "diffusion", "checkpoint.files", "media"),
    "memory": ("errors", "shipped", "models.config", "models", "diffusion", "checkpoint.native", "media", "request"),
    "generate": (
        "errors", "shipped", "ops", "models.config", "models", "diffusion", *_CHECKPOINT, "checkpoint.lora", "request",
        "memory", "media",
    ),
    "pipeline": (
        "errors", "diffusion", "checkpoint.native", "checkpoint.lora", "media", "request", "memory", "generate",
    ),
    "": ("errors", "shipped", "media", "request", "generate", "pipeline"),  # x2v_jax itself: the public names
    "video": ("media",),  # the old place of media.video, for one release
    "configs": ("config", "errors"),
    "__main__": ("cli",),
    "convert": (*_LIBRARY, "config", ""),
    "infer": (*_LIBRARY, "config", ""),
    "train": (*_LIBRARY, "config", ""),
    "benchmarks": (*_LIBRARY, "config", "", "configs", "convert", "infer", "train", "cases"),
    "tools": (*_LIBRARY, "config", ""),
}  # fmt: skip


def layer_of(module: str) -> str | None:
    """The layer of a module; None where no line of the table speaks of it."""
    if module.startswith("tests.reference.cases_lib"):
        return "cases"
    if module == "x2v_jax":
        return ""
    name = module.removeprefix("x2v_jax.")
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (candidate := ".".join(parts[:count])) in LAYERS:
            if candidate == "checkpoint" != name:  # its drawers are layers, and there is nothing between them
                return None
            # Of the packages above the library, only whole ones are layers; of the library, "x2v_jax." stands before.
            is_library = module.startswith("x2v_jax.")
            return candidate if is_library == (candidate.split(".")[0] not in PACKAGES) else None
    return None


def modules_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    found = {}
    for path in (path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def _import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(module: str, source: str, known: set[str], *, is_package: bool = False) -> set[str]:
    """Modules of the project that a text imports, anywhere in it; `from a import b` counts as a.b if that is one."""
    found: set[str] = set()
    for node in _import_statements(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES or name.startswith("tests.reference.cases_lib")}


def violations(sources: dict[str, str], packages: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """What the modules of `sources` (name -> text) do that the table forbids, a line each."""
    problems, known = [], set(sources)
    arrows: dict[str, set[str]] = {}
    for module, text in sources.items():
        layer = layer_of(module)
        if layer is None:
            problems.append(f"{module} is in no layer; put it into a room, or give its room a line in LAYERS")
            continue
        arrows[module] = imports_of(module, text, known, is_package=module in packages) - {module}
        for name in sorted(arrows[module]):
            other = layer_of(name)
            if other != layer and other not in LAYERS[layer]:
                problems.append(f"{module} ({layer or 'x2v_jax'}) imports {name} ({other}), which its layer may not")
    # A package's own __init__ hands on what lies in it; what imports the package does not come round through that.
    try:
        graphlib.TopologicalSorter({m: a for m, a in arrows.items() if m not in packages}).prepare()
    except graphlib.CycleError as error:
        problems.append(f"a circle: {' -> '.join(error.args[1])}")
    return problems


def _sources() -> tuple[dict[str, str], set[str]]:
    modules = modules_of(ROOT)
    return {m: p.read_text() for m, p in modules.items()}, {m for m, p in modules.items() if p.stem == "__init__"}


def test_every_file_is_in_a_layer_and_imports_what_its_layer_may():
    problems = violations(*_sources())
    assert not problems, "\n" + "\n".join(problems)


def test_the_table_itself_runs_one_way():
    order = list(LAYERS)
    for layer, allowed in LAYERS.items():
        upward = [name for name in allowed if name in order and order.index(name) >= order.index(layer)]
        assert not upward, f"{layer} may import {upward}, which stand above it"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("x2v_jax.ops.choice", "from x2v_jax import pipeline"),
        ("x2v_jax.models.functional", "from x2v_jax import pipeline"),
        ("x2v_jax.ops.choice", "from x2v_jax.checkpoint.native import reader"),
        ("x2v_jax.checkpoint.files.arrays", "from x2v_jax.request import Request"),
        ("x2v_jax.checkpoint.native.reader", "from x2v_jax.checkpoint.published import select"),
        ("x2v_jax.media.video", "import x2v_jax.generate.clock"),
        ("x2v_jax.request.checks", "from ..memory import predict"),
        ("train.logs", "from benchmarks.tiny_world import quality"),
        ("infer.cli", "import train.loop"),
        ("configs.shapes.t2v", "from infer import settings"),
        ("x2v_jax.generate.clock", "def late():\n    from x2v_jax.pipeline import Pipeline"),
    ],
)
def test_an_import_that_runs_upward_is_seen(module: str, line: str):
    sources, packages = _sources()
    before = violations(sources, packages)
    after = violations(sources | {module: f"{sources[module]}\n{line}\n"}, packages)
    assert [p for p in after if p not in before], f"nothing was said of {line!r} in {module}"


def test_a_circle_closed_for_the_type_checker_alone_is_seen():
    sources = {
        "x2v_jax.media.image": "from x2v_jax.media import video",
        "x2v_jax.media.video": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from x2v_jax.media import image"
        ),
    }
    assert any(problem.startswith("a circle") for problem in violations(sources))


def test_a_file_in_no_room_is_seen():
    assert violations({"x2v_jax.helpers": ""}) and violations({"x2v_jax.checkpoint.stray": ""})


def test_the_top_of_the_library_has_few_names():
    shims = {"video.py"}  # of one release
    top = {p.name for p in (ROOT / "x2v_jax").iterdir() if not p.name.startswith("__") and p.name != "py.typed"} - shims
    assert len(top) <= 14, sorted(top)
    drawers = {p.name for p in (ROOT / "x2v_jax/checkpoint").iterdir() if not p.name.startswith("__")}
    assert len(drawers) <= 8, sorted(drawers)
