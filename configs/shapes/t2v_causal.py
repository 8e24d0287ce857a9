"""The tiny causal model that ships with the repository: a coloured shape moves, in blocks of 9, 12, 12, … frames.

Its window is 33 frames of 64x64; `--config.seconds=20` or `--config.endless=true` (until Ctrl-C) go on past that with a
sliding window, `--config.rollout.mode=fragments` with CausVid's overlapping fragments.

Task: text to video, of any length.
Hardware: any CPU or GPU, under 2 GB of memory.
Result: an mp4 in outputs/ that can be watched while it grows, and whose shape, colour and direction are those of the
prompt ("a red circle moves left").
Command: python -m infer --config=configs/shapes/t2v_causal.py --config.seconds=20
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(checkpoint="assets/shapes_causal", prompt="a red circle moves left")
