"""Moving Shapes: a procedural world of coloured shapes that move on a plain background, with captions.

64 x 64 pixels, 33 frames (9 latent frames). A scene is a handful of numbers, drawn from a key; the video is rendered
from it by signed distances. Captions are written from a small grammar; a fifth of them (by hash, never the canonical
"a red circle moves left") is held out from training, so that prompts for measuring are unseen. Prompts
have real videos, too: what a perfect model would make.
"""

import itertools
import pathlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from x2v_jax.media.pixels import to_uint8

SIZE = 64
NUM_FRAMES = 33

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

_COLOUR_RGB = np.array([(0.90, 0.10, 0.10), (0.10, 0.72, 0.15), (0.13, 0.25, 0.95), (0.95, 0.85, 0.10)], np.float32)
_BACKGROUND_GREY = np.array([0.06, 0.80], np.float32)
_STEP_XY = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)  # y grows downwards

# Shapes are told apart on an 8-pixel latent grid only when they are a good part of the picture.
_RADIUS = (9.0, 12.0)
_PATH = (24.0, 38.0)
_MARGIN = 1.0
SMALL_BELOW, BIG_ABOVE = 9.8, 11.2  # radii below and above which a caption may say so

TEXT_LEN = 16  # tokens of a caption
_SPECIAL = ("<pad>", "</s>", "<unk>")  # the same ids as UMT5's special tokens

# Of real videos for prompts.
_BATCH = 32
# A prompt names one of 48 combinations and perhaps a narrow range of sizes: so many draws hold dozens of each.
_POOL = 20_000


class Scene(NamedTuple):
    """A batch of scenes; every field has shape [n]. Indices into COLOURS, SHAPES, DIRECTIONS; lengths in pixels."""

    colour: Int[Array, " n"]
    shape: Int[Array, " n"]
    direction: Int[Array, " n"]
    background: Int[Array, " n"]
    radius: Float[Array, " n"]
    path: Float[Array, " n"]
    start_x: Float[Array, " n"]
    start_y: Float[Array, " n"]


def sample_scenes(key: Array, n: int) -> Scene:
    """n scenes whose shape stays inside the picture from the first frame to the last."""
    keys = jax.random.split(key, 8)
    radius = jax.random.uniform(keys[4], (n,), minval=_RADIUS[0], maxval=_RADIUS[1])
    direction = jax.random.randint(keys[2], (n,), 0, len(DIRECTIONS))
    low, high = radius + _MARGIN, SIZE - radius - _MARGIN
    path = jax.random.uniform(keys[5], (n,), minval=_PATH[0], maxval=jnp.minimum(_PATH[1], high - low))
    along = low + jax.random.uniform(keys[6], (n,)) * (high - low - path)
    across = low + jax.random.uniform(keys[7], (n,)) * (high - low)
    step = jnp.asarray(_STEP_XY)[direction]
    along = jnp.where(step.sum(-1) > 0, along, SIZE - along)  # left and up start at the far side
    horizontal = step[:, 0] != 0
    return Scene(
        colour=jax.random.randint(keys[0], (n,), 0, len(COLOURS)),
        shape=jax.random.randint(keys[1], (n,), 0, len(SHAPES)),
        direction=direction,
        background=jax.random.randint(keys[3], (n,), 0, len(_BACKGROUND_GREY)),
        radius=radius,
        path=path,
        start_x=jnp.where(horizontal, along, across),
        start_y=jnp.where(horizontal, across, along),
    )


def render(
    scenes: Scene, num_frames: int = NUM_FRAMES, first_frame: Int[Array, " n"] | int = 0
) -> Float[Array, "n f 64 64 3"]:
    """Videos in [-1, 1]: `num_frames` frames of each scene from `first_frame` on. `path` is what 33 frames cover."""
    time = (jnp.reshape(first_frame, (-1, 1)) + jnp.arange(num_frames)) / (NUM_FRAMES - 1)
    step = jnp.asarray(_STEP_XY)[scenes.direction] * scenes.path[:, None]
    centre_x = scenes.start_x[:, None] + step[:, :1] * time
    centre_y = scenes.start_y[:, None] + step[:, 1:] * time
    grid = jnp.arange(SIZE) + 0.5
    x = grid[None, None, None, :] - centre_x[:, :, None, None]
    y = grid[None, None, :, None] - centre_y[:, :, None, None]
    r = scenes.radius[:, None, None, None]
    distances = jnp.stack([jnp.hypot(x, y) - r, _square(x, y, r), _triangle(x, y, r)])
    distance = jnp.take_along_axis(distances, scenes.shape[None, :, None, None, None], axis=0)[0]
    cover = jnp.clip(0.5 - distance, 0.0, 1.0)[..., None]
    colour = jnp.asarray(_COLOUR_RGB)[scenes.colour][:, None, None, None, :]
    background = jnp.asarray(_BACKGROUND_GREY)[scenes.background][:, None, None, None, None]
    return (cover * colour + (1 - cover) * background) * 2.0 - 1.0


def _square(x: Array, y: Array, r: Array) -> Array:
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.92 * r


def _triangle(x: Array, y: Array, r: Array) -> Array:
    # Point up, as wide as high, filling the same box as the circle.
    slanted = (2.0 * jnp.abs(x) - (y + r)) / jnp.sqrt(5.0)
    return jnp.maximum(slanted, y - r)


_ARTICLES = ("a", "one", "the")
_VERBS = ("moves", "slides", "glides", "drifts", "travels")
_WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "to the top", "upwards"),
    "down": ("down", "to the bottom", "downwards"),
}
_FORMS = (
    "{article} {size}{colour} {shape} {verb} {way}",
    "{article} {size}{shape} that is {colour} {verb} {way}",
    "there is {article} {size}{colour} {shape} that {verb} {way}",
)
_SIZES = ("", "small ", "big ")
_WORDINGS = tuple(itertools.product(_FORMS, _ARTICLES, _SIZES, _VERBS, range(3)))


def canonical_prompt(colour: str, shape: str, direction: str) -> str:
    return f"a {colour} {shape} moves {direction}"


def turned(prompt: str) -> str:
    """The canonical prompt of the same shape in the opposite direction: what can follow in this world, which a shape
    never leaves.

    >>> turned("there is one big red circle that drifts to the top")
    'a red circle moves down'

    Raises:
        ValueError: the prompt is not of the grammar.
    """
    words = prompt.split()
    ways = {way.split()[-1]: name for name, forms in _WAYS.items() for way in forms}
    colour, shape = (next((w for w in words if w in names), None) for names in (COLOURS, SHAPES))
    direction = ways.get(words[-1]) if words else None
    if colour is None or shape is None or direction is None:
        raise ValueError(f"{prompt!r} names no colour, shape and direction of this world")
    return canonical_prompt(colour, shape, OPPOSITE[direction])


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept for measuring. The canonical form never is."""
    words = prompt.split()
    canonical = len(words) == 5 and words[0] == "a" and words[3] == "moves"
    return not canonical and zlib.crc32(prompt.encode()) % 5 == 0


def captions(scenes: Scene, seed: int, *, canonical_share: float = 1 / 3) -> list[str]:
    """One training caption a scene: the canonical form for a third of them, else a wording that is not held out."""
    rng = np.random.default_rng(seed)
    fields = [np.asarray(f) for f in (scenes.colour, scenes.shape, scenes.direction, scenes.radius)]
    return [
        _caption(rng, COLOURS[c], SHAPES[s], DIRECTIONS[d], float(r), canonical_share)
        for c, s, d, r in zip(*fields, strict=True)
    ]


def _caption(
    rng: np.random.Generator, colour: str, shape: str, direction: str, radius: float, canonical_share: float
) -> str:
    if rng.random() < canonical_share:
        return canonical_prompt(colour, shape, direction)
    while True:
        form, article, size, verb, way = _WORDINGS[rng.integers(len(_WORDINGS))]
        fits = not size or (radius < SMALL_BELOW if size == "small " else radius > BIG_ABOVE)
        prompt = _write(form, article, size, verb, way, colour, shape, direction)
        if fits and not is_held_out(prompt):
            return prompt


def _write(form: str, article: str, size: str, verb: str, way: int, colour: str, shape: str, direction: str) -> str:
    return form.format(article=article, size=size, colour=colour, shape=shape, verb=verb, way=_WAYS[direction][way])


class Prompt(NamedTuple):
    """A prompt and what it asks for (indices into COLOURS, SHAPES, DIRECTIONS)."""

    text: str
    colour: int
    shape: int
    direction: int


def heldout_prompts(n: int, seed: int) -> list[Prompt]:
    """n different prompts that training never shows, spread evenly over colour x shape x direction."""
    rng = np.random.default_rng(seed)
    pools: dict[tuple[int, int, int], list[str]] = {}
    for c, s, d in itertools.product(range(len(COLOURS)), range(len(SHAPES)), range(len(DIRECTIONS))):
        texts = (_write(*wording, COLOURS[c], SHAPES[s], DIRECTIONS[d]) for wording in _WORDINGS)
        held = [text for text in texts if is_held_out(text)]
        pools[c, s, d] = [held[i] for i in rng.permutation(len(held))]
    chosen: list[Prompt] = []
    while len(chosen) < n:
        order = [list(pools)[i] for i in rng.permutation(len(pools))]
        if not any(pools[labels] for labels in order):
            raise ValueError(f"only {len(chosen)} prompts are held out, {n} were asked for")
        chosen += [Prompt(pools[labels].pop(), *labels) for labels in order if pools[labels]][: n - len(chosen)]
    return chosen


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    words = {w for form in _FORMS for w in form.split() if "{" not in w}
    words |= {*COLOURS, *SHAPES, *_ARTICLES, *_VERBS, "small", "big"}
    words |= {w for ways in _WAYS.values() for way in ways for w in way.split()}
    return sorted(words)


def make_tokenizer() -> Tokenizer:
    """Word by word, in the file format that the full-size models use."""
    words = [*_SPECIAL, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    punctuation = normalizers.Replace(Regex(r"[^\w\s]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), punctuation])  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore
    return tokenizer


def write_tokenizer(path: pathlib.Path) -> None:
    """Writes tokenizer.json."""
    make_tokenizer().save(str(path))


def matching_scenes(prompts: Sequence[Prompt], seed: int) -> Scene:
    """A scene for each prompt, of its colour, shape, direction and (where it is named) size; the rest is random.

    Fields are numpy arrays of shape [len(prompts)].
    """
    pool = jax.tree.map(np.asarray, sample_scenes(jax.random.key(seed), max(_POOL, 100 * len(prompts))))
    size = np.where(pool.radius < SMALL_BELOW, "small", np.where(pool.radius > BIG_ABOVE, "big", ""))
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


def real_videos(prompts: Sequence[Prompt], seed: int) -> Iterator[np.ndarray]:
    """Renders the matching scenes, a batch at a time: [up to 32, F, 64, 64, 3] in [-1, 1]."""
    scenes = matching_scenes(prompts, seed)
    rendered = jax.jit(render)
    for first in range(0, len(prompts), _BATCH):
        rows = np.minimum(np.arange(first, first + _BATCH), len(prompts) - 1)
        batch = rendered(jax.tree.map(lambda field, rows=rows: field[rows], scenes))
        yield np.asarray(batch)[: len(prompts) - first]


def first_frames(prompts: Sequence[Prompt], seed: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """The first frames of `real_videos`, as a picture file would give them."""
    return np.concatenate([to_uint8(batch[:, 0]) for batch in real_videos(prompts, seed)])
