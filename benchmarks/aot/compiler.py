"""Compiles for a Hopper GPU on a machine without one, and reads what the compiler says of every kernel.

jax needs its two CUDA wheels for that, and the CUDA toolkit's `ptxas`; counts of tensor core instructions need
`nvdisasm` as well, from the toolkit or the wheel nvidia-cuda-nvdisasm.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import ROOT

MISSING = (
    "There is no CUDA compiler for jax here. Install jax-cuda13-plugin and jax-cuda13-pjrt, of jax's version, into a "
    "folder with pip's --target and name it with --wheels; no GPU is needed."
)
TARGET = ROOT / "benchmarks" / "targets" / "h200.txtpb"
# On the target: 227 KiB of the 228 that a multiprocessor has.
SHARED_MEMORY_LIMIT = 232_448

_PLUGIN = "jax_plugins.xla_cuda13"
_INSTRUCTION = re.compile(r"\b((?:HGMMA|IGMMA|QGMMA)\.[\w.]+|UTMALDG\.\dD\.MULTICAST|SYNCS\.ARRIVE\.TRANS64\.RED)")
_TOOL_FOLDERS = ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin", "bin")
_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES", "MOSAIC_GPU_DUMP_SASS")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel.

    shared_memory: bytes of the kernel's buffers; the compiler refuses more than `SHARED_MEMORY_LIMIT`.
    instructions: tensor core instructions, and loads for and signals to the other blocks of a cluster, in its code, by
    name; empty where there was no nvdisasm.
    """

    registers: int
    spill_bytes: int
    shared_memory: int | None = None
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)


def prepare(wheels: pathlib.Path | None) -> bool:
    """Before jax is imported, which looks for its plugins then. False where there is no CUDA compiler for it."""
    if wheels is not None:
        sys.path.insert(0, str(wheels))
    try:
        found = importlib.util.find_spec(_PLUGIN) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # There is nothing to time kernels on.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    return True


class Compiler:
    """Compiles functions for the target, in the text form of XLA's GpuTargetConfigProto.

    Args:
        tools: folders, such as --wheels, that may hold nvdisasm besides the installed toolkit.
    """

    def __init__(self, tools: tuple[pathlib.Path, ...] = (), target: pathlib.Path = TARGET):
        import jax
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="cuda", target_config=target.read_text(), topology="1x1x1")
        self._there = jax.sharding.NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), jax.P())
        self.nvdisasm = find_tool("nvdisasm", tools)
        self._tools = tools

    def place(self, tree: Any) -> Any:
        """The same shapes, on the target."""
        import jax

        def place(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._there)

        return jax.tree.map(place, tree)

    def compile(self, fn: Callable[..., Any], *arguments: Any, **jit: Any) -> Any:
        """fn compiled for arguments that are trees of shapes; jit: options of `jax.jit`."""
        import jax

        return jax.jit(fn, **jit).lower(*self.place(arguments)).compile()

    def kernels(self, fn: Callable[..., Any], *arguments: Any) -> list[Kernel]:
        """What ptxas says of the kernels of `plgpu.kernel` in fn, in the order of their compilation."""
        with self._dumping(), _captured() as log:
            self.compile(fn, *arguments)
        return read_log(log())

    @contextlib.contextmanager
    def _dumping(self) -> Iterator[None]:
        # Importing it sets MOSAIC_GPU_CUDA_ROOT.
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401

        with tempfile.TemporaryDirectory() as folder:
            changes: dict[str, str] = {name: "1" for name in _DUMPS[:2]}
            if self.nvdisasm is not None:
                changes |= {_DUMPS[2]: "1", "MOSAIC_GPU_CUDA_ROOT": self._toolkit(pathlib.Path(folder))}
            before = {name: os.environ.get(name) for name in changes}
            os.environ.update(changes)
            try:
                yield
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})

    def _toolkit(self, folder: pathlib.Path) -> str:
        """A CUDA toolkit made of what is installed and nvdisasm, wherever that lies."""
        root = pathlib.Path(os.environ.get("MOSAIC_GPU_CUDA_ROOT", "/usr/local/cuda"))
        (folder / "bin").mkdir()
        for name in ("ptxas", "nvdisasm"):
            found = find_tool(name, (*self._tools, root))
            if found is not None:
                (folder / "bin" / name).symlink_to(found.resolve())
        if (root / "nvvm").exists():
            (folder / "nvvm").symlink_to(root / "nvvm")
        return str(folder)


def find_tool(name: str, folders: tuple[pathlib.Path, ...] = ()) -> pathlib.Path | None:
    """A program of the CUDA toolkit, in wheels that are unpacked in `folders` or site-packages, or on the PATH."""
    import sysconfig

    places = (*folders, pathlib.Path(sysconfig.get_path("purelib")), pathlib.Path("/usr/local/cuda"))
    for place in (place / sub / name for place in places for sub in _TOOL_FOLDERS):
        if place.is_file() and os.access(place, os.X_OK):
            return place
    found = shutil.which(name)
    return None if found is None else pathlib.Path(found)


def read_log(log: str) -> list[Kernel]:
    """The kernels in what the compiler printed: for each its resources, ptxas' summary, and its code."""
    starts = [match.start() for match in re.finditer(r"Compiling entry function", log)]
    scratch = [int(n) for n in re.findall(r"Resources\(smem_scratch_bytes=(\d+)", log)]
    kernels = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(log)
        part = log[start:end]
        registers, spills = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        if registers is None or spills is None:
            raise ValueError(f"this is not what ptxas says of a kernel:\n{part[:500]}")
        counts = collections.Counter(match.rstrip(".") for match in _INSTRUCTION.findall(part))
        shared = scratch[i] if len(scratch) == len(starts) else None
        kernels.append(Kernel(int(registers[1]), int(spills[1]), shared, dict(sorted(counts.items()))))
    return kernels


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """What C++ code writes to the process's two outputs; Python's own redirection does not see it. On an error it is
    printed."""
    text: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        _flush()
        saved = os.dup(1), os.dup(2)
        failed = True
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield lambda: text[0]
            failed = False
        finally:
            _flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            log.seek(0)
            text.append(log.read())
            if failed:
                sys.stderr.write(text[0][-4000:])


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
