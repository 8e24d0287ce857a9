"""What is recorded. A section takes a checkout and gives (item, value) pairs, which are JSON."""

import collections
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from bad_input import bad_input
from checkout import Checkout, sha256
from losses import losses
from safetensors.numpy import save_file

Items = Iterator[tuple[str, Any]]

LIGHTX2V = {
    "infer_steps": 4, "target_video_length": 81, "text_len": 512, "target_height": 480, "target_width": 832,
    "self_attn_1_type": "flash_attn3", "cross_attn_1_type": "flash_attn3", "seed": 42, "sample_guide_scale": 6,
    "sample_shift": 5, "enable_cfg": False, "cpu_offload": False, "denoising_step_list": [1000, 750, 500, 250],
}  # fmt: skip
COMMANDS = {
    "infer": [[]],
    "convert": [[], ["wan"], ["inspect"], ["export"], ["extract-lora"], ["calibrate"]],
    "train": [[]],
    "train.prepare": [[], ["prompts"], ["videos"], ["images"], ["lmdb"], ["check"]],
}
_SOURCE = "assets/shapes_t2v_4step"


def tests(checkout: Checkout) -> Items:
    """Names of all test functions with their parameters, and how many of each: files move, so paths are left out."""
    # In place of the project's own options: those differ between checkouts, and one -q lists names, two only counts.
    listed = checkout.must_run("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q")
    names = [line.partition("::")[2] for line in listed.splitlines() if "::" in line]
    yield from sorted(collections.Counter(names).items())


def help_texts(checkout: Checkout) -> Items:
    for module, commands in COMMANDS.items():
        for command in commands:
            yield " ".join([module, *command]), checkout.must_run("-m", module, *command, "--help")


def configs(checkout: Checkout) -> Items:
    file = checkout.tmp / "lightx2v.json"
    file.write_text(json.dumps(LIGHTX2V))
    yield from checkout.inside("configs", str(file))


def frames(checkout: Checkout) -> Items:
    _write_models(checkout)
    yield from checkout.inside("frames", str(checkout.tmp))


def variations(checkout: Checkout) -> Items:
    _write_models(checkout)
    yield from checkout.inside("variations", str(checkout.tmp))


def _write_models(checkout: Checkout) -> None:
    for kind in ("int8", "fp8"):
        checkout.must_run("-m", "convert", "wan", _SOURCE, str(checkout.tmp / kind), "--quantize", kind)
    _write_lora(checkout)


def mp4(checkout: Checkout) -> Items:
    """Files that the command line writes: the mp4 byte for byte, and the settings beside it."""
    folder = checkout.tmp
    (folder / "prompts.txt").write_text("a green triangle moves down\na yellow square moves up\n")
    runs = {
        "default": [],
        "again": ["--rerun", f"{folder}/default.mp4"],
        "i2v": ["--config=configs/shapes/i2v.py"],
        "causal": ["--config=configs/shapes/t2v_causal.py", "--config.seconds=4"],
        "continued": ["--config=configs/shapes/t2v_causal.py", f"--config.continue_from={folder}/causal.mp4"],
        "prompts": [f"--config.prompt_file={folder}/prompts.txt", "--config.progress=false"],
    }
    for name, arguments in runs.items():
        checkout.must_run("-m", "infer", *arguments, f"--config.output={folder}/{name}.mp4")
        for path in sorted(folder.glob(f"{name}*.mp4")):
            settings = json.loads(checkout.plain(path.with_suffix(".json").read_text()))
            yield f"{path.name}, settings", settings
            yield path.name, sha256(path)


def conversions(checkout: Checkout) -> Items:
    """Files that a conversion writes, by their SHA-256, and its model.json."""
    _write_lora(checkout)
    for kind in ("int8", "fp8", "lora", "float16"):
        options = {"lora": ["--lora", f"{checkout.tmp}/lora.safetensors:0.5"], "float16": ["--dtype", kind]}
        given = options.get(kind, ["--quantize", kind])
        checkout.must_run("-m", "convert", "wan", _SOURCE, str(checkout.tmp / kind), *given)
        yield from _files(checkout, kind)
    for layout in ("wan", "lightx2v", "diffusers"):
        checkout.must_run("-m", "convert", "export", "assets/shapes", str(checkout.tmp / layout), "--layout", layout)
        yield from _files(checkout, layout)
    checkout.must_run("-m", "convert", "wan", str(checkout.tmp / "diffusers"), str(checkout.tmp / "native"))
    yield from _files(checkout, "native")
    inspected = [_SOURCE, *(str(checkout.tmp / kind) for kind in ("int8", "lora.safetensors", "diffusers"))]
    for path in inspected:
        yield f"inspect {checkout.plain(path)}", checkout.plain(checkout.must_run("-m", "convert", "inspect", path))


def _files(checkout: Checkout, folder: str) -> Items:
    for path in sorted(p for p in (checkout.tmp / folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(checkout.tmp))
        if path.suffix == ".json":
            # References are relative, and the folder's own depth is no part of what is recorded.
            text = re.sub(r"(\.\./)+[\w./-]*?assets/", "<assets>/", checkout.plain(path.read_text()))
            yield name, json.loads(text)
        else:
            yield name, sha256(path)


def _write_lora(checkout: Checkout) -> None:
    rng = np.random.default_rng(7)
    tensors = {}
    for block in range(6):
        for module, size in (("self_attn.q", (128, 128)), ("cross_attn.o", (128, 128)), ("ffn.0", (512, 128))):
            name = f"diffusion_model.blocks.{block}.{module}"
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((4, size[1])).astype(np.float32) * 0.1
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((size[0], 4)).astype(np.float32) * 0.1
    save_file(tensors, checkout.tmp / "lora.safetensors")


def programs(checkout: Checkout) -> Items:
    """Hashes of the programs that a video compiles, as jax knows them (without names of files and lines), and the
    committed tables of what is compiled for a GPU."""
    for name, config in (("T2V", "t2v"), ("I2V", "i2v"), ("T2V, 50 steps", "t2v_50step"), ("causal", "t2v_causal")):
        file = checkout.tmp / f"{config}.zip"
        arguments = [f"--config=configs/shapes/{config}.py", f"--config.compiled_programs={file}"]
        checkout.must_run("-m", "infer", "--warmup", *arguments)
        with zipfile.ZipFile(file) as made:
            yield name, "\n".join(sorted(json.loads(made.read("manifest.json"))["programs"]))
    for path in sorted(checkout.root.joinpath("benchmarks").rglob("aot_*.json")):
        yield path.name, sha256(path)


def aot(checkout: Checkout) -> Items:
    """A few cases of the tables, compiled for a GPU again and held against the committed table."""
    few = {
        "aot_kernels": ["attention 1.3B 480P, full", "linear 1.3B projection 480P, int8"],
        "aot_sampler": ["T2V-1.3B 480P, bf16"],
    }
    for module, cases in few.items():
        new = f"benchmarks.aot.{module.removeprefix('aot_')}"
        there = checkout.run("-c", f"import {new}").returncode == 0
        for case in cases:
            arguments = [f"--wheels={checkout.wheels}", f"--only={case}"]
            done = checkout.run("-m", new if there else f"benchmarks.{module}", *arguments)
            text = re.sub(r"compiled in [\d.]+ s", "compiled", done.stdout)
            yield f"{module} {case}", {"exit code": done.returncode, "said": text, "differs": done.stderr}


SECTIONS: dict[str, Callable[[Checkout], Items]] = {
    "tests": tests,
    "help": help_texts,
    "configs": configs,
    "bad_input": bad_input,
    "conversions": conversions,
    "frames": frames,
    "mp4": mp4,
    "losses": losses,
    "programs": programs,
    "variations": variations,
    "aot": aot,
}
