"""The tiny model that ships with the repository: 33 frames of 64x64 in which a coloured shape moves, in four steps.

Hardware: any CPU or GPU, under 2 GB of memory.
Result: an mp4 in outputs/ whose shape, colour and direction are those of the prompt ("a red circle moves left").
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(checkpoint="assets/shapes_t2v_4step", prompt="a red circle moves left")
