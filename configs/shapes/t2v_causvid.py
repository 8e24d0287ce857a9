"""The tiny causal model by CausVid's recipe: nine steps a block, fragments that overlap by one block.

Task: text to video, of any length.
Hardware: any CPU or GPU, under 2 GB of memory.
Result: an mp4 in outputs/ whose shape, colour and direction are those of the prompt ("a red circle moves left").
Command: python -m infer --config=configs/shapes/t2v_causvid.py --config.num_fragments=2
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(checkpoint="assets/shapes_causvid", prompt="a red circle moves left")
