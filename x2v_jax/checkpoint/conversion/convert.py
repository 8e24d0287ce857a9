"""Converts published checkpoints to the native format, streaming: one layer's tensor in memory at a time."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.conversion.plan import Plan, make_plan
from x2v_jax.checkpoint.files.hashing import HashThread
from x2v_jax.checkpoint.native.writer import (
    MODEL_FILE,
    check_destination,
    complete_folder,
    copy_tokenizer,
    write_component,
    write_model_json,
)
from x2v_jax.checkpoint.quantize.calibration import ABOUT
from x2v_jax.errors import UserError
from x2v_jax.shipped import VERSION

__all__ = ["ConversionOptions", "Progress", "convert"]

Progress = Callable[[int, int], None]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: ConversionOptions | None = None,
    on_progress: Progress = lambda done, total: None,
) -> tuple[str, ...]:
    """Converts a published checkpoint, or a native one to other types.

    Args:
        source: a folder or file in any layout that `published.layouts.recognise` knows.
        destination: the folder to make. It appears only when everything in it is complete.
        on_progress: called with bytes written and bytes in all.

    Returns:
        Sentences for the user about what was done and is not obvious.

    Raises:
        UserError: the destination exists, the source is not usable (every difference is named), it is not clear which
            variant is meant, NaN or infinity is found, or the disk is full. Nothing is left at the destination.
    """
    options = options or ConversionOptions()
    check_destination(pathlib.Path(destination), options.overwrite)
    plan = make_plan(source, options, destination)
    loras = [pathlib.Path(path) for path, _ in options.loras]
    recorded = [plan.calibration.path] if plan.calibration is not None else []
    _check_nothing_needed_is_replaced(pathlib.Path(destination), plan, [*loras, *recorded])
    with (
        complete_folder(pathlib.Path(destination), overwrite=options.overwrite, nbytes=plan.nbytes) as folder,
        HashThread([*plan.source_files, *loras, *recorded]) as hashes,
    ):
        entries = _write(plan, folder, on_progress)
        bad = ", ".join(plan.findings.nonfinite)
        if bad and not options.allow_nonfinite:
            raise UserError(f"NaN or infinity in {bad}; download the file again, or keep them with --allow-nonfinite")
        results = hashes.results()
        provenance: dict[str, Any] = {
            "sources": [{"file": _relative(f, plan.layout.path), **results[f]} for f in plan.source_files],
            "command": options.command,
            "version": VERSION,
            "loras": [
                *plan.earlier_loras,
                *(
                    {"file": path.name, "sha256": results[path]["sha256"], "strength": strength}
                    for path, (_, strength) in zip(loras, options.loras, strict=True)
                ),
            ],
        }
        if plan.earlier_calibration is not None:
            provenance["calibration"] = plan.earlier_calibration
        if plan.calibration is not None:
            file, about = plan.calibration.path, plan.calibration.about
            provenance["calibration"] = {
                "file": file.name,
                "sha256": results[file]["sha256"],
                **{name: about[name] for name in ABOUT if name in about},
            }
        write_model_json(
            folder,
            task=plan.task,
            variant=plan.variant,
            schedule=plan.schedule,
            components=entries,
            provenance=provenance,
            quantization=plan.quantizations,
            smoothing=plan.smoothing,
        )
    return plan.notes + ((f"NaN or infinity kept in {bad}",) if bad else ())


def _check_nothing_needed_is_replaced(destination: pathlib.Path, plan: Plan, others: list[pathlib.Path]) -> None:
    """Raises a UserError where the destination holds what is read, or what the result would refer to."""
    there = pathlib.Path(os.path.realpath(destination))
    for file in (*plan.source_files, *others):
        if there in pathlib.Path(os.path.realpath(file)).parents:
            raise UserError(
                f"{destination} holds {file.name}, which is read for the result; choose another destination, and "
                "remove this one afterwards if it is not needed"
            )
    for component, target in plan.references.items():
        if pathlib.Path(os.path.realpath(destination / target)) == there:
            raise UserError(
                f"{destination} holds the {component} that the result would refer to; choose another destination"
            )
    for user, component in _users(there):
        if component not in plan.opened and not (component == "tokenizer" and plan.tokenizer):
            raise UserError(
                f"{user} takes its {component} from {destination}, and the result would have none; choose another "
                "destination"
            )


def _users(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """Converted checkpoints beside a folder that refer to it, and for which component."""
    for file in sorted(folder.parent.glob(f"*/{MODEL_FILE}")) if folder.is_dir() else ():
        try:
            components = json.loads(file.read_text())["components"]
            targets = {name: entry.get("reference") for name, entry in components.items()}
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # damaged: whoever runs it is told
        for component, target in targets.items():
            if isinstance(target, str) and pathlib.Path(os.path.realpath(file.parent / target)) == folder:
                yield file.parent, component


def _write(plan: Plan, folder: pathlib.Path, on_progress: Progress) -> dict[str, Any]:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, plan.nbytes)

    entries: dict[str, Any] = {
        component: write_component(
            folder,
            component,
            plan.opened[component].config,
            streams,
            quantization=plan.quantizations.get(component),
            smoothed=component in plan.smoothing,
            on_bytes=on_bytes,
        )
        for component, streams in plan.streams.items()
    }
    entries |= {component: {"reference": target} for component, target in plan.references.items()}
    if plan.tokenizer is not None:
        entries["tokenizer"] = copy_tokenizer(plan.tokenizer, folder)
    return entries


def _relative(file: pathlib.Path, root: pathlib.Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) and file != root else file.name
