"""Tiny native checkpoints of random weights, for tests that run the pipeline."""

import pathlib
from typing import Any

import numpy as np

from x2v_jax.checkpoint.names.wan import native_shapes
from x2v_jax.checkpoint.native.writer import save_native
from x2v_jax.models.config import CausalSchedule, ClipConfig, Schedule, Umt5Config, VaeConfig, WanConfig

TEXT = Umt5Config(vocab_size=64, dim=24, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1, num_buckets=8)
VAE = VaeConfig(dim=4, dim_mult=(1, 1, 1, 2), num_res_blocks=1)
T2V = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16, text_len=12)
I2V = WanConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16, text_len=12, model_type="i2v", in_dim=36,
    clip_dim=20,
)  # fmt: skip
CLIP = ClipConfig(image_size=28, dim=20, mlp_ratio=2, num_heads=2, num_layers=2, out_dim=6)

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5}
BASE = Schedule(num_inference_steps=3, shift=3.0, guidance_scale=4.0, negative_prompt="bad", **SIZE)
DISTILLED = Schedule(
    sampler="step_distill",
    num_inference_steps=4,
    shift=5.0,
    guidance_scale=1.0,
    denoising_step_list=(1000, 750, 500, 250),
    **SIZE,
)
CAUSAL = Schedule(
    sampler="step_distill",
    num_inference_steps=2,
    shift=5.0,
    guidance_scale=1.0,
    denoising_step_list=(1000, 500),
    height=32,
    width=48,
    num_frames=33,
    causal=CausalSchedule(window=9),
)
WORDS = ("a", "red", "circle", "moves", "left", "right", "blue", "square", "bad")


def write_checkpoint(
    path: pathlib.Path, *, image: bool = False, schedule: Schedule = BASE, changes: dict[str, Any] | None = None
) -> pathlib.Path:
    """A native checkpoint of random weights. changes: schedule or save_native arguments to replace."""
    configs: dict[str, Any] = {"transformer": I2V if image else T2V, "vae": VAE, "text_encoder": TEXT}
    if image:
        configs["image_encoder"] = CLIP
    tokenizer = path.parent / f"{path.name}-tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(tokenizer)
    variant = "self_forcing" if schedule.causal else "distill" if schedule.is_distilled else "base"
    arguments: dict[str, Any] = {
        "task": "i2v" if image else "t2v",
        "variant": variant,
        "schedule": schedule,
        "components": {name: (config, random_parameters(name, config)) for name, config in configs.items()},
        "tokenizer_file": tokenizer,
    }
    save_native(path, **(arguments | (changes or {})))
    return path


def random_parameters(component: str, config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: _draw(rng, name, shape) for name, shape in sorted(native_shapes(component, config).items())}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith((".scale", ".gamma")):
        return np.ones(shape, np.float32)
    fan_in = max(1, int(np.prod(shape[1:-1] if name.startswith("blocks.") else shape[:-1])))
    return (rng.standard_normal(shape) * 0.7 / fan_in**0.5).astype(np.float32)


def _write_tokenizer(path: pathlib.Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
