"""From checked settings to a pipeline, and to its compiled programs: the first that imports jax."""

import dataclasses
import os
import pathlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from x2v_jax.cli.interrupts import Interrupts
from x2v_jax.request.resolve import ResolvedRequest, WholePlan

from .settings import Settings, options

if TYPE_CHECKING:
    from x2v_jax.pipeline import Pipeline

# Fields of a request that no program depends on.
_NOT_COMPILED = {
    "prompt": "", "negative_prompt": None, "image": None, "seed": 0, "fps": None, "save_latents": None, "seconds": None,
    "prompt_schedule": (), "initial_noise": None, "text_embeddings": None, "continue_from": None,
}  # fmt: skip


def make_pipeline(settings: Settings) -> "Pipeline":
    """The pipeline that the settings describe, with jax and its compilation cache set up.

    Raises:
        UserError: the device cannot run what they name.
    """
    _set_up_jax(settings.config.compilation_cache)
    from x2v_jax.pipeline import Pipeline

    return Pipeline(settings.checkpoint, loras=settings.loras, compilation_cache="", **options(settings.config))


def _set_up_jax(cache: str) -> None:
    # By default jax takes three quarters of a GPU, and the large models need more; the rest is for CUDA's libraries.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    from x2v_jax.generate.programs import start_cache

    start_cache(cache)


def announce(pipeline: "Pipeline", settings: Settings) -> None:
    """Says what will be made, and warns where memory may not suffice.

    Raises:
        UserError: see `Pipeline.check_memory`.
    """
    import jax

    request = settings.jobs[0].request
    plan, (_, height, width) = pipeline.plan(request), pipeline.output_size(request)
    frames = "endless" if request.endless else f"{request.num_frames} frames of"
    if isinstance(request.plan, WholePlan):
        making = f"{request.num_inference_steps} steps, guidance {request.guidance_scale:g}"
    else:
        making = (
            f"{request.num_inference_steps} steps for each block of {request.plan.block} latent frames, "
            f"{request.plan.mode} window of {request.plan.window}"
        )
    on_host = f" and {plan.host / 1e9:.1f} GB of the host's" if plan.host else ""
    checkpoint, device = settings.checkpoint, jax.devices()[0].device_kind
    print(
        f"{checkpoint.path} ({checkpoint.task} {checkpoint.variant}) on {device}: {frames} {height}x{width}, {making}, "
        f"{settings.config.dtype}; about {plan.peak / 1e9:.1f} GB of memory{on_host}",
        file=sys.stderr,
    )
    if checkpoint.task == "i2v" and (height, width) != (request.height, request.width):
        print(
            f"note: {request.height}x{request.width} is the area, and of this picture's shape that is {height}x{width} "
            "by Wan's published rule, which rounds down; size_rule=exact makes what is asked",
            file=sys.stderr,
        )
    if pipeline.lora_report is not None:
        print(pipeline.lora_report, file=sys.stderr)
    pipeline.check_memory(request)


def warm_up(settings: Settings, interrupts: Interrupts) -> None:
    """`--warmup`: compiles the programs of all videos of the settings into jax's cache and config.compiled_programs.

    Raises:
        UserError: a file cannot be written.
    """
    begin = time.perf_counter()
    pipeline = make_pipeline(settings)
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
    del run["allow_partial"]  # decides numbers, and no program
    return known | own | run | {"progress": _is_watched(settings)}


def _is_watched(settings: Settings) -> bool:
    return bool(settings.config.progress)


def _show(name: str) -> None:
    if sys.stderr.isatty():
        print(f"{_clear()}compiling: {name} …", end="", file=sys.stderr, flush=True)


def _clear() -> str:
    """What takes the progress line away."""
    return "\r\033[K" if sys.stderr.isatty() else ""
