"""PyTorch's attention and matmuls at the same shapes, where there is a torch: a process of its own.

    python -m benchmarks.gpu.torch_side        # prints a line of JSON for every case

Nothing here imports jax, so that any Python that has torch can run it.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import shapes

# A Python that has torch; default: this one.
PYTHON_VARIABLE = "X2V_TORCH_PYTHON"
_ROUNDS, _CALLS = 5, 3


def torch_rows(settings: Any) -> Iterator[dict[str, Any]]:
    """Rows as the other process prints them; one that says why there are none."""
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    if python == sys.executable and importlib.util.find_spec("torch") is None:
        yield {"case": "torch", "left_out": f"no torch in this Python; name one that has it in {PYTHON_VARIABLE}"}
        return
    command = [python, "-m", "benchmarks.gpu.torch_side", *(["--tiny"] if settings.tiny else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for text in process.stdout:
            yield json.loads(text)
    if process.returncode:
        yield {"case": "torch", "failed": f"{python} ended with {process.returncode}"}


def measure(tiny: bool) -> Iterator[dict[str, Any]]:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    yield {"case": "about", **about}
    for shape in shapes.TINY_SELF_ATTENTION if tiny else shapes.SELF_ATTENTION[:4]:
        yield _row(shape.name, "sdpa", shape.flops, lambda s=shape: _attention(torch, device, s))
    for shape in shapes.TINY_LINEAR if tiny else shapes.LINEAR[:4]:
        for name, make in (("bf16 matmul", _matmul), ("int8 matmul", _matmul_int8)):
            yield _row(shape.name, name, shape.flops, lambda s=shape, m=make: m(torch, device, s))


def _row(case: str, operation: str, flops: int, make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    about = {"case": case, "implementation": "torch", "operation": operation}
    try:
        seconds = _seconds(make())
    except Exception as error:
        return {**about, "failed": f"{type(error).__name__}: {error}"[:300]}
    return {**about, "seconds": seconds, "flops_a_second": flops / seconds}


def _attention(torch: Any, device: str, shape: shapes.AttentionShape) -> Callable[[], Any]:
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    def draw(tokens: int) -> Any:
        return torch.randn(1, shape.heads, tokens, shape.head_dim, device=device, dtype=torch.bfloat16)

    q, k, v = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def _matmul(torch: Any, device: str, shape: shapes.LinearShape) -> Callable[[], Any]:
    x = torch.randn(shape.m, shape.k, device=device, dtype=torch.bfloat16)
    w = torch.randn(shape.n, shape.k, device=device, dtype=torch.bfloat16)
    return lambda: x @ w.T


def _matmul_int8(torch: Any, device: str, shape: shapes.LinearShape) -> Callable[[], Any]:
    x = torch.randint(-127, 128, (shape.m, shape.k), device=device, dtype=torch.int8)
    w = torch.randint(-127, 128, (shape.n, shape.k), device=device, dtype=torch.int8)
    return lambda: torch._int_mm(x, w.T)


def _seconds(call: Callable[[], Any]) -> float:
    import torch  # pyright: ignore[reportMissingImports]

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples = []
    for i in range(_ROUNDS + 1):
        wait()
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        wait()
        if i:  # the first warms up
            samples.append((time.perf_counter() - begin) / _CALLS)
    return statistics.median(samples)


if __name__ == "__main__":
    for found in measure("--tiny" in sys.argv):
        print(json.dumps(found), flush=True)
