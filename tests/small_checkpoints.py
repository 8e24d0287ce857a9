"""Small random checkpoints in the published layouts, for the tests of conversion."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.files.torch_writer import write_torch_file
from x2v_jax.checkpoint.names.diffusers import DiffusersNames
from x2v_jax.checkpoint.names.wan import official_shapes
from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

BF16 = np.dtype(ml_dtypes.bfloat16)

CONFIGS: dict[str, Any] = {
    "transformer": WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=16, freq_dim=8, text_len=12),
    "vae": VaeConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
    "text_encoder": Umt5Config(
        vocab_size=30, dim=16, dim_attn=12, dim_ffn=20, num_heads=2, num_layers=2, num_buckets=8
    ),
    "image_encoder": ClipConfig(image_size=28, dim=20, mlp_ratio=2, num_heads=2, num_layers=2, out_dim=6),
}
I2V = WanConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=16, freq_dim=8, text_len=12, model_type="i2v", in_dim=36,
    clip_dim=20,
)  # fmt: skip

Tensors = dict[str, np.ndarray]


def random_tensors(component: str, config: Any = None, *, seed: int = 0, dtype: Any = np.float32) -> Tensors:
    """Official key -> values."""
    rng = np.random.default_rng(seed)
    shapes = official_shapes(component, config or CONFIGS[component])
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def save(path: pathlib.Path, tensors: Mapping[str, Any]) -> pathlib.Path:
    """Writes a safetensors or a torch file, by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        with SafetensorsWriter(path, {k: (v.shape, v.dtype) for k, v in tensors.items()}) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
    else:
        write_torch_file(path, tensors)
    return path


def save_json(path: pathlib.Path, values: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def official_config(config: WanConfig) -> dict[str, Any]:
    names = ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers", "text_len", "model_type")
    return {"_class_name": "WanModel", "eps": 1e-6, **{name: getattr(config, name) for name in names}}


def official_folder(root: pathlib.Path, *, image: bool = False, transformer: bool = True) -> dict[str, Tensors]:
    """The official Wan2.1 folder. Returns the tensors of every component by official names."""
    config = I2V if image else CONFIGS["transformer"]
    made = {
        "transformer": random_tensors("transformer", config, seed=1),
        "vae": random_tensors("vae", seed=2),
        "text_encoder": random_tensors("text_encoder", seed=3, dtype=BF16),
    }
    save_json(root / "config.json", official_config(config))
    if image:
        made["image_encoder"] = random_tensors("image_encoder", seed=4, dtype=np.float16)
        text = {"textual.token_embedding.weight": np.ones((3, 2), np.float16), "log_scale": np.ones((), np.float16)}
        clip = root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        save(clip, made["image_encoder"] | text)
        save_json(root / "config.json", official_config(config) | {"image_encoder": {"num_heads": 2}})
    if transformer:
        save(root / "diffusion_pytorch_model.safetensors", made["transformer"])
    save(root / "Wan2.1_VAE.pth", made["vae"])
    save(root / "models_t5_umt5-xxl-enc-bf16.pth", made["text_encoder"])
    save_json(root / "google/umt5-xxl/tokenizer.json", {"version": "1.0", "model": {}})
    return made


def diffusers_names(component: str, tensors: Tensors) -> Tensors:
    """The same tensors under diffusers' names, split and transposed as theirs are."""
    names = DiffusersNames(component, CONFIGS["vae"].num_res_blocks)
    result: Tensors = {}
    for key, value in tensors.items():
        others, transform = names.format(key)
        value = transform.forward(value) if transform else value
        for other, part in zip(others, np.split(value, len(others)), strict=True):
            result[other] = np.ascontiguousarray(part)
    return result


def diffusers_folder(root: pathlib.Path, *, image: bool = False) -> dict[str, Tensors]:
    config: WanConfig = I2V if image else CONFIGS["transformer"]
    t5, vae, clip = CONFIGS["text_encoder"], CONFIGS["vae"], CONFIGS["image_encoder"]
    made = {
        "transformer": random_tensors("transformer", config, seed=1),
        "vae": random_tensors("vae", seed=2),
        "text_encoder": random_tensors("text_encoder", seed=3, dtype=BF16),
    }
    configs: dict[str, dict[str, Any]] = {
        "transformer": {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": config.num_heads,
            "attention_head_dim": config.head_dim, "in_channels": config.in_dim, "out_channels": 16,
            "ffn_dim": config.ffn_dim, "num_layers": config.num_layers, "text_dim": config.text_dim, "eps": 1e-6,
            "image_dim": config.clip_dim if image else None, "qk_norm": "rms_norm_across_heads",
            "patch_size": [1, 2, 2], "freq_dim": config.freq_dim, "cross_attn_norm": True,
        },
        "vae": {
            "_class_name": "AutoencoderKLWan", "base_dim": vae.dim, "z_dim": 16, "dim_mult": [1, 2],
            "num_res_blocks": 1, "temperal_downsample": [True], "latents_mean": list(vae.latents_mean),
            "latents_std": list(vae.latents_std),
        },
        "text_encoder": {
            "model_type": "umt5", "d_model": t5.dim, "d_kv": 6, "d_ff": t5.dim_ffn, "num_heads": 2, "num_layers": 2,
            "vocab_size": 30, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 128,
        },
    }  # fmt: skip
    if image:
        made["image_encoder"] = random_tensors("image_encoder", seed=4, dtype=np.float16)
        configs["image_encoder"] = {
            "model_type": "clip_vision_model", "hidden_size": clip.dim, "image_size": 28, "patch_size": 14,
            "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40, "hidden_act": "gelu",
            "projection_dim": 6,
        }  # fmt: skip
    for component, values in configs.items():
        save_json(root / component / "config.json", values)
        stem = "diffusion_pytorch_model" if component in ("transformer", "vae") else "model"
        save(root / component / f"{stem}.safetensors", diffusers_names(component, made[component]))
    save_json(root / "model_index.json", {"_class_name": "WanPipeline"})
    save_json(root / "tokenizer/tokenizer.json", {"version": "1.0", "model": {}})
    return made
