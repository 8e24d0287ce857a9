"""A distilled model's video from prompt or image to file, part by part, with random weights of the published sizes.

The text encoder leaves the device before the transformer is made, as in `x2v_jax.pipeline`. What is not in "end to
end" is loading, which random weights do not need (see `loading`), and compiling, which stands beside.
"""

import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.profile import profiled
from benchmarks.gpu.sections import Row, message
from benchmarks.gpu.settings import SHIFT, STEP_LIST, Models, Settings, models
from benchmarks.gpu.timing import Part, Parts, peak_bytes
from benchmarks.gpu.weights import RandomNetwork
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.denoise import Conditions, Denoiser
from x2v_jax.generate.image import ImageConditioner
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.media.video import write_video
from x2v_jax.ops.choice import OpChoice

_FPS = 16
_PROMPT_TOKENS = 60
# Seconds of denoising from which the steps are run once and not again.
_LONG = 3.0

# name -> (quantization of the weights, who computes, type of the VAE's convolutions). "bf16" are the defaults.
VARIANTS: dict[str, tuple[str | None, OpChoice, str]] = {
    "bf16": (None, OpChoice(), "float32"),
    "int8": ("int8", OpChoice(attention_precision="int8"), "bfloat16"),
    "fp8": ("float8_e4m3fn", OpChoice(attention_precision="e4m3_all"), "bfloat16"),
}


def start(name: str, size: str, variant: str, settings: Settings) -> Iterator[Row]:
    """The same from one call of every part: what compiling takes where the compilation cache holds the programs."""
    return run(name, size, variant, settings, rounds=0)


def run(name: str, size: str, variant: str, settings: Settings, *, rounds: int | None = None) -> Iterator[Row]:
    """Rows of the parts, then one of the whole. An error ends them, with what is known by then.

    Args:
        rounds: calls of a part after its first one; None: as `Parts` has it.
    """
    about = {"model": name, "size": size, "variant": variant, "vae_dtype": VARIANTS[variant][2]}
    parts = Parts(settings, rounds)
    done = 0
    failed = None
    try:
        for _ in _stages(settings, models(name, size, settings), variant, parts):
            for part in parts.found[done:]:
                yield {**about, **part.row()}
            done = len(parts.found)
    except Exception as error:
        failed = message(error)
    whole: Row = {**about, "part": "end to end", "peak_bytes": peak_bytes()}
    if failed is not None:
        yield {**whole, "failed": failed}
        return
    # The steps are what "denoise" is made of.
    counted = [part for part in parts.found if not part.name.startswith("step ")]
    whole["denoised"] = "step by step" if settings.quick else "as one program"
    whole["seconds"] = float(f"{sum(part.median for part in counted):.4g}")
    whole["compile_seconds"] = float(f"{sum(part.compiling for part in counted):.4g}")
    yield whole


def _stages(settings: Settings, sizes: Models, variant: str, parts: Parts) -> Iterator[None]:
    quantization, ops, vae_dtype = VARIANTS[variant]
    text = encode_text(sizes, parts, quantization)
    yield
    runner = VaeRunner(RandomNetwork(sizes.vae, seed=settings.seed, vae_dtype=vae_dtype))
    conditions = Conditions(text, np.float32(1.0))
    if sizes.transformer.model_type == "i2v":
        features, latents = encode_image(sizes, runner, parts)
        conditions = conditions._replace(image_features=features, image_latents=latents)
        yield
    network = RandomNetwork(sizes.transformer, seed=settings.seed, quantization=quantization, ops=ops)
    latents = denoise(settings, sizes, network, conditions, parts)
    yield
    network.release()
    frames = parts("VAE decode", lambda: runner.decode(latents))
    yield
    with tempfile.TemporaryDirectory() as folder:
        parts("video file", lambda: write_video(pathlib.Path(folder, "video.mp4"), frames, _FPS))
    yield


def encode_text(sizes: Models, parts: Parts, quantization: str | None) -> jax.Array:
    """[1, L, D], of random tokens. The encoder is gone afterwards."""
    network = RandomNetwork(sizes.text, quantization=quantization)
    length = sizes.transformer.text_len
    ids = np.random.default_rng(0).integers(0, sizes.text.vocab_size, (1, length), np.int32)
    mask = (np.arange(length) < min(_PROMPT_TOKENS, length))[None].astype(np.int32)
    encode = network.jit(lambda encoder, ids, mask: encoder(ids, mask))
    params = jax.block_until_ready(network.load())
    text = parts("text", lambda: encode(params, ids, mask))
    network.release()
    return text


def encode_image(sizes: Models, runner: VaeRunner, parts: Parts) -> tuple[jax.Array, jax.Array]:
    """CLIP's features, and mask and latents, of a random picture."""
    clip = RandomNetwork(sizes.clip)
    jax.block_until_ready((clip.load(), runner.network.load()))
    picture = np.random.default_rng(0).integers(0, 256, (sizes.height, sizes.width, 3), np.uint8)
    condition = ImageConditioner(clip, runner)
    result = parts("image", lambda: condition(picture, (sizes.frames, sizes.height, sizes.width), Clock()))
    clip.release()
    return result


def denoise(
    settings: Settings, sizes: Models, network: RandomNetwork, conditions: Conditions, parts: Parts
) -> jax.Array:
    """Latents [1, f, h, w, C]. Parts: "denoise", and "step 1", … of it.

    All steps as one program, which holds the network once a step and takes as much longer to compile; with --quick the
    step alone, called once after the other, as the pipeline does where somebody watches.
    """
    params = jax.block_until_ready(network.load())
    sigmas = step_sigmas(STEP_LIST, SHIFT, warp=True)
    denoiser = Denoiser(network.graphdef)
    shape = (1, *sizes.latents, sizes.transformer.out_dim)
    ends: list[float] = []

    def sample(on_step: Any = None) -> jax.Array:
        initial, key = denoiser.draw(settings.seed, shape)
        return denoiser.sample_step_distill(params, conditions, initial, sigmas, key, on_step)

    def step_by_step() -> jax.Array:
        ends.append(time.perf_counter())
        return sample(lambda *_: ends.append(time.perf_counter()))

    latents = parts("denoise", step_by_step if settings.quick else sample)
    if settings.profile:
        counted = len(ends)
        name = "i2v" if sizes.transformer.model_type == "i2v" else "t2v"
        folder = settings.out / "profiles" / f"{name}_{sizes.height}x{sizes.width}_{network.quantization}"
        profiled(folder, step_by_step if settings.quick else sample)
        del ends[counted:]
    whole = parts.found[-1]
    if not settings.quick and parts.rounds != 0:
        parts("denoise", step_by_step, rounds=0 if whole.median > _LONG else None)
        whole = parts.found.pop()
    parts.found += steps(ends, whole) if ends else []
    return latents


def steps(ends: Sequence[float], whole: Part) -> list[Part]:
    """The steps of `whole` apart, as parts that are not counted again. All are one program, compiled in the first.

    Args:
        ends: times at which each run began and its steps ended.
    """
    count = len(STEP_LIST) + 1
    runs = [np.diff(ends[i : i + count]).tolist() for i in range(0, len(ends), count)]
    found = []
    for i in range(len(STEP_LIST)):
        compiling = whole.compiling if i == 0 else 0.0
        seconds = [run[i] for run in runs[1:]] or [runs[0][i] - compiling]
        found.append(Part(f"step {i + 1}", seconds, runs[0][i], compiling))
    return found
