"""Runs inside a checkout, with its modules: prints one JSON list [item, value] a line.

    python inside.py configs LIGHTX2V.json | frames FOLDER | variations FOLDER

Names that have moved are tried at their new place and then at the old one.
"""

import hashlib
import importlib
import json
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_T2V, _CAUSAL = "assets/shapes_t2v_4step", "assets/shapes_causal"
_PROMPT = "a red circle moves left"
_IMAGE = {"image": "docs/images/first_frame.png", "prompt": "a blue square moves right"}


def first_of(*names: str) -> Any:
    """The first module of these that there is."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    return importlib.import_module(names[-1])


def configs(lightx2v: str) -> Iterator[tuple[str, Any]]:
    """Every file in configs/ as the project's own reader resolves it."""
    flags = first_of("x2v_jax.config.flags", "configs.flags")
    for path in sorted(pathlib.Path("configs").rglob("*.py")):
        if "def get_config" in path.read_text():
            argument = f":{lightx2v}" if path.name == "lightx2v.py" else ""
            yield str(path), json.loads(flags.load_config(f"{path}{argument}").to_json_best_effort())


def frames(folder: str) -> Iterator[tuple[str, Any]]:
    """Videos of each kind. folder: has int8/, fp8/ and lora.safetensors of the 4-step model."""
    yield from _videos(
        {
            "T2V, 4 steps": (_T2V, {}, {}),
            "I2V, 4 steps": ("assets/shapes_i2v_4step", {}, _IMAGE),
            "T2V, 50 steps with guidance": ("assets/shapes", {}, {}),
            "causal, 4 seconds": (_CAUSAL, {}, {"seconds": 4.0}),
            "CausVid, 2 fragments": ("assets/shapes_causvid", {}, {"num_fragments": 2}),
            "T2V, int8 weights": (f"{folder}/int8", {}, {}),
            "T2V, a LoRA": (_T2V, {"loras": [(f"{folder}/lora.safetensors", 0.5)]}, {}),
            "T2V, VAE tiled": (_T2V, {"vae_decode": "tiled"}, {}),
        }
    )


def variations(folder: str) -> Iterator[tuple[str, Any]]:
    """The same with other options, and by the other ways into the pipeline. folder: as of `frames`."""
    from x2v_jax import Pipeline
    from x2v_jax.request import Request

    turn = ((2.0, "a red circle moves right"),)
    yield from _videos(
        {
            "T2V, VAE streamed": (_T2V, {"vae_decode": "stream"}, {}),
            "T2V, VAE in bfloat16": (_T2V, {"vae_dtype": "bfloat16"}, {}),
            "T2V, float32": (_T2V, {"dtype": "float32"}, {}),
            "T2V, blocks on the host": (_T2V, {"offload": "blocks"}, {}),
            "T2V, 8-bit attention": (_T2V, {"attention_precision": "int8_e4m3"}, {}),
            "T2V, 17 frames of 48x96": (_T2V, {}, {"num_frames": 17, "height": 48, "width": 96}),
            "T2V, int8 weights, 16-bit activations": (f"{folder}/int8", {"linear_activations": "16bit"}, {}),
            "T2V, fp8 weights": (f"{folder}/fp8", {}, {}),
            "T2V, guidance in two passes": ("assets/shapes", {"sequential_guidance": True}, {}),
            "I2V, first frame pinned": ("assets/shapes_i2v_4step", {}, _IMAGE | {"pin_first_frame": True}),
            "I2V, 50 steps with guidance": ("assets/shapes_i2v", {}, _IMAGE),
            "causal, 8-bit cache": (_CAUSAL, {}, {"seconds": 4.0, "kv_cache": "int8"}),
            "causal, from a picture": (_CAUSAL, {}, {"image": _IMAGE["image"]}),
            "causal, two prompts": (_CAUSAL, {}, {"seconds": 4.0, "prompt_schedule": turn}),
        }
    )
    pipe, request = Pipeline.from_checkpoint(_T2V), Request(prompt=_PROMPT, seed=1)
    yield "T2V, step by step", _digest(pipe.generate(request, lambda step, count, latents: None).frames)
    pipe = Pipeline.from_checkpoint(_CAUSAL)
    yield "causal, block by block", "\n".join(_digest(block) for block in pipe.stream(_PROMPT, seed=1))


def _videos(cases: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Shape and SHA-256 of the frames of each case: checkpoint, options of the pipeline, fields of the request."""
    from x2v_jax import Pipeline

    for name, (checkpoint, options, fields) in cases.items():
        pipe = Pipeline.from_checkpoint(checkpoint, **options)
        yield name, _digest(pipe(**{"prompt": _PROMPT, "seed": 1, **fields}))


def _digest(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for entry in {"configs": configs, "frames": frames, "variations": variations}[sys.argv[1]](*sys.argv[2:]):
        print(json.dumps(entry), flush=True)
