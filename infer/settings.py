"""From a parsed command line to the videos to make, checked as far as possible without jax."""

import dataclasses
import pathlib
import re
import tempfile
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.lora.arguments import distilling, lora_pairs
from x2v_jax.checkpoint.native.reader import NativeCheckpoint, open_checkpoint
from x2v_jax.checkpoint.native.writer import MODEL_FILE
from x2v_jax.config import flags
from x2v_jax.config.inference import KEYS, LENGTHS
from x2v_jax.errors import UserError
from x2v_jax.request import Request
from x2v_jax.request import options as run_options
from x2v_jax.request.inputs import InputFiles
from x2v_jax.request.resolve import ResolvedRequest, resolve

from . import rerun
from .asked import EXISTING, Asked, asked_videos, is_there

Config = Any  # a ConfigDict, whose keys have no types before it runs

_MAX_VIDEOS = 100_000
_SUFFIXES = (".mp4", ".gif", ".webp", ".png")
_ENDINGS = ".mp4, .gif or .webp, or .png for one frame"


@dataclasses.dataclass(frozen=True)
class Job:
    """One video: its request, decided, and where it goes: a folder and a name, and its suffix."""

    request: ResolvedRequest
    folder: pathlib.Path
    stem: str
    suffix: str = ".mp4"

    @property
    def path(self) -> pathlib.Path:
        return self.folder / f"{self.stem}{self.suffix}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a run needs.

    jobs: the videos to make. skipped: how many others are there already.
    inputs: path -> SHA-256 of the files that decide the result.
    """

    config: Config
    checkpoint: NativeCheckpoint
    loras: tuple[tuple[str, float], ...]
    jobs: tuple[Job, ...]
    inputs: dict[str, str]
    skipped: int = 0


def read_settings(line: flags.CommandLine) -> Settings:
    """The run that a command line describes.

    Raises:
        UserError: something in it cannot be done.
    """
    recorded: rerun.Recorded | None = None
    config: Config = line.config
    if "rerun" in line.options:
        if line.config_file is not None:
            raise UserError(
                "--rerun takes its settings from the video; leave --config out (--config.KEY=… still counts)"
            )
        recorded = rerun.read(line.options["rerun"])
        config = recorded.config(line.overrides)
    if any(name in line.overrides for name in LENGTHS):
        for name in LENGTHS:
            if name not in line.overrides:
                config[name] = False if name == "endless" else None
    if "prompt" in line.overrides and "prompt_file" in line.overrides:
        raise UserError("config.prompt and config.prompt_file are both given; leave one out")
    _check(config)
    if line.options.get("overwrite") or config.overwrite:
        config.existing = "overwrite"
    _find_files(line, config)
    checkpoint = open_checkpoint(config.checkpoint)
    if config.task is not None and checkpoint.task != config.task:
        raise UserError(
            f"config.task is {config.task!r}, but {checkpoint.path} is a {checkpoint.task} checkpoint; choose the "
            "config that belongs to it, or another checkpoint"
        )
    loras = _loras(config)
    jobs, skipped = _jobs(config, checkpoint, loras)
    for component in checkpoint.components:  # headers and names only: a damaged file is said before jax is imported
        _ = checkpoint.tokenizer_file() if component == "tokenizer" else checkpoint.tensors(component)
    files = _open_inputs(jobs) | {path: None for path, _ in loras}
    inputs = {path: rerun.sha256(pathlib.Path(path)) for path in files}
    if recorded is not None:
        recorded.warn_of_changes(inputs, checkpoint)
    return Settings(config, checkpoint, loras, jobs, inputs, skipped)


def _open_inputs(jobs: tuple[Job, ...]) -> dict[str, None]:
    """The files that the videos name. Each kind of them is opened, so that none ends the run on its way."""
    opened: set[tuple[Any, ...]] = set()
    paths: dict[str, None] = {}
    for job in jobs:
        named = tuple(getattr(job.request.completed, name) for name in rerun.INPUTS)
        if named not in opened:
            job.request.open_inputs()
            opened.add(named)
            paths |= dict.fromkeys(path for path in named if path)
    return paths


def options(config: Config) -> dict[str, Any]:
    """The pipeline's options that a config has."""
    return {name: config[name] for name in run_options.RunOptions.names()}


def checkpoint_digest(checkpoint: NativeCheckpoint) -> str:
    """Tells checkpoints apart cheaply: model.json lists the digests of the sources."""
    return rerun.sha256(checkpoint.path / MODEL_FILE)


def _check(config: Config) -> None:
    if lacking := [key.name for key in KEYS if key.name not in config]:
        raise UserError(
            f"--config: it lacks {', '.join(lacking[:3])} and so is no inference config; "
            f"`{shipped.command('train')}` takes those for training"
        )
    problems = [f"config.{problem}" for problem in run_options.problems(options(config))]
    if not isinstance(config.num_videos, int) or not 1 <= config.num_videos <= _MAX_VIDEOS:
        problems.append(f"config.num_videos is {config.num_videos!r}; give a whole number from 1 to {_MAX_VIDEOS}")
    if config.seed is not None and config.seed < -1:
        problems.append(f"config.seed is {config.seed}; give 0 to 2^64 - 1, or -1 to draw one")
    if config.existing not in EXISTING:
        problems.append(f"config.existing is {config.existing!r}; give one of {', '.join(EXISTING)}")
    if config.existing == "skip" and config.seed == -1:
        problems.append(
            "config.existing is 'skip' and config.seed is -1, which draws other seeds each time; give a seed"
        )
    if config.task not in (None, "t2v", "i2v"):
        problems.append(f"config.task is {config.task!r}; give 't2v' or 'i2v'")
    if not config.output:
        problems.append("config.output is empty; give an .mp4 file or a folder")
    if len(problems) > 1:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if problems:
        raise UserError(problems[0])


def _find_files(line: flags.CommandLine, config: Config) -> None:
    """Turns names of what is shipped into paths: the shipped model and picture are found from anywhere.

    What a video recorded is a path already.
    """
    for name in ("checkpoint", "image"):
        if config[name] and (name in line.overrides or "rerun" not in line.options):
            config[name] = shipped.locate(config[name], typed=line.is_typed(name))


def _loras(config: Config) -> tuple[tuple[str, float], ...]:
    loras = lora_pairs(config.lora, "config.lora", typed=True)
    for path, _ in loras:
        if not pathlib.Path(path).is_file():
            raise UserError(f"config.lora: {path!r} is no file; mend the path")
    return loras


def _jobs(
    config: Config, checkpoint: NativeCheckpoint, loras: tuple[tuple[str, float], ...]
) -> tuple[tuple[Job, ...], int]:
    """The videos that are to be made, and how many of those that are asked for are there already."""
    asked = asked_videos(config)
    shared = {name: config[name] for name in Request.field_names() if name in config}
    shared["prompt_schedule"] = _prompt_schedule(config.prompt_schedule)
    total = len(asked)
    if config.endless and total > 1:
        raise UserError(f"config.endless is True for {total} videos, and the first has no end; give seconds instead")
    jobs, files = [], InputFiles()
    anyway = {"has_loras": bool(loras), "distilled_by": distilling(loras), "allow_mismatch": config.allow_mismatch}
    skipped = 0
    for number, video in enumerate(asked, 1):
        latents = _numbered_latents(config, number, total)
        fields = shared | {"prompt": video.text, "save_latents": latents} | dict(video.fields)
        try:
            request = resolve(Request(**fields), checkpoint, files=files, **anyway)
        except UserError as error:
            raise UserError(f"{video.where}: {error}") from None if video.where else error
        place = _place(config.output, request, number, total, config.prompt_file is not None, video)
        job = Job(request, *place)
        if job.suffix == ".png" and request.num_frames != 1:
            raise UserError(f"config.output is {config.output!r}, one picture; give num_frames=1, or a name in .mp4")
        if job.suffix != ".mp4" and checkpoint.schedule.causal is not None:
            raise UserError(f"{job.path} is to be made block by block, and that goes into an .mp4; give such a name")
        if config.existing == "skip" and is_there(job.path, request.completed):
            skipped += 1
        else:
            jobs.append(job)
    for folder in {job.folder for job in jobs}:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"config.output: {folder} is a file, not a folder; choose another place")
        _check_writable("output", folder)
    if config.save_latents is not None:
        _check_writable("save_latents", pathlib.Path(config.save_latents).parent)
    return tuple(jobs), skipped


def _check_writable(key: str, folder: pathlib.Path) -> None:
    """Asks before the work and not after it whether files can be made in a folder, or the folder itself can be."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"config.{key}: {folder} cannot be written to ({error.strerror}); choose another place"
        ) from None


def _prompt_schedule(value: Any) -> Any:
    """Pairs of second and prompt as they are, or from a text such as "5: a cat sits; 10: a cat runs"."""
    if not value or not all(isinstance(part, str) for part in value):
        return value
    # A command line's text comes in parts, cut at its commas. Only a number and a colon begin another prompt.
    text = ", ".join(value)
    pieces = re.split(r"(?:^|;)\s*(\d+(?:\.\d*)?)\s*:", text)
    if pieces[0].strip() or len(pieces) < 3:
        raise UserError(f'config.prompt_schedule is {text!r}; write "5: a cat sits; 10: a cat runs", with seconds')
    return tuple((float(second), prompt.strip()) for second, prompt in zip(pieces[1::2], pieces[2::2], strict=True))


def _numbered_latents(config: Config, number: int, total: int) -> str | None:
    if config.save_latents is None:
        return None
    path = pathlib.Path(config.save_latents)
    if total > 1:
        path = path.with_name(f"{path.stem}-{_padded(number, total)}{path.suffix}")
    if not path.name or path.is_dir():
        raise UserError(f"config.save_latents is {config.save_latents!r}, a folder; give a .safetensors file")
    if path.exists() and config.existing == "rename":
        raise UserError(f"config.save_latents: {path} exists; give another name or --overwrite")
    return str(path)


def _place(
    output: str, request: ResolvedRequest, number: int, total: int, from_file: bool, video: Asked
) -> tuple[pathlib.Path, str, str]:
    """Folder, stem and suffix of a video."""
    path = pathlib.Path(output).expanduser()
    is_folder = output.endswith(("/", "\\")) or path.is_dir() or not path.suffix
    if video.output:
        own = pathlib.Path(video.output).expanduser()
        suffix = own.suffix.lower()
        if suffix not in _SUFFIXES:
            raise UserError(f"{video.output!r} is the output of a prompt; the file's name must end in {_ENDINGS}")
        own = (path if is_folder else path.parent) / own
        return own.parent, own.stem, suffix
    counted = _padded(number, total)
    if is_folder:
        stem = f"{_slug(request.prompt)}-seed{request.seed}"
        stem = f"{_slug(video.name)}-{stem}" if video.name else stem
        return path, f"{counted}-{stem}" if from_file else stem, ".mp4"
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"config.output is {output!r}; the file's name must end in {_ENDINGS} (or give a folder)")
    return path.parent, f"{path.stem}-{counted}" if total > 1 else path.stem, suffix


def _padded(number: int, total: int) -> str:
    return str(number).zfill(max(3, len(str(total))) if total > 1 else 1)


def _slug(prompt: str) -> str:
    """A file name from the prompt: letters and digits of any script, at most 60 bytes."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    slug = ""
    for word in words:
        longer = f"{slug}-{word}" if slug else word
        if len(longer.encode()) > 60:
            break
        slug = longer
    return slug or (words[0].encode()[:60].decode(errors="ignore") if words else "video")
