"""Wan2.1 T2V 14B as published: 50 UniPC steps with guidance 5 and shift 5, 81 frames of 480x832.

`--config.height=720 --config.width=1280` makes its larger size.

Hardware: one GPU with 80 GB.
Time: not measured at full size.
Result: 100 network passes; the published model's quality, against which distilled ones are compared.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="t2v",
        checkpoint="checkpoints/wan_t2v_14b",
        num_inference_steps=50,
        guidance_scale=5.0,
        shift=5.0,
        height=480,
        width=832,
        num_frames=81,
        seed=42,
    )
