"""Runs exported checkpoints in diffusers and says how far its latents are from ours.

    python -m benchmarks.errors.beside_diffusers --other-python=torch-env/bin/python

The other Python has torch 2.13, diffusers 0.42, transformers 5. The shipped models are exported with `--layout
diffusers`, loaded there with `from_pretrained`, and sampled from the same noise and embeddings in float32. The result
is benchmarks/errors/beside_diffusers.json, which `benchmarks.errors.parity` puts into docs/parity.md. Takes a minute.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tests.reference.cases_lib.measure import relative_error
from x2v_jax import shipped
from x2v_jax.request import Request

RECORDED = pathlib.Path(__file__).with_suffix(".json")
_CHECKPOINTS = {"T2V": "assets/shapes", "I2V": "assets/shapes_i2v"}
_SIZE = {"height": 64, "width": 96, "num_frames": 9}
_STEPS, _GUIDANCE = 10, 3.0
_TEXTS = ("text", "negative_text")

# What the other Python runs: the folder, a file of inputs, the file to write.
_THERE = """
import json, sys
import numpy as np, torch, diffusers, transformers
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
folder, inputs, output = sys.argv[1:]
given = np.load(inputs)
kind = WanImageToVideoPipeline if "picture" in given else WanPipeline
parts = {"text_encoder": None, "tokenizer": None}
pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, **parts)
pipe.set_progress_bar_config(disable=True)
tables = {"own": None, "wan": given["sigmas"]}
plain = pipe.scheduler.set_timesteps
results = {}
for name, table in tables.items():
    def set_timesteps(count, device=None, table=table):
        plain(count, device=device)
        if table is not None:
            pipe.scheduler.sigmas = torch.from_numpy(table)
            pipe.scheduler.timesteps = torch.from_numpy(given["timesteps"])
    pipe.scheduler.set_timesteps = set_timesteps
    call = dict(
        prompt_embeds=torch.from_numpy(given["text"]), negative_prompt_embeds=torch.from_numpy(given["negative_text"]),
        latents=torch.from_numpy(given["noise"]), num_inference_steps=int(given["steps"]), output_type="latent",
        guidance_scale=float(given["guidance"]), height=int(given["height"]), width=int(given["width"]),
        num_frames=int(given["num_frames"]),
    )
    if "picture" in given:
        call["image"] = Image.fromarray(given["picture"])
        if name == "wan":
            seen = pipe.image_processor(images=call["image"], return_tensors="pt")["pixel_values"].numpy()
            results["pixels"] = seen
    results[name] = pipe(**call).frames.numpy()
if "picture" in given:
    edge = pipe.image_processor.size["height"]
    pipe.image_processor = type(pipe.image_processor)(size={"shortest_edge": edge}, crop_size=edge)
    results["cropped"] = pipe(**call).frames.numpy()
versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
np.savez(output, versions=json.dumps(versions), **results)
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: ||theirs - ours|| / ||ours|| of the latents."""

    what: str
    error: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.errors.beside_diffusers")
    parser.add_argument("--other-python", required=True, help="a Python with torch and diffusers")
    parser.add_argument("--output", type=pathlib.Path, default=RECORDED)
    arguments = parser.parse_args(argv)
    rows, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for image in (False, True):
            made, versions = _compare(pathlib.Path(folder), arguments.other_python, image=image)
            rows += made
    for row in rows:
        print(f"{row.error:.1e}  {row.what}")
    result = {"versions": versions, "rows": [dataclasses.asdict(row) for row in rows]}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _compare(folder: pathlib.Path, python: str, *, image: bool) -> tuple[list[Row], dict[str, str]]:
    from safetensors.numpy import save_file

    from x2v_jax.checkpoint.published.export import export
    from x2v_jax.diffusion.image_condition import clip_pixels
    from x2v_jax.diffusion.schedules import unipc_schedule
    from x2v_jax.pipeline import Pipeline

    task = "I2V" if image else "T2V"
    pipe = Pipeline.from_checkpoint(_with_512_tokens(_CHECKPOINTS[task], folder / "native"), dtype="float32")
    theirs, rng = folder / task, np.random.default_rng(0)
    export(pipe.checkpoint.path, theirs, "diffusers")
    config, shift = pipe.checkpoint.config("transformer"), pipe.checkpoint.schedule.shift
    vae = pipe.checkpoint.config("vae")
    frames = (_SIZE["num_frames"] - 1) // vae.temporal_stride + 1
    shape = (vae.z_dim, frames, _SIZE["height"] // vae.spatial_stride, _SIZE["width"] // vae.spatial_stride)
    noise = rng.standard_normal(shape).astype(np.float32)
    texts = {name: rng.standard_normal((config.text_len, config.text_dim)).astype(np.float32) for name in _TEXTS}
    save_file({"noise": noise}, folder / "noise.safetensors")
    save_file(texts, folder / "text.safetensors")
    sigmas, timesteps = unipc_schedule(_STEPS, shift)
    given: dict[str, Any] = {
        "noise": noise[None], "sigmas": sigmas, "timesteps": timesteps.astype(np.int64), "steps": _STEPS,
        "guidance": _GUIDANCE, **_SIZE, **{name: text[None] for name, text in texts.items()},
    }  # fmt: skip
    fields: dict[str, Any] = {}
    if image:
        given["picture"] = fields["image"] = _picture(_SIZE["height"], _SIZE["width"])
    np.savez(folder / "given.npz", **given)
    result = pipe.generate(
        Request(
            prompt="", num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, shift=shift, **_SIZE, **fields,
            initial_noise=str(folder / "noise.safetensors"), text_embeddings=str(folder / "text.safetensors"),
        )
    )  # fmt: skip
    ours = np.moveaxis(result.latents, -1, 0)
    subprocess.run([python, "-c", _THERE, str(theirs), str(folder / "given.npz"), str(folder / "made.npz")], check=True)
    made, what = np.load(folder / "made.npz"), f"{task}, {_STEPS} steps"
    rows = [
        Row(f"{what}, as exported", relative_error(made["own"][0], ours)),
        Row(f"{what}, Wan2.1's noise levels put into diffusers' scheduler", relative_error(made["wan"][0], ours)),
    ]
    if image:
        pixels = np.moveaxis(clip_pixels(given["picture"], pipe.checkpoint.config("image_encoder").image_size), -1, 0)
        rows.append(
            Row("the same, and diffusers' usual image processor, which crops", relative_error(made["cropped"][0], ours))
        )
        rows.append(Row("I2V, the picture that CLIP is given, as exported", relative_error(made["pixels"][0], pixels)))
    return rows, json.loads(str(made["versions"]))


def _with_512_tokens(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a shipped model that attends to 512 tokens of text: so many are written into diffusers' attention."""
    source = shipped.find(name)
    shutil.copytree(source, folder / source.name)
    file = folder / source.name / "model.json"
    model = json.loads(file.read_text())
    model["components"]["transformer"]["config"]["text_len"] = 512
    for entry in model["components"].values():
        if "reference" in entry:
            entry["reference"] = str((source / entry["reference"]).resolve())
    file.write_text(json.dumps(model))
    return file.parent


def _picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with edges, as photographs have them. uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = np.stack([np.sin(x / 17 + c) + np.cos(y / 13 - c) for c in range(3)], axis=-1)
    waves += ((x // 24 + y // 20) % 2)[..., None]
    return np.clip(90 + 55 * waves, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
