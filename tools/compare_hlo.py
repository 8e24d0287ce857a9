"""Compares the compiled programs of tiny networks: what XLA made of them, as text, without metadata.

    python tools/compare_hlo.py record FOLDER           # of this checkout
    python tools/compare_hlo.py compare FOLDER          # this checkout with what was recorded
    python tools/compare_hlo.py compare ../other        # this checkout with another one

For changes that only say the same computation in other words. Prints the first line that differs; exit code 1.
"""

import argparse
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# Where an instruction was written: `, metadata={op_name="..." ...}` behind it, and tables of files at the end.
_METADATA = re.compile(r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n?)*", re.MULTILINE)


def programs() -> Iterator[tuple[str, str]]:
    """(name, optimised HLO) of each program, of the x2v_jax that is imported."""
    import jax
    import jax.numpy as jnp

    from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig
    from x2v_jax.models.functional import merge
    from x2v_jax.models.networks import abstract_network

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def program(config: object, run: Callable[..., object], *inputs: jax.ShapeDtypeStruct) -> str:
        graphdef, params = abstract_network(config)  # type: ignore[arg-type]  # of another checkout, perhaps
        called = jax.jit(lambda params, *inputs: run(merge(graphdef, params), *inputs))
        return strip(called.lower(params, *inputs).compile().as_text() or "")

    sizes = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 24, "freq_dim": 16, "text_len": 12}
    latents, step, text = numbers(2, 3, 4, 6, 16), numbers(2), numbers(2, 12, 24)
    yield "transformer", program(WanConfig(**sizes), lambda model, *x: model(*x), latents, step, text)
    i2v = WanConfig(**sizes, model_type="i2v", in_dim=36, clip_dim=20)
    inputs = numbers(2, 3, 4, 6, 36), step, text, numbers(2, 5, 20)
    yield "transformer_i2v", program(i2v, lambda model, *x: model(*x), *inputs)
    vae = VaeConfig(dim=4, dim_mult=(1, 1, 1, 2), num_res_blocks=1)
    yield "vae_encode", program(vae, lambda model, x: model.encode(x), numbers(1, 9, 32, 48, 3))
    yield "vae_decode", program(vae, lambda model, x: model.decode(x), numbers(1, 3, 4, 6, 16))
    umt5 = Umt5Config(vocab_size=64, dim=24, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, num_buckets=8)
    tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    yield "text_encoder", program(umt5, lambda model, *x: model(*x), tokens, tokens)
    clip = ClipConfig(image_size=28, dim=20, mlp_ratio=2, num_heads=2, num_layers=2, out_dim=6)
    yield "image_encoder", program(clip, lambda model, x: model(x), numbers(2, 28, 28, 3))


def strip(text: str) -> str:
    """
    >>> strip('a = f32[2]{0} add(b, c), metadata={op_name="jit(f)/add{1}" source_line=3}, control-predecessors={d}')
    'a = f32[2]{0} add(b, c), control-predecessors={d}'
    """
    return _TABLES.sub("", _METADATA.sub("", text)).rstrip()


def record(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs():
        (folder / f"{name}.txt").write_text(text + "\n")


def difference(before: pathlib.Path, after: pathlib.Path) -> str | None:
    """The first line that differs between two folders of programs, or None."""
    names = [sorted(path.name for path in folder.glob("*.txt")) for folder in (before, after)]
    if names[0] != names[1]:
        return f"the programs are {names[0]} and {names[1]}"
    if not names[0]:
        return f"{before} holds no programs"
    for name in names[0]:
        lines = [(folder / name).read_text().splitlines() for folder in (before, after)]
        for number, (old, new) in enumerate(itertools.zip_longest(*lines), 1):
            if old != new:
                return f"{name}:{number}\n- {old}\n+ {new}"
    return None


def _recorded(checkout: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Records a checkout's programs in a process of its own, which imports that checkout's library."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "record", str(folder)]
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("place", type=pathlib.Path, help="a folder of recorded programs, or another checkout")
    arguments = parser.parse_args()
    place = arguments.place.resolve()
    if arguments.action == "record":
        record(place)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = pathlib.Path(temporary)
        before = _recorded(place, scratch / "before") if (place / "x2v_jax").is_dir() else place
        found = difference(before, _recorded(_ROOT, scratch / "after"))
    print(found or "the same programs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
