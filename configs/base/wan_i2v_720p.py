"""Wan2.1 I2V 14B 720P as published: 40 UniPC steps with guidance 5 and shift 5, 81 frames of about 720x1280.

Hardware: one GPU with 80 GB.
Time: not measured at full size.
Result: 80 network passes; the published model's quality, against which distilled ones are compared.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="i2v",
        checkpoint="checkpoints/wan_i2v_14b_720p",
        num_inference_steps=40,
        guidance_scale=5.0,
        shift=5.0,
        height=720,
        width=1280,
        num_frames=81,
        seed=42,
    )
