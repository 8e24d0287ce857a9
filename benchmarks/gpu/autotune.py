"""Tries the kernels' tile sizes on this GPU and writes the fastest right ones into the tables that the kernels read.

    python -m benchmarks.gpu kernels --autotune [--quick]

Attention: `x2v_jax/ops/attention/hopper_table.py`. Linear layers: `x2v_jax/ops/linear_8bit/tuned.py`. Every candidate
is compared with the reference before it is timed; one that does not compile, or is wrong, is left out. Tables, and
all times in autotune.json in --out, are written after each candidate: a run that is cut short has tuned what it came
to. With --quick only one number of the committed tiles is changed at a time: a quarter as many candidates.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import shapes
from benchmarks.gpu.sections import Row, guarded, line
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.shapes import AttentionShape, LinearShape

OPS = ROOT / "x2v_jax" / "ops"
ATTENTION_TABLE = OPS / "attention" / "hopper_table.py"
LINEAR_TABLE = OPS / "linear_8bit" / "tuned.py"
_CLASSES = {"long": "14B 480P", "chunk": "14B chunk, 480P cache", "cross": "14B 480P, text"}
_ATTENTION_HEADER = (
    '"""Configurations of the Hopper kernel by precision and shape class. Data: written by benchmarks, read by '
    "hopper_config.\n\n"
    '"measured": false marks a default that comes from the arithmetic of the kernel and no run. Of "full", an entry '
    "says too\nwhether it was faster than cuDNN; only then does `attention` choose it there.\n"
    '"""\n\nfrom typing import Any\n\nENTRIES: dict[str, dict[str, Any]] = {\n'
)
_LINEAR_HEADER = (
    '"""Tiles of the W8A8 matmul that a measurement chose: (N, K, dtype, kind) -> fields of MatmulConfig.\n\n'
    'Data, written by `python -m benchmarks.gpu kernels --autotune`.\n"""\n\n'
    "from typing import Any\n\nROWS: dict[tuple[int, int, str, str], dict[str, Any]] = {\n"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu kernels --autotune")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    import jax

    if jax.default_backend() != "gpu":
        print("error: there is no GPU here, so there is nothing to tune for", file=sys.stderr)
        return 2
    settings = Settings(out=options.out, quick=options.quick, tiny=options.tiny, seed=options.seed)
    from x2v_jax.ops.attention.hopper_table import ENTRIES

    before, rows = _tuned_before(), []
    options.out.mkdir(parents=True, exist_ok=True)
    for row in itertools.chain(linear_rows(settings), attention_rows(settings)):
        rows.append(row)
        print(line(row), flush=True)
        (options.out / "autotune.json").write_text(json.dumps(rows, indent=1) + "\n")
        ATTENTION_TABLE.write_text(attention_table(ENTRIES, rows))
        LINEAR_TABLE.write_text(linear_table(before, rows))
    print(f"written: {ATTENTION_TABLE}, {LINEAR_TABLE}")
    return 0


def attention_rows(settings: Settings) -> Iterator[Row]:
    """A row a candidate, and in full precision one of cuDNN."""
    from benchmarks.gpu.attention import attention_data
    from x2v_jax.ops.attention.hopper_config import PRECISIONS

    by_name = {shape.name: shape for shape in (*shapes.SELF_ATTENTION, *shapes.CROSS_ATTENTION)}
    for kind, name in _CLASSES.items():
        shape, data = by_name[name], {}
        data.update(attention_data(settings, shape))
        for precision in PRECISIONS:
            about = {"operation": "attention", "precision": precision, "class": kind}
            if precision == "full":
                cudnn = functools.partial(_time_cudnn, settings, shape, data)
                yield guarded(settings, {**about, "implementation": "cudnn"}, cudnn)
            for config in attention_candidates(precision, quick=settings.quick):
                run = functools.partial(_time_attention, settings, shape, data, precision, config)
                fields = dataclasses.asdict(config)
                yield guarded(settings, {**about, "implementation": "hopper", "config": fields}, run)


def attention_candidates(precision: Any, *, quick: bool = False) -> list[Any]:
    """Configurations that fit a thread block's shared memory."""
    from x2v_jax.ops.attention.hopper_config import EIGHT_BIT_VALUES, HopperConfig, Probabilities

    in_two_ways = precision in EIGHT_BIT_VALUES and not quick
    ways: tuple[Probabilities, ...] = ("registers", "shared") if in_two_ways else ("registers",)
    blocks, found = (128,) if quick else (128, 64), []
    for block, stages, groups, turns, way in itertools.product(blocks, (2, 3, 4), (2, 3), (True, False), ways):
        config = HopperConfig(block, stages, groups, turns, way)
        # Taking turns is for two.
        if config.fits(precision) and (groups == 2 or not turns):
            found.append(config)
    return found


def _time_cudnn(settings: Settings, shape: AttentionShape, data: dict[str, Any]) -> Row:
    from benchmarks.gpu.attention import attention_call

    function, _ = attention_call(shape, "full", "cudnn")
    return _checked_attention(settings, shape, data, "full", function)


def _time_attention(
    settings: Settings, shape: AttentionShape, data: dict[str, Any], precision: Any, config: Any
) -> Row:
    from x2v_jax.ops.attention.hopper import attention_hopper

    def function(q: Any, k: Any, v: Any, length: Any) -> Any:
        key_length = length if shape.ragged else None
        scale = shape.head_dim**-0.5
        return attention_hopper(q, k, v, scale=scale, precision=precision, key_length=key_length, config=config)[0]

    return _checked_attention(settings, shape, data, precision, function)


def _checked_attention(settings: Settings, shape: AttentionShape, data: Any, precision: str, function: Any) -> Row:
    import jax

    from benchmarks.gpu.attention import check_attention
    from benchmarks.gpu.timing import timed

    arguments = (data["q"], data["k"], data["v"], data["length"])
    compiled = jax.jit(function).lower(*arguments).compile()
    errors = check_attention(settings, shape, data, compiled(*arguments), precision)
    return {**errors, **timed(settings, lambda: compiled(*arguments)).row()}


def linear_rows(settings: Settings) -> Iterator[Row]:
    """A row a candidate of every matrix of the transformers, at 480P."""
    import jax

    from benchmarks.gpu.operations import linear_data

    for shape in (shape for shape in shapes.LINEAR if shape.name.endswith("480P")):
        data = linear_data(shape, jax.random.key(settings.seed))
        kind = "residual" if shape.epilogue == "residual" else "plain"
        for dtype in ("int8", "float8_e4m3fn"):
            about = {"operation": "linear", "n": shape.n, "k": shape.k, "dtype": dtype, "kind": kind}
            for config in linear_candidates(shape, dtype, kind, quick=settings.quick):
                run = functools.partial(_time_linear, settings, shape, data, dtype, config)
                yield guarded(settings, {**about, "config": dataclasses.asdict(config)}, run)


def linear_candidates(shape: LinearShape, dtype: str, kind: str, *, quick: bool = False) -> list[Any]:
    """The committed tiles, and others that divide the matrix."""
    from x2v_jax.ops.linear_8bit.config import config_for

    base = config_for(shape.n, shape.k, dtype, kind)
    assert base is not None, shape
    choices = {"tile_n": (256, 128), "stages": (3, 4, 5), "snake": (4, 8, 16), "cluster": (2, 1)}
    one_by_one = [{name: value} for name, values in choices.items() for value in values]
    changes = (
        one_by_one if quick else [dict(zip(choices, v, strict=True)) for v in itertools.product(*choices.values())]
    )
    changes = [{}, *changes, *({"epilogue_n": columns} for columns in (16, 32, 64))]
    found = [dataclasses.replace(base, **change, measured=True) for change in changes]
    return [config for config in dict.fromkeys(found) if shape.n % config.tile_n == 0]


def _time_linear(settings: Settings, shape: LinearShape, data: dict[str, Any], dtype: str, config: Any) -> Row:
    import jax
    import jax.numpy as jnp

    from benchmarks.gpu.linear import check_linear
    from benchmarks.gpu.operations import quantized_weight
    from benchmarks.gpu.timing import timed
    from x2v_jax.ops.linear_8bit import quantize_rows
    from x2v_jax.ops.linear_8bit.hopper import matmul_hopper

    residual = shape.epilogue == "residual"

    def function(x: Any, weight: Any, scale: Any, bias: Any, gate: Any, rest: Any) -> Any:
        return matmul_hopper(
            quantize_rows(x, dtype), weight, scale, bias, "gelu_tanh" if shape.epilogue == "gelu" else None,
            gate.reshape(1, -1) if residual else None, rest if residual else None,
            jnp.float32 if residual else jnp.bfloat16, config,
        )  # fmt: skip

    weight, scale = quantized_weight(data["weight"], dtype)
    arguments = (data["x"], weight, scale, data["bias"], data["gate"], data["residual"])
    compiled = jax.jit(function).lower(*arguments).compile()
    errors = check_linear(settings, shape, data, dtype, arguments, compiled(*arguments))
    return {**errors, **timed(settings, lambda: compiled(*arguments)).row()}


def attention_table(entries: Mapping[str, Mapping[str, Any]], rows: Iterable[Row]) -> str:
    """The text of hopper_table.py: the fastest candidates, and the old entries where there is none."""
    rows = list(rows)
    new = {key: dict(entry) for key, entry in entries.items()}
    for key in new:
        precision, kind = key.split("/")
        own = [r for r in rows if r["operation"] == "attention" and (r["precision"], r["class"]) == (precision, kind)]
        best = fastest(r for r in own if r["implementation"] == "hopper")
        if best is None:
            continue
        new[key] = {"config": best["config"], "measured": True}
        if precision == "full":
            cudnn = fastest(r for r in own if r["implementation"] == "cudnn")
            new[key]["faster_than_cudnn"] = cudnn is not None and best["seconds"] < cudnn["seconds"]
    return _ATTENTION_HEADER + "".join(_attention_entry(key, entry) for key, entry in new.items()) + "}\n"


def linear_table(before: Mapping[tuple[int, int, str, str], Mapping[str, Any]], rows: Iterable[Row]) -> str:
    """The text of tuned.py, likewise."""
    rows = [row for row in rows if row["operation"] == "linear"]
    new = dict(before)
    for key in dict.fromkeys((row["n"], row["k"], row["dtype"], row["kind"]) for row in rows):
        best = fastest(row for row in rows if (row["n"], row["k"], row["dtype"], row["kind"]) == key)
        if best is not None:
            new[key] = best["config"]
    return _LINEAR_HEADER + "".join(_linear_entry(key, config) for key, config in sorted(new.items())) + "}\n"


def fastest(rows: Iterable[Row]) -> Row | None:
    timed: Callable[[Row], float] = lambda row: row["seconds"]  # noqa: E731
    return min((row for row in rows if "seconds" in row), key=timed, default=None)


def _attention_entry(key: str, entry: Mapping[str, Any]) -> str:
    lines = "".join(f"        {_quoted(name)}: {_literal(value)},\n" for name, value in entry.items())
    return f"    {_quoted(key)}: {{\n{lines}    }},\n"


def _linear_entry(key: tuple[Any, ...], config: Mapping[str, Any]) -> str:
    lines = "".join(f"        {_quoted(name)}: {_literal(value)},\n" for name, value in config.items())
    return f"    ({', '.join(map(_literal, key))}): {{\n{lines}    }},\n"


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _tuned_before() -> dict[Any, Any]:
    if not LINEAR_TABLE.exists():
        return {}
    values: dict[str, Any] = {}
    exec(LINEAR_TABLE.read_text(), values)
    return values["ROWS"]


if __name__ == "__main__":
    sys.exit(main())
