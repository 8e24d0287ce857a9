"""The keys that every inference config has, defined once.

A config file has a function get_config() that returns inference_config(KEY=VALUE, ...) with the keys it sets.
On the command line a key's underscores may be dots: --config.rollout.mode sets rollout_mode.
"""

import ml_collections

from x2v_jax import shipped
from x2v_jax.config.flags import Key, make_config

# A default that is a type means: None unless set, and then the checkpoint's own schedule decides.
KEYS = (
    Key("checkpoint", "assets/shapes", f"folder of a checkpoint made by `{shipped.command('convert')}`"),
    Key("task", str, "t2v or i2v: refuse a checkpoint that does the other"),
    Key(
        "lora",
        (),
        'LoRAs merged at load: FILE, FILE:0.8, ("FILE", 0.8), {"FILE": 0.8}, or several with commas between them',
    ),
    Key("prompt", "", "what the video shows"),
    Key("negative_prompt", str, "what it should not show, or wan for Wan2.1's own; needs guidance"),
    Key(
        "prompt_file",
        str,
        "file of prompts, one a line, # for comments; or JSONL with prompt, image, seed, size, output; - for stdin",
    ),
    Key("image", str, "first frame (image-to-video and causal checkpoints); a folder or pattern for a video of each"),
    Key("pin_first_frame", False, "make the first frame exactly the encoded image (the published pipelines do not)"),
    Key("height", int, "pixels; image-to-video keeps the image's shape at the area height x width"),
    Key("width", int, "pixels"),
    Key("size_rule", "published", "image-to-video: published (that area, rounded as Wan's code does), or exact"),
    Key("num_frames", int, "4n+1"),
    Key("fps", int, "frames a second of the file"),
    Key("num_inference_steps", int, "UniPC steps"),
    Key("guidance_scale", float, "classifier-free guidance; 1 turns it off"),
    Key("shift", float, "time shift of the noise levels"),
    Key("denoising_step_list", tuple, "timesteps of a step-distilled model, such as 1000,750,500,250"),
    Key("warp_denoising_step", bool, "whether shift is still to be applied to that list"),
    Key("seed", 0, "0 to 2^64 - 1; -1 draws one"),
    Key("num_videos", 1, "videos for each prompt, with seeds seed, seed + 1, …"),
    Key(
        "output",
        "outputs/",
        "an .mp4 (.gif, .webp, .png of one frame), or a folder where files are named by prompt and seed",
    ),
    Key("existing", "rename", "where a file is there: rename (the next free name), skip (go on after it) or overwrite"),
    Key("overwrite", False, "the same as existing=overwrite"),
    Key("embed_settings", True, "write the settings into the mp4; false leaves them to the JSON beside it"),
    Key("dtype", "bfloat16", "of matmuls and weights: bfloat16, or float32 for everything in float32"),
    Key("vae_dtype", "float32", "of the VAE's convolutions and weights: float32, or bfloat16 for half the memory"),
    Key("attention", "auto", "who computes attention: auto, reference, cudnn or hopper"),
    Key("attention_precision", "full", "full; 8 bits: int8, e4m3 (queries, keys), int8_e4m3, e4m3_all (values too)"),
    Key("linear", "auto", "who multiplies 8-bit weights: auto, reference, xla or hopper"),
    Key("linear_activations", "8bit", "with 8-bit weights: 8bit, or 16bit, which is slower and more exact"),
    Key("keep_encoders", False, "leave text and image encoders on the device while denoising"),
    Key("sequential_guidance", False, "two passes a step instead of one of twice the batch: slower, less memory"),
    Key(
        "denoising_loop",
        "unrolled",
        "with progress=false, how the steps of a distilled model are one program: unrolled (up to 16), or scan",
    ),
    Key("vae_decode", "auto", "auto, whole, stream (in time) or tiled (in time and space): from fast to small"),
    Key("offload", "none", "none, or blocks: the transformer's blocks wait in the host's memory, for small GPUs"),
    Key("memory_limit", float, "GB of the device's memory that a video may take by prediction"),
    Key(
        "progress",
        True,
        "how far the run is and how long it still takes: a bar, or without a terminal a line every 10 s",
    ),
    Key("allow_mismatch", False, "run settings that contradict the checkpoint's schedule"),
    Key("allow_partial", False, "merge what fits of a LoRA, and only report the rest"),
    Key(
        "initial_noise",
        str,
        "safetensors with `noise` [C, F, H, W] and optionally `renoise` [steps-1, C, F, H, W]; "
        "causal: `noise` [blocks, F, C, H, W] and `renoise` [blocks, steps-1, F, C, H, W]",
    ),
    Key("text_embeddings", str, "safetensors with `text` [L, D] (and `negative_text`), instead of the text encoder"),
    Key("save_latents", str, "safetensors file for `latents` [C, F, H, W], as they are before the VAE"),
    Key(
        "compilation_cache",
        "~/.cache/x2v_jax",
        "folder that keeps compiled programs for the next start; empty for none",
    ),
    Key("compiled_programs", str, "file of compiled programs: --warmup makes it, later runs start from it"),
    # Causal checkpoints, which make the video block by block; for those num_frames is whole blocks.
    Key("seconds", float, "causal: the length, rounded up to whole blocks, instead of num_frames"),
    Key("endless", False, "causal: until interrupted; what exists then is kept and playable"),
    Key("continue_from", str, "causal: save_latents file or mp4 of an earlier run, whose last blocks come before"),
    Key(
        "prompt_schedule",
        (),
        """causal: prompts that follow, with their second: "5: a cat sits; 10: a cat runs", or
                         ((5, "a cat sits"), (10, "a cat runs"))""",
    ),
    Key("rollout_mode", str, "causal (rollout.mode): full, sliding or fragments: how it goes on past the window"),
    Key("rollout_window", int, "causal (rollout.window): latent frames that the network sees, its own included"),
    Key("rollout_sink", int, "causal (rollout.sink): first latent frames that stay visible; sliding only"),
    Key("rollout_positions", str, "causal (rollout.positions): relative or absolute, of the sink"),
    Key("context_noise", float, "causal: timestep at which finished blocks are seen; 0 clean, -1 as the last step was"),
    Key("kv_cache", str, "causal: bfloat16, float32, int8 or int8_e4m3 keys and values; 8 bits are half the memory"),
    Key("num_fragments", int, "causal, LightX2V's: windows of a fragments video, instead of num_frames"),
    Key("num_frame_per_block", int, "causal, LightX2V's: latent frames of a block"),
    Key("num_blocks", int, "causal, LightX2V's: blocks of a window"),
    Key("frame_seq_length", int, "causal, LightX2V's: tokens of a latent frame; checked against height and width"),
)
# Keys that each say how long a video is: one given on the command line replaces the others.
LENGTHS = ("num_frames", "seconds", "endless", "num_fragments")


def inference_config(**values: object) -> ml_collections.ConfigDict:
    """A locked config with the default of every key but those given.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    return make_config(KEYS, **values)
