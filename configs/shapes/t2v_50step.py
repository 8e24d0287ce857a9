"""The teacher of `t2v.py`: the same videos in 50 UniPC steps with guidance.

Hardware: any CPU or GPU, under 2 GB of memory.
Result: an mp4 in outputs/ whose shape, colour and direction are those of the prompt ("a red circle moves left").
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(checkpoint="assets/shapes", prompt="a red circle moves left")
