"""Image to video with the tiny model, in four steps: the shape in the picture begins to move.

Hardware: any CPU or GPU, under 2 GB of memory.
Result: an mp4 in outputs/ that begins with the picture (64x64, such as docs/images/first_frame.png) and goes on as the
prompt says. Other pictures are resized; the model knows shapes on plain backgrounds only.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        checkpoint="assets/shapes_i2v_4step",
        image="docs/images/first_frame.png",
        prompt="a blue square moves right",
    )
