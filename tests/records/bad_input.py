"""What the command lines say of a hundred mistakes: wrong keys, files that are missing or damaged, contradictions.

The files are made here, without the checkout's code, so that every checkout is given the same bytes.
"""

import json
import pathlib
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from checkout import Checkout
from PIL import Image
from safetensors.numpy import save_file

_CHECKPOINT = "assets/shapes_t2v_4step"
_LORA_KEY = "diffusion_model.blocks.0.self_attn.q"


def bad_input(checkout: Checkout) -> Iterator[tuple[str, Any]]:
    """Exit code, stdout and stderr of each."""
    tmp = checkout.tmp
    make_files(checkout.root / "assets", tmp)
    for command, mistakes in cases(str(tmp)).items():
        for case in mistakes:
            done = checkout.run("-m", command, *case)
            said = {"exit code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
            item = checkout.plain(" ".join([command, *case]))
            yield item, {key: checkout.plain(v) if isinstance(v, str) else v for key, v in said.items()}


def make_files(assets: pathlib.Path, tmp: pathlib.Path) -> None:
    """The files that the cases name."""
    _make_checkpoints(assets, tmp)
    _make_loras(tmp)
    _make_files(tmp)


def cases(tmp: str) -> dict[str, list[list[str]]]:
    out = f"--config.output={tmp}/v.mp4"
    i2v, causal = "--config=configs/shapes/i2v.py", "--config=configs/shapes/t2v_causal.py"

    def infer(*arguments: str) -> list[str]:
        return [*arguments, out]

    def checkpoint(name: str) -> list[str]:
        return infer(f"--config.checkpoint={tmp}/{name}")

    def lora(name: str) -> list[str]:
        return infer(f"--config.lora={tmp}/{name}.safetensors")

    dmd, run_dir = "--config=configs/train/shapes_t2v_dmd.py", f"--config.run_dir={tmp}/run"
    return {
        "infer": [
            infer("--config.heigth=64"),
            infer("--config.seed=x"),
            infer("--config.progress=maybe"),
            infer("--prompt=a cat"),
            infer("--ckpt_dir=x"),
            infer("a cat"),
            infer("--config.checkpoint.path=x"),
            infer("--config.height="),
            infer("--config=configs/shapes/t2w.py"),
            infer("--config=configs/shapes/vae.py"),
            infer(f"--config={tmp}/broken.py"),
            infer(f"--config={tmp}/empty.py"),
            infer(f"--config=configs/lightx2v.py:{tmp}/unknown_key.json"),
            infer(f"--config=configs/lightx2v.py:{tmp}/broken.json"),
            infer("--config.height=65"),
            infer("--config.num_frames=32"),
            infer("--config.seed=-2"),
            infer("--config.guidance_scale=5"),
            infer("--config.denoising_step_list=250,500"),
            infer("--config.attention=fast", "--config.dtype=int3"),
            infer("--config.num_videos=0"),
            infer("--config.seconds=2"),
            infer("--config.prompt=a", "--config.prompt_file=b"),
            infer(f"--config.prompt_file={tmp}/blank.txt"),
            infer("--config.prompt_file=/nowhere/prompts.txt"),
            infer("--config.task=i2v"),
            infer(i2v, "--config.image=/nowhere/p.png"),
            infer(i2v, f"--config.image={tmp}/truncated.png"),
            infer(i2v, f"--config.image={tmp}/text.png"),
            infer(causal, "--config.seconds=3", "--config.rollout.mode=round"),
            infer(causal, "--config.rollout.mode=sliding", "--config.rollout.sink=99"),
            infer(causal, f"--config.continue_from={tmp}/text.mp4"),
            infer(causal, "--config.prompt_schedule=a cat sits"),
            infer(f"--config.initial_noise={tmp}/wrong_noise.safetensors"),
            infer(f"--config.text_embeddings={tmp}/wrong_noise.safetensors"),
            infer(f"--rerun={tmp}/text.mp4"),
            infer("--rerun=/nowhere/v.mp4"),
            ["--config.output=/proc/v.mp4"],
            [f"--config.output={tmp}/v.avi"],
            *map(checkpoint, ["nowhere", "text", "no_json", "not_json", "newer", "no_file", "truncated"]),
            *map(checkpoint, ["other_sizes", "damaged_tokenizer", "outside", "loop", "foreign"]),
            *map(lora, ["nowhere", "lokr", "dora", "only_down", "wrong_rank", "wrong_module", "not_lora", "truncated"]),
            infer(f"--config.lora={tmp}/good.safetensors:strong"),
        ],
        "convert": [
            [],
            ["wann", "a", "b"],
            ["wan", "/nowhere", f"{tmp}/out"],
            ["wan", _CHECKPOINT, f"{tmp}/text"],
            ["wan", _CHECKPOINT, f"{tmp}/out", "--quantize", "int4"],
            ["wan", _CHECKPOINT, f"{tmp}/out", "--lora", f"{tmp}/wrong_module.safetensors"],
            ["wan", _CHECKPOINT, f"{tmp}/out", "--schedule", '{"shfit": 4}'],
            ["wan", _CHECKPOINT, f"{tmp}/out", "--set", "transformer.depth"],
            ["wan", f"{tmp}/model.gguf", f"{tmp}/out"],
            ["wan", f"{tmp}/pickle.pth", f"{tmp}/out"],
            ["wan", f"{tmp}/bare.pth", f"{tmp}/out"],
            ["inspect", f"{tmp}/bare.pth"],
            ["wan", f"{tmp}/truncated", f"{tmp}/out"],
            ["inspect", "/nowhere"],
            ["inspect", f"{tmp}/text.png"],
            ["inspect", f"{tmp}/other_sizes"],
            ["inspect", f"{tmp}/lokr.safetensors"],
            ["export", f"{tmp}/no_json", f"{tmp}/out", "--layout", "wan"],
            ["export", _CHECKPOINT, f"{tmp}/out", "--layout", "comfy"],
            ["extract-lora", "assets/shapes", "assets/shapes_i2v", f"{tmp}/l.safetensors", "--rank", "4"],
            ["extract-lora", "assets/shapes", _CHECKPOINT, f"{tmp}/l.bin", "--rank", "0"],
            ["calibrate", _CHECKPOINT, f"{tmp}/c.safetensors", "--prompts", f"{tmp}/blank.txt"],
        ],
        "train": [
            ["--config.stepz=1"],
            [dmd, run_dir, "--config.size.num_frames=32"],
            [dmd, run_dir, "--config.teacher=/nowhere"],
            [dmd, run_dir, "--config.teacher=assets/shapes_i2v", "--config.student=assets/shapes"],
            [dmd, run_dir, f"--config.data.prompts={tmp}/blank.txt"],
            [dmd, run_dir, "--config.student_schedule.denoising_step_list=500,1000"],
            [dmd, run_dir, "--config.task=dmdd"],
            ["--config=configs/train/shapes_causal_ode_init.py", run_dir, f"--config.pairs={tmp}/cache"],
            ["--config=configs/shapes/vae.py", f"--config.run_dir={tmp}/other_run"],
            ["--config=configs/shapes/vae.py", f"--config.run_dir={tmp}/no_run", f"--export={tmp}/out"],
            ["--config=configs/shapes/vae.py", "--dry_run"],
        ],
        "train.prepare": [
            ["prompts", f"{tmp}/blank.txt", f"{tmp}/made", "--checkpoint", "assets/shapes"],
            ["prompts", f"{tmp}/one.txt", f"{tmp}/made", "--checkpoint", "/nowhere"],
            ["videos", f"{tmp}/cache", f"{tmp}/made", "--checkpoint", "assets/shapes", "--height", "0"],
            ["images", "/nowhere", f"{tmp}/made", "--checkpoint", "assets/shapes_i2v"],
            ["lmdb", f"{tmp}/cache", f"{tmp}/made"],
            ["check", f"{tmp}/cache"],
            ["check", f"{tmp}/text"],
        ],
    }


def _make_checkpoints(assets: pathlib.Path, tmp: pathlib.Path) -> None:
    """Copies of the shipped 4-step model, each with one damage."""
    shutil.copytree(assets / "shapes", tmp / "shapes")
    names = "no_json not_json newer no_file truncated other_sizes damaged_tokenizer outside loop foreign"
    for name in names.split():
        shutil.copytree(assets / "shapes_t2v_4step", tmp / name)
    (tmp / "no_json/model.json").unlink()
    (tmp / "not_json/model.json").write_text("{")
    (tmp / "no_file/transformer.safetensors").unlink()
    data = (tmp / "truncated/transformer.safetensors").read_bytes()
    (tmp / "truncated/transformer.safetensors").write_bytes(data[:-9])
    (tmp / "damaged_tokenizer/tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    _change(tmp / "newer", lambda model: model.update(format_version=99))
    _change(tmp / "other_sizes", lambda model: model["components"]["transformer"]["config"].update(num_layers=5))
    _change(
        tmp / "damaged_tokenizer", lambda model: model["components"].update(tokenizer={"files": ["tokenizer.json"]})
    )
    _change(tmp / "outside", lambda model: model["components"]["transformer"].update(files=["../x.safetensors"]))
    _change(tmp / "loop", lambda model: model["components"].update(vae={"reference": "../loop"}))
    _change(tmp / "foreign", lambda model: model.update(format="another"))


def _change(folder: pathlib.Path, change: Any) -> None:
    model = json.loads((folder / "model.json").read_text())
    change(model)
    (folder / "model.json").write_text(json.dumps(model))


def _make_loras(tmp: pathlib.Path) -> None:
    def matrix(*shape: int) -> np.ndarray:
        return np.full(shape, 0.01, np.float32)

    down, up = f"{_LORA_KEY}.lora_down.weight", f"{_LORA_KEY}.lora_up.weight"
    good = {down: matrix(4, 128), up: matrix(128, 4)}
    files = {
        "good": good,
        "lokr": {f"{_LORA_KEY}.lokr_w1": matrix(4, 4), f"{_LORA_KEY}.lokr_w2": matrix(32, 32)},
        "dora": good | {f"{_LORA_KEY}.dora_scale": matrix(128, 1)},
        "only_down": {down: matrix(4, 128)},
        "wrong_rank": {down: matrix(4, 128), up: matrix(128, 3)},
        "wrong_module": {key.replace("blocks.0", "blocks.40"): value for key, value in good.items()},
        "not_lora": {"weight": matrix(4, 4)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp / f"{name}.safetensors")
    (tmp / "truncated.safetensors").write_bytes((tmp / "good.safetensors").read_bytes()[:-9])


def _make_files(tmp: pathlib.Path) -> None:
    (tmp / "text").write_text("no checkpoint\n")
    for name in ("text.mp4", "text.png"):
        (tmp / name).write_text("neither a video nor a picture\n")
    (tmp / "blank.txt").write_text("\n  \n")
    (tmp / "one.txt").write_text("a red circle moves left\n")
    (tmp / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp / "empty.py").write_text("def get_config():\n    return {}\n")
    (tmp / "broken.json").write_text('{"infer_steps": 4')
    (tmp / "unknown_key.json").write_text('{"infer_steps": 4, "infer_stepz": 4}')
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp / "whole.png")
    (tmp / "truncated.png").write_bytes((tmp / "whole.png").read_bytes()[:60])
    save_file({"noise": np.zeros((16, 1, 8, 8), np.float32)}, tmp / "wrong_noise.safetensors")
    (tmp / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with zipfile.ZipFile(tmp / "pickle.pth", "w") as file:  # of os.system, which must never be called
        file.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nU\x04trueq\x00\x85R.")
        file.writestr("archive/version", "3\n")
    _write_bare_tensor(tmp / "bare.pth")
    (tmp / "cache").mkdir()
    (tmp / "cache/index.json").write_text('{"format": "x2v-jax-cache", "format_version": 1, "kind": "trajectories"}')
    (tmp / "cache/items.jsonl").write_text("{}\n")
    (tmp / "other_run").mkdir()
    (tmp / "other_run/config.json").write_text('{"task": "flow_matching"}')


def _write_bare_tensor(path: pathlib.Path) -> None:
    """What torch.save(torch.zeros(1, 16, 2, 4, 6)) writes: latents without a name."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x00\x03tQ"
    sizes = b"(K\x01K\x10K\x02K\x04K\x06t(M\x00\x03K0K\x18K\x06K\x01t"
    rebuild = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + sizes
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("bare/data.pkl", rebuild + b"\x89ccollections\nOrderedDict\n)RtR.")
        file.writestr("bare/byteorder", "little")
        file.writestr("bare/data/0", bytes(4 * 768))
        file.writestr("bare/version", "3\n")
