"""Wan2.1 I2V 14B, step-distilled by LightX2V: 4 steps without guidance, 81 frames of about 480x832 pixels.

The image (`--config.image=FILE`) is the first frame, and gives the video its shape. Make the checkpoint with
`python -m convert wan SOURCE checkpoints/wan_i2v_14b_480p_4step --variant distill`.

Hardware: one GPU with 80 GB (the weights are 32.8 GB in bfloat16); with
8-bit weights one with 24 GB, or 16 GB with offload="blocks": docs/small_gpus.md.
Time: not measured at full size.
Result: one network pass a step, 4 in all; a video of 5 seconds at 16 frames a second.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="i2v",
        checkpoint="checkpoints/wan_i2v_14b_480p_4step",
        denoising_step_list=(1000, 750, 500, 250),
        shift=5.0,
        guidance_scale=1.0,
        height=480,
        width=832,
        num_frames=81,
        seed=42,
    )
