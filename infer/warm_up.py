"""`python -m infer --warmup`: compiles what the videos need and makes none. And the file of compiled programs."""

import dataclasses
import pathlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.request.resolve import ResolvedRequest

from . import start
from .settings import Settings, options

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline

# Fields of a request that no program depends on.
_NOT_COMPILED = {
    "prompt": "", "negative_prompt": None, "image": None, "seed": 0, "fps": None, "save_latents": None, "seconds": None,
    "prompt_schedule": (), "initial_noise": None, "text_embeddings": None, "continue_from": None,
}  # fmt: skip


def run(settings: Settings, interrupts: Interrupts) -> None:
    """Compiles the programs of all videos of the settings into jax's cache and into config.compiled_programs.

    Raises:
        UserError: a file cannot be written.
    """
    begin = time.perf_counter()
    pipeline = start.pipeline(settings)
    import jax

    from x2v_jax.generate import programs

    usual, file = jax.config.jax_compilation_cache_dir, settings.config.compiled_programs
    if file:
        programs.check_writable(file)
    folder = programs.fresh_cache() if file else None
    count = 0
    for request in _different(pipeline, settings):
        for name, seconds in pipeline.warm_up(request, watched=_is_watched(settings), on_start=_show):
            count += 1
            print(f"{_clear()}{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    if file and folder:
        total = programs.save(file, folder, programs.identity(_config(pipeline, settings)))
        megabytes = pathlib.Path(file).expanduser().stat().st_size / 1e6
        print(f"{file}: {total} programs, {megabytes:.1f} MB", flush=True)
        for entry in folder.iterdir() if usual else ():
            shutil.copy(entry, usual)
    where = f"; they are in {usual}" if usual else ""
    print(f"{count} programs compiled in {time.perf_counter() - begin:.1f} s{where}", file=sys.stderr)


def take_programs(pipeline: "Pipeline", settings: Settings) -> None:
    """Puts the programs of config.compiled_programs where jax finds them; warns where they are for something else."""
    if not settings.config.compiled_programs:
        return
    import jax

    from x2v_jax.generate import programs

    usual = jax.config.jax_compilation_cache_dir
    folder = pathlib.Path(usual) if usual else programs.fresh_cache()
    wanted = programs.identity(_config(pipeline, settings))
    programs.install(settings.config.compiled_programs, folder, wanted)


def _different(pipeline: "Pipeline", settings: Settings) -> list[ResolvedRequest]:
    """One request of each kind that has programs of its own."""
    kinds: dict[Any, ResolvedRequest] = {}
    for job in settings.jobs:
        plain = dataclasses.replace(job.request.completed, **_NOT_COMPILED)
        kinds.setdefault((plain, pipeline.output_size(job.request)), job.request)
    return list(kinds.values())


def _config(pipeline: "Pipeline", settings: Settings) -> dict[str, Any]:
    """What decides which programs a run has, of its first video."""
    request, checkpoint = settings.jobs[0].request, settings.checkpoint
    known: dict[str, Any] = {"task": checkpoint.task}
    for name in checkpoint.components:
        if name != "tokenizer":
            sizes = dataclasses.asdict(checkpoint.config(name)) | {"quantization": checkpoint.quantization(name)}
            known |= {f"{name}.{field}": value for field, value in sizes.items()}
    frames, height, width = pipeline.output_size(request)
    own = {name: value for name, value in dataclasses.asdict(request.completed).items() if name not in _NOT_COMPILED}
    own |= {"height": height, "width": width, "num_frames": frames if checkpoint.schedule.causal is None else None}
    run = options(settings.config) | {"allow_mismatch": None, "memory_limit": None}
    return known | own | run | {"progress": _is_watched(settings)}


def _is_watched(settings: Settings) -> bool:
    return settings.config.progress or settings.config.denoising_loop == "steps"


def _show(name: str) -> None:
    if sys.stderr.isatty():
        print(f"{_clear()}compiling: {name} …", end="", file=sys.stderr, flush=True)


def _clear() -> str:
    """What takes the progress line away."""
    return "\r\033[K" if sys.stderr.isatty() else ""
