"""Video block by block with a cache: frames a second, and seconds to the first frame."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.sections import Row, guarded
from benchmarks.gpu.settings import SHIFT, STEP_LIST, Models, Settings, models
from benchmarks.gpu.timing import CompileClock, peak_bytes
from benchmarks.gpu.weights import RandomNetwork
from x2v_jax.diffusion.rollout import Rollout, keyed_noise
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.ops.choice import OpChoice

_BLOCK, _WINDOW = 3, 21
# After so many blocks the window is full, and every block takes as long as the one before.
_FULL_AFTER = _WINDOW // _BLOCK
_VARIANTS = (("int8", "int8", OpChoice(attention_precision="int8"), "int8"), ("bf16", None, OpChoice(), "bfloat16"))


def stream_rows(name: str, settings: Settings) -> Iterator[Row]:
    """One row a variant: of weights, attention and cache."""
    for variant, quantization, ops, cache_dtype in _VARIANTS[:1] if settings.tiny else _VARIANTS:
        about = {"model": name, "size": "480P", "variant": variant, "cache": cache_dtype}
        yield guarded(
            settings,
            about,
            lambda q=quantization, o=ops, c=cache_dtype: _measure(settings, models(name, "480P", settings), q, o, c),
        )


def _measure(settings: Settings, sizes: Models, quantization: str | None, ops: OpChoice, cache_dtype: str) -> Row:
    config = sizes.transformer
    network = RandomNetwork(config, seed=settings.seed, quantization=quantization, ops=ops)
    runner = VaeRunner(RandomNetwork(sizes.vae, seed=settings.seed))
    jax.block_until_ready((network.load(), runner.network.load()))
    sigmas = tuple(map(float, step_sigmas(STEP_LIST, SHIFT, warp=True)))
    plan = RolloutPlan(sigmas, block=_BLOCK, mode="sliding", window=_WINDOW)
    rollout = Rollout(network.graphdef, config, plan, sizes.latents[1:], cache_dtype=cache_dtype)
    text = jax.random.normal(jax.random.key(settings.seed), (1, config.text_len, config.text_dim))
    blocks = 3 if settings.tiny else _FULL_AFTER + (2 if settings.quick else 6)
    clock = CompileClock()

    def video(count: int, **how: bool) -> "_Times":
        return _Times.of(rollout, network.load(), runner, sizes, text, count, **how)

    try:
        video(2)
        compiling = clock.seconds
        apart, together = video(blocks, decode=True, wait=True), video(blocks, decode=True)
    finally:
        network.release()
    frames = _BLOCK * sizes.vae.temporal_stride
    last = slice(-2, None) if settings.quick or settings.tiny else slice(_FULL_AFTER, None)
    denoise, decode = (statistics.median(times[last]) for times in (apart.denoise, apart.decode))
    whole = statistics.median(together.blocks[last])
    return {
        "seconds": whole,
        "frames_a_second": frames / whole,
        "first_frame_seconds": together.first_frame,
        "denoise_seconds": denoise,
        "vae_seconds": decode,
        "compile_seconds": compiling,
        "peak_bytes": peak_bytes(),
        "blocks": {"denoise": apart.denoise, "vae": apart.decode, "together": together.blocks},
    }


class _Times:
    """Seconds of every block. first_frame: from the text embedding to the first block's first frame on the host."""

    def __init__(self) -> None:
        self.denoise: list[float] = []
        self.decode: list[float] = []
        self.blocks: list[float] = []
        self.first_frame = 0.0

    @classmethod
    def of(
        cls, rollout: Rollout, params: Any, runner: VaeRunner, sizes: Models, text: Any, blocks: int, *,
        decode: bool = True, wait: bool = False,
    ) -> "_Times":  # fmt: skip
        """Makes a video. wait: for the latents before they are decoded, so that the two are told apart."""
        times = cls()
        begin = start = time.perf_counter()
        context = rollout.prepare(params, text)
        noise, renoise = keyed_noise(jax.random.key(0))
        decoder = runner.stream(sizes.latents[1:])
        for latents in rollout.stream(params, context, noise, renoise, blocks * _BLOCK):
            if wait:
                jax.block_until_ready(latents)
            made = time.perf_counter()
            pieces = decoder(jnp.asarray(latents)) if decode else []
            if not times.blocks and pieces:
                jax.block_until_ready(pieces[0])
                times.first_frame = time.perf_counter() - begin
            jax.block_until_ready(pieces)
            end = time.perf_counter()
            times.denoise.append(made - start)
            times.decode.append(end - made)
            times.blocks.append(end - start)
            start = end
        return times
