"""The parts of a measurement. Each runs in a process of its own, so that what one breaks is whole for the next.

A section is a function of `Settings` that yields rows; a row is written as soon as it is there. An error ends the row
and not the section where `guarded` runs it.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

from benchmarks.gpu.settings import Settings

Row = dict[str, Any]
Group = Literal["kernels", "models"]
_LONGEST_MESSAGE = 600


@dataclasses.dataclass(frozen=True)
class Section:
    """name: of its JSON file. function: "module:function" in this package, called with `arguments` and the settings.

    seconds: what it is given with --quick; 0: it is left out then.
    """

    name: str
    group: Group
    function: str
    seconds: int
    arguments: tuple[str, ...] = ()

    def load(self) -> Callable[[Settings], Iterator[Row]]:
        module, function = self.function.split(":")
        return functools.partial(
            getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function), *self.arguments
        )


def _headline(model: str, size: str, variant: str, seconds: int) -> Section:
    name = "_".join((model, size, variant)).lower().replace("-", "_").replace(".", "_")
    return Section(name, "models", "headline:run", seconds, (model, size, variant))


# What matters most comes first, should time run out. The seconds add up to nine and a half minutes.
SECTIONS = (
    Section("ceilings", "kernels", "ceilings:ceilings", 20),
    Section("attention", "kernels", "attention:attention_rows", 50),
    Section("linear", "kernels", "linear:linear_rows", 45),
    _headline("I2V-14B", "480P", "int8", 60),
    _headline("I2V-14B", "720P", "int8", 110),
    _headline("T2V-1.3B", "480P", "int8", 30),
    _headline("I2V-14B", "480P", "bf16", 60),
    Section("norms", "kernels", "norms:norm_rows", 10),
    Section("stream_1_3b", "models", "streams:stream_rows", 25, ("T2V-1.3B",)),
    Section("stream_14b", "models", "streams:stream_rows", 30, ("T2V-14B",)),
    Section("training_dmd", "models", "training:training_rows", 35, ("dmd",)),
    Section("training_self_forcing", "models", "training:training_rows", 35, ("self_forcing",)),
    # After the same programs were compiled in another process.
    Section("warm_start", "models", "headline:start", 30, ("I2V-14B", "480P", "int8")),
    Section("loading", "models", "loading:loading_rows", 15),
    Section("torch", "kernels", "torch_side:torch_rows", 15),
    # Not with --quick.
    _headline("T2V-1.3B", "480P", "bf16", 0),
    _headline("I2V-14B", "720P", "bf16", 0),
    _headline("I2V-14B", "480P", "fp8", 0),
    _headline("I2V-14B", "720P", "fp8", 0),
    _headline("T2V-1.3B", "480P", "fp8", 0),
)


def section(name: str) -> Section:
    return next(found for found in SECTIONS if found.name == name)


def run(name: str, settings: Settings, command: str) -> int:
    """Runs a section in this process and writes its file after every row. Returns how many rows failed."""
    from benchmarks.reports import circumstances_on_gpu

    path = section_file(settings.out, name)
    report: dict[str, Any] = {"section": name, "about": circumstances_on_gpu(command)}
    report |= {"seed": settings.seed, "rows": [], "quick": settings.quick, "tiny": settings.tiny}
    _write(path, report)
    try:
        for row in section(name).load()(settings):
            report["rows"].append(row)
            _write(path, report)
            print(line(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        report["failed"] = message(error)
        _write(path, report)
    return sum("failed" in row for row in report["rows"]) + ("failed" in report)


def guarded(settings: Settings, about: Row, measure: Callable[[], Row]) -> Row:
    """`about` and what `measure` gives; what it raises is told in the row. Nothing is begun after the deadline."""
    if settings.time_is_up():
        return {**about, "failed": "not run: the time was up"}
    try:
        return {**about, **measure()}
    except Exception as error:
        return {**about, "failed": message(error)}


def message(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"


def line(row: Row) -> str:
    """A row as a line of text."""
    return ", ".join(f"{key} {_text(value)}" for key, value in row.items() if not isinstance(value, dict | list))


def section_file(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / "sections" / f"{name}.json"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: pathlib.Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(path)
