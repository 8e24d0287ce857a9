"""The JSON files of the published layouts, from this project's configs."""

from collections.abc import Mapping
from typing import Any

from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

Json = dict[str, Any]


def wan_config(c: WanConfig) -> Json:
    """config.json of an official Wan2.1 folder."""
    names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers", "out_dim")
    values = {name: getattr(c, name) for name in (*names, "text_len", "text_dim")}
    return {"_class_name": "WanModel", **values, "patch_size": list(c.patch_size)}


def transformer_config(c: WanConfig) -> Json:
    image = c.model_type == "i2v"
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": c.dim if image else None,
        "attention_head_dim": c.head_dim,
        "cross_attn_norm": True,
        "eps": c.eps,
        "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim,
        "image_dim": c.clip_dim if image else None,
        "in_channels": c.in_dim,
        "num_attention_heads": c.num_heads,
        "num_layers": c.num_layers,
        "out_channels": c.out_dim,
        "patch_size": list(c.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": c.text_dim,
        # Not a field of theirs: their pipeline pads to 512, as the published models have it.
        **({"text_len": c.text_len} if c.text_len != 512 else {}),
    }


def vae_config(c: VaeConfig) -> Json:
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": c.dim,
        "dim_mult": list(c.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(c.latents_mean),
        "latents_std": list(c.latents_std),
        "num_res_blocks": c.num_res_blocks,
        "temperal_downsample": list(c.temporal_downsample),  # their spelling
        "z_dim": c.z_dim,
    }


def text_encoder_config(c: Umt5Config) -> Json:
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": c.dim_ffn,
        "d_kv": c.dim_attn // c.num_heads,
        "d_model": c.dim,
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "layer_norm_epsilon": c.eps,
        "model_type": "umt5",
        "num_heads": c.num_heads,
        "num_layers": c.num_layers,
        "relative_attention_max_distance": c.max_distance,
        "relative_attention_num_buckets": c.num_buckets,
        # Versions of transformers that believe a false here leave the encoder's table uninitialised.
        "tie_word_embeddings": True,
        "vocab_size": c.vocab_size,
    }


def clip_config(c: ClipConfig, *, with_projection: bool) -> Json:
    return {
        "architectures": ["CLIPVisionModelWithProjection" if with_projection else "CLIPVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": c.dim,
        "image_size": c.image_size,
        "intermediate_size": c.mlp_ratio * c.dim,
        "layer_norm_eps": c.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": c.num_heads,
        "num_channels": 3,
        "num_hidden_layers": c.num_layers,
        "patch_size": c.patch_size,
        "projection_dim": c.out_dim,
    }


def image_processor_config(size: int) -> Json:
    """Of the whole picture squeezed to a square, as Wan2.1 gives it to CLIP; diffusers' usual config crops it."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }


def tokenizer_config(text_len: int) -> Json:
    return {
        "eos_token": "</s>",
        "model_max_length": text_len,
        "pad_token": "<pad>",
        "tokenizer_class": "T5TokenizerFast",
        "unk_token": "<unk>",
    }


def scheduler_config(shift: float) -> Json:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def model_index(image: bool, configs: Mapping[str, Json]) -> Json:
    """model_index.json naming the classes of what is there; a part that is not there is null, as diffusers has it."""
    clip = configs.get("image_encoder", {}).get("architectures", [None])[0]
    parts: dict[str, list[str | None]] = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"] if "text_encoder" in configs else [None, None],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"] if "vae" in configs else [None, None],
    }
    if image:
        parts["image_encoder"] = ["transformers", clip] if clip else [None, None]
        parts["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    return {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": "0.33.0",
        **dict(sorted(parts.items())),
    }
