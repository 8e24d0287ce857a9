"""Real videos of Moving Shapes for given prompts: what a perfect model would make."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from x2v_jax.media.pixels import to_uint8

from . import world

_BATCH = 32
# A prompt names one of 48 combinations and perhaps a narrow range of sizes: so many draws hold dozens of each.
_POOL = 20_000


def matching_scenes(prompts: Sequence[world.Prompt], seed: int) -> world.Scene:
    """A scene for each prompt, of its colour, shape, direction and (where it is named) size; the rest is random.

    Fields are numpy arrays of shape [len(prompts)].
    """
    pool = jax.tree.map(np.asarray, world.sample_scenes(jax.random.key(seed), max(_POOL, 100 * len(prompts))))
    size = np.where(pool.radius < world.SMALL_BELOW, "small", np.where(pool.radius > world.BIG_ABOVE, "big", ""))
    drawn: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for i, labels in enumerate(zip(pool.colour, pool.shape, pool.direction, strict=True)):
        drawn[tuple(map(int, labels))].append(i)  # pyright: ignore[reportArgumentType]
    rows = []
    for prompt in prompts:
        candidates = drawn[prompt.colour, prompt.shape, prompt.direction]
        named = {"small", "big"} & set(prompt.text.split())
        place = next(j for j, i in enumerate(candidates) if not named or size[i] in named)
        rows.append(candidates.pop(place))
    return jax.tree.map(lambda field: field[rows], pool)


def real_videos(prompts: Sequence[world.Prompt], seed: int) -> Iterator[np.ndarray]:
    """Renders the matching scenes, a batch at a time: [up to 32, F, 64, 64, 3] in [-1, 1]."""
    scenes = matching_scenes(prompts, seed)
    render = jax.jit(world.render)
    for first in range(0, len(prompts), _BATCH):
        rows = np.minimum(np.arange(first, first + _BATCH), len(prompts) - 1)
        batch = render(jax.tree.map(lambda field, rows=rows: field[rows], scenes))
        yield np.asarray(batch)[: len(prompts) - first]


def first_frames(prompts: Sequence[world.Prompt], seed: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """The first frames of `real_videos`, as a picture file would give them."""
    return np.concatenate([to_uint8(batch[:, 0]) for batch in real_videos(prompts, seed)])
