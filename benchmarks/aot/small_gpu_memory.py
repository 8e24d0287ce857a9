"""What a video of Wan2.1 14B needs of a small GPU's memory, from a compilation on a machine without one.

    pip install --no-deps --target=wheels jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    python -m benchmarks.aot.small_gpu_memory --wheels=wheels

The programs are those that `python -m infer` runs for 81 frames of 480 x 832 with int8 weights, at full size, one at a
time: text encoder, for image-to-video CLIP and the VAE's encoder, the four steps as one program with and without
`offload="blocks"`, and the VAE's decoder. XLA compiles them for sm_90a; a smaller card's kernels differ, the arrays do
not. Attention is the reference's, because cuDNN cannot be compiled without a GPU, and needs more than cuDNN's. Printed,
written to --output and to the table in docs/small_gpus.md: bytes of arguments on the device and on the host,
temporaries, and what of the device is taken while a program runs, with the weights that stay there meanwhile; beside it
what `x2v_jax.memory.predict` predicts.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import DOCUMENTS, RESULTS
from benchmarks.aot.compiler import MISSING, TARGET, prepare
from benchmarks.reports import replace_part

DOCUMENT = DOCUMENTS / "small_gpus.md"
DEFAULT_OUTPUT = RESULTS / "small_gpu_memory.json"
LATENTS, PIXELS = (21, 60, 104), (81, 480, 832)


@dataclasses.dataclass(frozen=True)
class Case:
    """A phase of a video. vae_dtype and vae_decode: as the config's keys."""

    model: str
    phase: str
    offload: str = "none"
    vae_decode: str = "tiled"
    vae_dtype: str = "float32"


CASES = (
    *(Case("T2V-14B", "text"), Case("I2V-14B", "image")),
    *(Case(model, "denoise", offload) for model in ("T2V-14B", "I2V-14B") for offload in ("none", "blocks")),
    *(Case("T2V-14B", "vae", "none", method) for method in ("tiled", "stream")),
    *(Case("T2V-14B", "vae", "none", method, "bfloat16") for method in ("tiled", "stream")),
    Case("T2V-14B", "vae", "blocks", "tiled"),
)


def main(arguments: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.small_gpu_memory", description=description)
    parser.add_argument("--wheels", type=pathlib.Path, help="folder that jax's two CUDA wheels are unpacked in")
    parser.add_argument("--output", type=pathlib.Path, default=DEFAULT_OUTPUT)
    options = parser.parse_args(arguments)
    if not prepare(options.wheels):
        print(MISSING, file=sys.stderr)
        return 1
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("x2v-jax", "jax", "jaxlib", "flax")}
    target = "81 frames of 480x832, int8 weights, compiled for sm_90a without a GPU"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"target": target, "versions": versions, "cases": rows}, indent=1) + "\n")
    if options.output == DEFAULT_OUTPUT:
        DOCUMENT.write_text(replace_part(DOCUMENT.read_text(), "small gpus", table(rows)))
    return 0


class Sizes:
    """Stands for a checkpoint with int8 weights: shapes and types, and no numbers."""

    def __init__(self, configs: Mapping[str, Any]):
        self.configs = configs

    def has(self, component: str) -> bool:
        return component in self.configs

    def tensors(self, component: str) -> dict[str, Any]:
        import numpy as np

        from x2v_jax.checkpoint.names.wan import native_shapes

        quantization = None if component == "vae" else "int8"
        shapes = native_shapes(component, self.configs[component], quantization)
        types_of = {name: np.dtype(np.int8 if name.endswith(".weight") else np.float32) for name in shapes}
        return {name: types.SimpleNamespace(shape=shape, dtype=types_of[name]) for name, shape in shapes.items()}


def measure(case: Case) -> dict[str, Any]:
    """One row of the table. All sizes are bytes."""
    from x2v_jax.memory import predict

    sizes = Sizes(_configs(case.model))
    options: dict[str, Any] = {"offload": case.offload, "vae_decode": case.vae_decode, "vae_dtype": case.vae_dtype}
    plan = predict.plan(sizes, sizes.configs, predict.Workload(LATENTS, guided=False, **options))
    device = host = temporaries = outputs = 0
    for program in _programs(case, sizes):
        stats = compile_program(program)
        device = max(device, stats.argument_size_in_bytes)
        host = max(host, stats.host_argument_size_in_bytes)
        # A donated argument's memory is the output's.
        outputs = max(outputs, stats.output_size_in_bytes - stats.alias_size_in_bytes)
        temporaries = max(temporaries, stats.temp_size_in_bytes)
    parts = plan.parts[case.phase]
    own = {"text": "text_encoder", "denoise": "transformer", "vae": "vae"}.get(case.phase)
    # Weights of other networks that are on the device all the while. In the image phase, two programs take turns.
    others = sum(size for name, size in parts.items() if name in plan.weights and name != own)
    if case.phase == "image":
        device = 0
    return {
        **dataclasses.asdict(case),
        "arguments_on_device": device,
        "arguments_on_host": host,
        "other_weights": others,
        "temporaries": temporaries,
        "outputs": outputs,
        "device": device + others + temporaries + outputs,
        "predicted": plan.phases[case.phase],
        "predicted_activations": parts["activations"],
    }


def compile_program(program: Any) -> Any:
    """Memory statistics of a program compiled for the target, arguments in the memory that their shardings name."""
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
    from jax.experimental import topologies

    # The target's own devices do not say which memories they have, so jax would leave the kinds out: the program is
    # lowered for this machine's device, which does, and handed to the target's compiler.
    static = program.static or {}
    lowered = program.function.trace(*program.arguments, **static).lower(lowering_platforms=("cuda",))
    topology: Any = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    client, devices = topology.devices[0].client, xla_client.DeviceList(tuple(topology.devices))
    compiled = client.compile(lowered.compiler_ir("stablehlo"), devices, xla_client.CompileOptions())
    return compiled.get_compiled_memory_stats()


def _programs(case: Case, sizes: Sizes) -> list[Any]:
    import jax
    import jax.numpy as jnp

    from x2v_jax.diffusion.step_distill import step_sigmas
    from x2v_jax.generate.denoise import Conditions, Denoiser
    from x2v_jax.generate.image import ImageConditioner
    from x2v_jax.generate.network import Network
    from x2v_jax.generate.programs import Program
    from x2v_jax.generate.vae import VaeRunner
    from x2v_jax.ops.choice import OpChoice

    def network(name: str) -> Network:
        return Network(
            name, sizes.configs[name], sizes.tensors(name), dtype="bfloat16", vae_dtype=case.vae_dtype,
            quantization=None if name == "vae" else "int8", ops=OpChoice(attention="reference", linear="xla"),
            blocks_on_host=case.offload == "blocks" and name == "transformer",
        )  # fmt: skip

    wan = sizes.configs["transformer"]
    if case.phase == "text":
        text = network("text_encoder")
        ids = jax.ShapeDtypeStruct((1, wan.text_len), jnp.int32)
        encode = text.jit(lambda encoder, ids, mask: encoder(ids, mask))
        return [Program("text encoder", encode, (text.shapes, ids, ids))]
    if case.phase == "image":
        return list(ImageConditioner(network("image_encoder"), VaeRunner(network("vae"))).programs(PIXELS))
    latents = (1, *LATENTS, 16)
    if case.phase == "vae":
        return list(VaeRunner(network("vae"), case.vae_decode).programs(latents))  # type: ignore[arg-type]
    transformer = network("transformer")
    conditions: Any = Conditions(_float32(1, wan.text_len, wan.text_dim), _float32())
    if wan.model_type == "i2v":
        condition = _float32(*latents[:-1], wan.in_dim - wan.out_dim)
        conditions = conditions._replace(image_features=_float32(1, 257, wan.clip_dim), image_latents=condition)
    sigmas = step_sigmas((1000, 750, 500, 250), 5.0)
    programs = Denoiser(transformer.graphdef).programs(transformer.shapes, conditions, latents, sigmas, watched=False)
    return [program for program in programs if program.name == "denoising"]


def _float32(*shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, "float32")


def _configs(model: str) -> dict[str, Any]:
    from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

    configs: dict[str, Any] = {"vae": VaeConfig(), "text_encoder": Umt5Config()}
    if model == "T2V-14B":
        return {"transformer": WanConfig.t2v_14b(), **configs}
    return {"transformer": WanConfig.i2v_14b(), **configs, "image_encoder": ClipConfig()}


def line(row: Mapping[str, Any]) -> str:
    names = ("arguments_on_device", "arguments_on_host", "other_weights", "temporaries")
    numbers = ", ".join(f"{name.replace('_', ' ')} {row[name] / 1e9:.2f}" for name in names)
    what = f"{row['model']} {row['phase']}, offload {row['offload']}"
    if row["phase"] == "vae":
        what += f", {row['vae_decode']} in {row['vae_dtype']}"
    return f"{what}: {row['device'] / 1e9:.2f} GB of the device ({numbers} GB); {row['predicted'] / 1e9:.2f} predicted"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the document."""
    lines = ["| | on the device | of it weights | on the host | predicted |", "|---|---|---|---|---|"]
    for row in rows:
        what = f"{row['model']}, {row['phase']}"
        if row["phase"] == "denoise":
            what += f", `offload={row['offload']}`"
        if row["phase"] == "vae":
            what += f", {row['vae_decode']}, {row['vae_dtype']}"
            what += ", `offload=blocks`" if row["offload"] == "blocks" else ""
        weights = row["arguments_on_device"] + row["other_weights"]
        sizes = (row["device"], weights, row["arguments_on_host"], row["predicted"])
        lines.append(f"| {what} | {' | '.join(f'{size / 1e9:.1f} GB' if size else '' for size in sizes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
