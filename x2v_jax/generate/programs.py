"""The programs of a run: compiled before there is anything to run them on, and kept in one file.

The file is for a start that compiles nothing: a server's or a rented machine's first. It is a zip of what jax's
persistent compilation cache holds after a warm-up, and a manifest of what it was made with. jax finds each program in
it by a hash of the program itself, of the device and of the compiler, so that a program which does not fit is compiled
and never run by mistake; what remains to be done at a start is tracing, a second or two. Nothing in it is pickled,
unlike in jax's own serialised executables, but it is machine code: take it from nobody whom you would not take a
program from.
"""

import atexit
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from x2v_jax import shipped
from x2v_jax.errors import UserError


class Program(NamedTuple):
    """A jitted function and arguments, arrays or their shapes, that it will be called with.

    static: keyword arguments that the function is compiled for; None: none.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any] | None = None


def compile_all(
    programs: Iterable[Program], on_start: Callable[[str], None] | None = None
) -> Iterator[tuple[str, float]]:
    """Compiles one after the other; yields each one's name and the seconds it took, and calls on_start with it before.

    The compiled programs go to jax's persistent cache, where the same calls find them later; nothing is run.
    """
    for program in programs:
        if on_start is not None:
            on_start(program.name)
        begin = time.perf_counter()
        program.function.lower(*program.arguments, **(program.static or {})).compile()
        yield program.name, time.perf_counter() - begin


DEFAULT_CACHE = "~/.cache/x2v_jax"
_log = logging.getLogger(__name__)

FORMAT = "x2v-jax compiled programs"
_MANIFEST = "manifest.json"
_ENTRY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}-cache")
_LARGEST = 1 << 30  # of one program; the whole 14B sampler is some MB


def identity(config: Mapping[str, object]) -> dict[str, Any]:
    """What programs depend on: versions, the device, and the run's config."""
    import importlib.metadata

    import jax

    device = jax.local_devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": f"cpu {_processor()}" if device.platform == "cpu" else device.device_kind,
        "platform": device.client.platform_version,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "config": json.loads(json.dumps(dict(config))),
    }


def save(path: str | os.PathLike[str], cache: pathlib.Path, made_for: Mapping[str, object]) -> int:
    """Writes the programs of a cache folder to a file, and returns how many there are.

    Raises:
        UserError: it cannot be written.
    """
    target = pathlib.Path(path).expanduser()
    entries = sorted(p for p in cache.iterdir() if _ENTRY.fullmatch(p.name))
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in entries}
    manifest = {"format": FORMAT, "version": 1, "made_for": dict(made_for), "programs": digests}
    draft = _draft(target)
    try:
        with zipfile.ZipFile(draft, "w") as file:  # stored: jax has compressed them
            file.writestr(_MANIFEST, json.dumps(manifest, indent=1))
            for entry in entries:
                file.write(entry, entry.name)
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _unwritable(target, error) from None
    return len(entries)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Before the work: raises a UserError where `save` could not write."""
    target = pathlib.Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"compiled_programs: {target} is a folder; give a file")
    _draft(target).unlink()


def _draft(target: pathlib.Path) -> pathlib.Path:
    """An empty file beside the target."""
    draft = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
    except OSError as error:
        raise _unwritable(target, error) from None
    return draft


def _unwritable(target: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"compiled_programs: {target} cannot be written: {error.strerror}; give another file")


def install(path: str | os.PathLike[str], cache: pathlib.Path, wanted: Mapping[str, object]) -> bool:
    """Puts a file's programs into a cache folder, unless they were made for something else: then it warns.

    Args:
        wanted: `identity` of this run.

    Returns:
        Whether they are there. Without them everything is compiled, as without the file.
    """
    target = pathlib.Path(path).expanduser()
    try:
        with zipfile.ZipFile(target) as file:
            manifest = json.loads(_read(file, _MANIFEST))
            if manifest.get("format") != FORMAT or manifest.get("version") != 1:
                raise ValueError("it is not a file of compiled programs of this version")
            if different := list(_differences(manifest["made_for"], wanted)):
                _refuse(target, f"was made for {'; '.join(different[:3])}")
                return False
            programs = manifest["programs"].items()
            contents = {name: _checked(name, _read(file, name), digest) for name, digest in programs}
    except FileNotFoundError:
        _refuse(target, "does not exist")
        return False
    except (OSError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        _refuse(target, f"is damaged ({error})")
        return False
    cache.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        draft = cache / f"{name}.{os.getpid()}.part"
        draft.write_bytes(content)
        os.replace(draft, cache / name)  # whole or not at all: another process may be reading
    return True


def use_cache(folder: str | os.PathLike[str], *, everything: bool = False) -> pathlib.Path:
    """Makes a folder jax's persistent compilation cache.

    Args:
        everything: keep even what compiles in no time; else what takes a tenth of a second.
    """
    import jax

    path = pathlib.Path(folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if everything else 0.1)
    return path


def start_cache(folder: str | None) -> None:
    """The compilation cache of a new pipeline, of which each process has one: see `generate.call.StartOptions`."""
    import jax

    if folder == "" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if folder is None and jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    path = use_cache(DEFAULT_CACHE if folder is None else folder)
    _log.info("compiled programs are kept in %s; compilation_cache='' turns that off", path)


def fresh_cache() -> pathlib.Path:
    """An empty compilation cache in use, gone when the process ends: what it then holds is what this run compiled."""
    from jax.experimental.compilation_cache import compilation_cache

    folder = tempfile.mkdtemp(prefix="x2v_jax_programs_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compilation_cache.reset_cache()  # jax opens a cache once
    return use_cache(folder, everything=True)


def _differences(made_for: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in wanted:
        old, new = made_for.get(name), wanted[name]
        if old == new:
            continue
        if name == "config" and isinstance(old, Mapping):
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    yield f"{key} {_short(old.get(key))} and this run has {_short(new.get(key))}"
        else:
            yield f"{name} {_short(old)} and this is {_short(new)}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.splitlines()[0][:80] if text else "''"


def _refuse(path: pathlib.Path, why: str) -> None:
    warnings.warn(
        f"compiled_programs: {path} {why}; everything is compiled instead. Make the file with "
        f"`{shipped.command('infer --warmup')}` and this run's other settings",
        stacklevel=3,
    )


def _read(file: zipfile.ZipFile, name: str) -> bytes:
    if file.getinfo(name).file_size > _LARGEST:
        raise ValueError(f"{name} is too large")
    return file.read(name)


def _checked(name: str, content: bytes, digest: str) -> bytes:
    if not _ENTRY.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a program")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{name} has changed")
    return content


def _processor() -> str:
    """Tells processors apart that run different machine code."""
    flags = ""
    if sys.platform == "linux":
        text = pathlib.Path("/proc/cpuinfo").read_text(errors="replace")
        flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"
