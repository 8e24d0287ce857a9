"""The first losses of every trainer that runs on the tiny world, with small batches and few prompts."""

import json
from collections.abc import Iterator
from typing import Any

from checkout import Checkout, sha256

_STEPS = 3
# A user's own config file: one of the project's, with a short phase in place of its own.
_SHORT = """
import importlib.util
from ml_collections import ConfigDict

def get_config(argument):
    file, number, batch = argument.split(",")
    spec = importlib.util.spec_from_file_location("recorded", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if "phases" in config:
        phase = ConfigDict(config.phases[int(number)].to_dict())
        phase.update({"steps": STEPS, "batch_size": int(batch)})
        config.phases = (phase,)
    return config
""".replace("STEPS", str(_STEPS))


def losses(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """What three steps write into the log, but for seconds and memory; the trajectories by their SHA-256."""
    pairs = f"{checkout.tmp}/pairs"
    distilled = {"data.count": 16, "evaluation.prompts": 1}
    causal = distilled | {"student": ""}
    vae = {"eval_videos": 1, "statistics_videos": 8}
    flow = {"vae": "assets/shapes", "num_videos": 8, "evaluation.prompts": 1, "evaluation.steps": 2}
    yield from _trajectories(checkout, pairs)
    yield from _losses(checkout, "VAE, images", "shapes/vae.py", 0, 4, vae)
    yield from _losses(checkout, "VAE, videos", "shapes/vae.py", 3, 1, vae)
    yield from _losses(checkout, "flow matching", "shapes/base.py", 0, 4, flow)
    yield from _losses(checkout, "flow matching, I2V", "shapes/i2v_base.py", 0, 4, flow)
    yield from _losses(checkout, "DMD", "train/shapes_t2v_dmd.py", 0, 4, distilled)
    yield from _losses(checkout, "DMD, LoRA", "train/shapes_t2v_dmd.py", 0, 4, distilled, lora=True)
    yield from _losses(checkout, "DMD, I2V", "train/shapes_i2v_dmd.py", 0, 4, distilled)
    yield from _losses(
        checkout, "ODE regression", "train/shapes_causal_ode_init.py", 0, 4, distilled | {"pairs": pairs}
    )
    yield from _losses(checkout, "CausVid", "train/shapes_causvid.py", 0, 4, causal)
    continued = causal | {"continuation.pairs": pairs}
    yield from _losses(checkout, "Self-Forcing", "train/shapes_self_forcing.py", 0, 4, causal)
    yield from _losses(checkout, "Self-Forcing, continued", "train/shapes_self_forcing.py", 1, 4, continued)


def _losses(
    checkout: Checkout, name: str, file: str, phase: int, batch: int, changes: dict[str, Any], *, lora: bool = False
) -> Iterator[tuple[str, Any]]:
    run_dir = checkout.tmp / name.replace(", ", "_").replace(" ", "_")
    config = checkout.tmp / "short.py"
    text = _SHORT if not lora else _SHORT.replace("return config", 'config.lora = {"rank": 4}\n    return config')
    config.write_text(text)
    values = {"run_dir": run_dir, "log_every": 1, "save_every": 1000, "eval_every": 1000, **changes}
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    done = checkout.run("-m", "train", f"--config={config}:configs/{file},{phase},{batch}", *arguments)
    if done.returncode:
        yield name, f"exit code {done.returncode}: {checkout.plain(done.stderr).strip()}"
        return
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    left_out = ("seconds_per_step", "peak_memory_gb")
    yield name, {f"line {i}": {k: v for k, v in line.items() if k not in left_out} for i, line in enumerate(lines)}


def _trajectories(checkout: Checkout, output: str) -> Iterator[tuple[str, Any]]:
    values = {"output": output, "run_dir": f"{checkout.tmp}/made", "num_steps": 8, "batch_size": 4, "data.count": 8}
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    checkout.must_run("-m", "train", "--config=configs/train/shapes_ode_pairs.py", *arguments)
    for path in sorted((checkout.tmp / "pairs").rglob("*.safetensors")):
        yield f"trajectories, {path.name}", sha256(path)
