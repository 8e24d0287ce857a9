"""The teacher of `i2v.py`: the same in 50 UniPC steps with guidance.

Hardware: any CPU or GPU, under 2 GB of memory.
Result: as `i2v.py`'s.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        checkpoint="assets/shapes_i2v",
        image="docs/images/first_frame.png",
        prompt="a blue square moves right",
    )
