"""Wan2.1 T2V 14B, step-distilled by LightX2V: 4 steps without guidance, 81 frames of 480x832.

Make the checkpoint with `python -m convert wan SOURCE checkpoints/wan_t2v_14b_4step --variant distill`, where SOURCE
is a folder that holds distill_models/.

Hardware: one GPU with 80 GB (the weights are 28.6 GB in bfloat16, the text encoder 11.4 GB before they are loaded);
with 8-bit weights one with 24 GB, or 16 GB with offload="blocks": docs/small_gpus.md.
Time: not measured at full size.
Result: one network pass a step, 4 in all; a video of 5 seconds at 16 frames a second.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="t2v",
        checkpoint="checkpoints/wan_t2v_14b_4step",
        denoising_step_list=(1000, 750, 500, 250),
        shift=5.0,
        guidance_scale=1.0,
        height=480,
        width=832,
        num_frames=81,
        seed=42,
    )
