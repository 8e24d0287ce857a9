"""How fast the networks run on CPU in float32, beside diffusers on the same cores.

    python -m benchmarks.speed.cpu                                           # ours alone
    python -m benchmarks.speed.cpu --other-python=torch-env/bin/python   # both in one run (see cpu_diffusers.py)
    python -m benchmarks.speed.cpu --other=other.json                        # beside timings taken earlier

Cases: the transformer (1.3B block shapes, two blocks, 4096 tokens) and VAE decoding (full size, nine frames of
128 x 128). Random weights; compilation and the first run are not timed; the two sides take turns run by run, so that
what else the machine does falls on both. Medians are printed and written to --output.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks import RESULTS
from benchmarks.speed.cpu_cases import CASES, Runner, TransformerCase, VaeCase, seconds

DEFAULT_OUTPUT = RESULTS / "cpu.json"
# Threads of the side that has just run may still be spinning: they fall asleep before the other side is timed.
_REST_SECONDS = 0.3

Case = TransformerCase | VaeCase


class Side(Protocol):
    """One implementation: loads a case (compiling, one run), times a run of it, and frees it."""

    about: dict[str, Any]

    def load(self, case: str) -> None: ...

    def run(self, case: str) -> dict[str, float]: ...

    def drop(self, case: str) -> None: ...


class Ours:
    """This project, in this process."""

    def __init__(self, cases: Mapping[str, Case] = CASES):
        versions = {name: importlib.metadata.version(name) for name in ("x2v-jax", "jax", "jaxlib", "flax")}
        self.about = {"name": "x2v-jax", "versions": versions}
        self._cases = cases
        self._loaded: dict[str, Runner] = {}

    def load(self, case: str) -> None:
        self._loaded[case] = make(self._cases[case])
        self._loaded[case]()

    def run(self, case: str) -> dict[str, float]:
        return seconds(self._loaded[case])

    def drop(self, case: str) -> None:
        del self._loaded[case]


class Other:
    """Another implementation, in a process of its own; `command` starts one that answers as cpu_cases.serve does."""

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def load(self, case: str) -> None:
        self._order("load", case)

    def run(self, case: str) -> dict[str, float]:
        return self._order("run", case)

    def drop(self, case: str) -> None:
        self._order("drop", case)

    def close(self) -> None:
        self._process.communicate()

    def _order(self, verb: str, case: str) -> dict[str, Any]:
        print(json.dumps({verb: case}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            sys.exit(f"the other side stopped with exit code {self._process.wait()}; it said why above")
        return json.loads(line)


def make(case: Case) -> Runner:
    """Builds and compiles a case with random weights in float32; the returned function runs it once."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from x2v_jax.models.config import VaeConfig, WanConfig
    from x2v_jax.models.vae import WanVae
    from x2v_jax.models.wan import WanModel

    latents = jax.random.normal(jax.random.key(1), (1, *case.latents))
    if isinstance(case, TransformerCase):
        names = ("dim", "ffn_dim", "num_heads", "num_layers", "text_len", "text_dim")
        config = WanConfig(**{name: getattr(case, name) for name in names})
        model = WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        text = jax.random.normal(jax.random.key(2), (1, case.text_len, case.text_dim))
        inputs, apply = (latents, jnp.array([500.0]), text), lambda model, *inputs: model(*inputs)
    else:
        model = WanVae(VaeConfig(), rngs=nnx.Rngs(0), dtype=jnp.float32)
        inputs, apply = (latents,), lambda model, latents: model.decode(latents)
    graphdef, params = nnx.split(model)
    program = jax.jit(lambda params, *inputs: apply(nnx.merge(graphdef, params), *inputs))
    compiled = program.lower(params, *inputs).compile()
    return lambda: jax.block_until_ready(compiled(params, *inputs))


def compare(sides: Sequence[Side], cases: Sequence[str], rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Times of each case for each side, `rounds` runs each, the sides taking turns: {case: {side name: times}}."""
    results = {}
    for case in cases:
        print(f"{case}: building", file=sys.stderr, flush=True)
        for side in sides:
            side.load(case)
        print(f"{case}: timing", file=sys.stderr, flush=True)
        times: list[list[dict[str, float]]] = [[] for _ in sides]
        for _ in range(rounds):
            for side, timed in zip(sides, times, strict=True):
                time.sleep(_REST_SECONDS)
                timed.append(side.run(case))
        for side in sides:
            side.drop(case)
        results[case] = {side.about["name"]: summary(timed) for side, timed in zip(sides, times, strict=True)}
    return results


def summary(timed: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of wall-clock and CPU seconds, and every run's wall-clock seconds."""
    medians = {key: round(statistics.median(t[key] for t in timed), 4) for key in ("seconds", "cpu_seconds")}
    return {**medians, "runs": [round(t["seconds"], 4) for t in timed]}


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One row a case and side; the last column is ours divided by the other's."""
    rows = [f"{'case':<6}{'side':<12}{'seconds':>9}{'CPU s':>9}{'ours / it':>11}"]
    for case, sides in results.items():
        ours = next(iter(sides.values()))["seconds"]
        for name, timed in sides.items():
            ratio = f"{ours / timed['seconds']:.2f}"
            rows.append(f"{case:<6}{name:<12}{timed['seconds']:>9.3f}{timed['cpu_seconds']:>9.3f}{ratio:>11}")
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each case and side")
    parser.add_argument("--other-python", help="a Python that has torch and diffusers: the two sides take turns")
    parser.add_argument(
        "--other", type=pathlib.Path, help="what benchmarks.speed.cpu_diffusers printed on this machine"
    )
    parser.add_argument("--output", type=pathlib.Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args(argv)
    if arguments.other and arguments.other_python:
        parser.error("--other and --other-python: give one of the two")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    about, results = _measure(arguments)
    if arguments.other:
        earlier = json.loads(arguments.other.read_text(encoding="utf-8"))
        about.append({key: value for key, value in earlier.items() if key != "cases"})
        for case in arguments.cases:
            results[case][earlier["name"]] = earlier["cases"][case]
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "sides": about,
        "same_run": not arguments.other,
        "cases": {name: CASES[name]._asdict() for name in arguments.cases},
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"written: {arguments.output}")
    return 0


def _measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sides: list[Side] = [Ours()]
    if not arguments.other_python:
        return [sides[0].about], compare(sides, arguments.cases, arguments.rounds)
    other = Other([arguments.other_python, "-m", "benchmarks.speed.cpu_diffusers", "--serve"])
    try:
        sides.append(other)
        return [side.about for side in sides], compare(sides, arguments.cases, arguments.rounds)
    finally:
        other.close()


if __name__ == "__main__":
    sys.exit(main())
