"""Makes the moving picture of the README: `python -m benchmarks.tiny_world.gallery`.

Twelve prompts in the canonical form, one seed for all, nothing chosen by hand.
"""

import argparse
import itertools

import numpy as np
from tqdm import tqdm

from x2v_jax import Pipeline
from x2v_jax.media.video import write_gif

_COLOURS = ("red", "green", "blue", "yellow")
_MOTIONS = (("circle", "left"), ("square", "up"), ("triangle", "right"))
_GAP = 2


def tile(videos: list[np.ndarray], columns: int) -> np.ndarray:
    """[F, H, W, 3] each -> one video with `columns` of them in a row, on white."""
    framed = [np.pad(v, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for v in videos]
    rows = [np.concatenate(framed[i : i + columns], axis=2) for i in range(0, len(framed), columns)]
    return np.concatenate(rows, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="assets/shapes_t2v_4step")
    parser.add_argument("--output", default="docs/images/shapes.gif")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = Pipeline.from_checkpoint(arguments.checkpoint)
    prompts = [f"a {c} {shape} moves {way}" for (shape, way), c in itertools.product(_MOTIONS, _COLOURS)]
    videos = [pipe(prompt, seed=arguments.seed) for prompt in tqdm(prompts, unit="video")]
    write_gif(arguments.output, tile(videos, len(_COLOURS)), fps=16, scale=2)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
