"""Block-causal transformers: the forward pass of training, and rollouts with a cache. Frames come before channels."""

import itertools
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference.cases_lib.case import Case
from tests.reference.cases_lib.kinds_networks import load_network
from x2v_jax.diffusion.flow import timestep_from_sigma
from x2v_jax.diffusion.rollout import Rollout
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import NUM_TRAIN_TIMESTEPS, Levels, shift_sigma, step_sigmas, step_timesteps
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import Params, merge

_NETWORK_KEYS = {
    "model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers",
    "qk_norm", "cross_attn_norm", "eps", "patch_size",
}  # fmt: skip
_SELF_FORCING_KEYS = {
    "num_frame_per_block", "local_attn_size", "sink_size", "denoising_step_list", "warp_denoising_step",
    "timestep_shift", "context_noise", "independent_first_frame", "levels",
}  # fmt: skip
_CAUSVID_KEYS = {
    "num_fragments", "num_frames", "num_frame_per_block", "num_blocks", "frame_seq_length", "denoising_step_list",
    "sample_shift", "warp_denoising_step", "clean_context_pass",
}  # fmt: skip


def causal_training_forward(case: Case) -> dict[str, Any]:
    """velocity [B,F,C,H,W] of a whole clip under the block-causal mask, with a timestep in each frame."""
    config = _network_config(case, _SELF_FORCING_KEYS)
    window = _whole(case, "local_attn_size", -1)
    # The published mask of training has no sink, whatever sink_size says; only the cache of inference has.
    pattern = CausalPattern(
        _whole(case, "num_frame_per_block", 1),
        None if window == -1 else window,
        independent_first_frame=_flag(case, "independent_first_frame", False),
    )
    graphdef, params = load_network("transformer", config, case.weights)

    @jax.jit
    def forward(params: Params, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> jax.Array:
        return merge(graphdef, params)(latents, timestep, text, causal=pattern)

    latents, timestep = _channels_last(case.inputs["latents"]), jnp.asarray(case.inputs["timestep"], jnp.float32)
    return {"velocity": _channels_first(forward(params, latents, timestep, _padded_text(case, config)))}


def causal_rollout(case: Case) -> dict[str, Any]:
    """latents [B,F,C,H,W] of Self-Forcing's sampler, the velocity of each block's first step, and the noise levels."""
    config = _network_config(case, _SELF_FORCING_KEYS)
    frames, window = case.inputs["noise"].shape[1], _whole(case, "local_attn_size", -1)
    shift = float(case.config["timestep_shift"])
    sigmas = _sigmas(case, shift)
    plan = RolloutPlan(
        sigmas=tuple(map(float, sigmas)),
        block=_whole(case, "num_frame_per_block", 1),
        mode="full" if window == -1 else "sliding",
        window=frames if window == -1 else window,
        sink=0 if window == -1 else _whole(case, "sink_size", 0),
        positions="absolute",
        context_timestep=float(case.config["context_noise"]),
        independent_first_frame=_flag(case, "independent_first_frame", False),
        timesteps=_timesteps(case),
    )
    noise = _channels_last(case.inputs["noise"])
    starts = np.cumsum([0, *(step.frames for step in plan.steps(frames))])
    latents, velocities = _roll(case, config, plan, [noise[:, a:b] for a, b in itertools.pairwise(starts)])
    # The published scheduler's table of 1000 levels, which a warped list is looked up in.
    table = shift_sigma(1.0 - np.arange(NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS, shift)
    return {
        "latents": latents,
        "first_step_velocity": velocities,
        "levels": sigmas,
        "timesteps": np.asarray(plan.asked_timesteps, np.float32),
        "train_sigmas": table,
        "train_timesteps": timestep_from_sigma(table),
    }


def causvid_rollout(case: Case) -> dict[str, Any]:
    """latents [B,F,C,H,W] over fragments that overlap by a block, and the noise levels."""
    config = _network_config(case, _CAUSVID_KEYS)
    block, horizon = _whole(case, "num_frame_per_block", 1), _whole(case, "num_frames", 1)
    if horizon != block * _whole(case, "num_blocks", 1):
        raise ValueError(f"{case.path}: num_frames {horizon} is not num_blocks blocks of {block}")
    noise = _channels_last(case.inputs["noise"])
    tokens = math.prod(n // p for n, p in zip(noise.shape[3:5], config.patch_size[1:], strict=True))
    if _whole(case, "frame_seq_length", 1) != tokens:
        raise ValueError(f"{case.path}: frame_seq_length is {case.config['frame_seq_length']}, the noise has {tokens}")
    sigmas = _sigmas(case, float(case.config["sample_shift"]))
    plan = RolloutPlan(
        sigmas=tuple(map(float, sigmas)),
        block=block,
        mode="fragments",
        window=horizon,
        context_timestep=0.0 if _flag(case, "clean_context_pass") else None,
    )
    expected = _whole(case, "num_fragments", 1) * (horizon // block - 1) + 1
    if len(noise) != expected:
        raise ValueError(
            f"{case.path}: noise for {len(noise)} blocks where num_fragments and num_blocks ask {expected}"
        )
    latents, _ = _roll(case, config, plan, list(noise))
    return {"latents": latents, "sigmas": sigmas, "timesteps": timestep_from_sigma(sigmas)}


def _roll(case: Case, config: WanConfig, plan: RolloutPlan, noise: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(latents, velocity of each block's first step), from the recorded noise of each block."""
    graphdef, params = load_network("transformer", config, case.weights)
    renoise = _channels_last(case.inputs["renoise"])
    batch, _, *size, _ = noise[0].shape
    rollout = Rollout(graphdef, config, plan, (size[0], size[1]), batch=batch, cache_dtype=jnp.float32)
    context = rollout.prepare(params, _padded_text(case, config))
    first_timestep = jnp.full((batch,), timestep_from_sigma(plan.sigmas[0]), jnp.float32)

    @jax.jit
    def first_velocity(params: Params, cache: Any, latents: jax.Array, start_frame: jax.Array) -> jax.Array:
        return merge(graphdef, params).with_cache(latents, first_timestep, context, cache, start_frame)[0]

    block, velocities = rollout.block, []

    def watched(
        params: Params, context: Any, cache: Any, latents: jax.Array, added: Any, start: Any, first: Any, *rest
    ):
        if first == 0:
            velocities.append(first_velocity(params, cache, latents, start))
        return block(params, context, cache, latents, added, start, first, *rest)

    rollout.block = watched
    stream = rollout.stream(
        params,
        context,
        lambda block, shape: noise[block],
        lambda block, steps, shape: renoise[block][:, :, : shape[1]],
        sum(part.shape[1] for part in noise),
    )
    latents = _joined(stream)
    return latents, _joined(velocities)


def _network_config(case: Case, keys: Collection[str]) -> WanConfig:
    """The network's config, if every key of the case is known and asks for what the library has.

    Raises:
        ValueError: otherwise.
    """
    if unknown := set(case.config) - _NETWORK_KEYS - set(keys):
        raise ValueError(
            f"{case.path}: config has {', '.join(sorted(unknown))}, which kind {case.kind!r} does not know"
        )
    for key in ("qk_norm", "cross_attn_norm"):
        if not _flag(case, key, True):
            raise ValueError(f"{case.path}: {key} is false; the library has only networks with it")
    config = WanConfig.from_dict(case.config)
    if config.model_type != "t2v":
        raise ValueError(f"{case.path}: model_type is {config.model_type!r}; causal cases are of 't2v' networks")
    return config


def _sigmas(case: Case, shift: float) -> np.ndarray:
    steps = list(case.config["denoising_step_list"])
    # CausVid's lists end with the timestep of the clean pass, which is no denoising step.
    steps = steps[:-1] if steps and steps[-1] == 0 else steps
    return step_sigmas(steps, shift, warp=_flag(case, "warp_denoising_step"), levels=_levels(case))


def _timesteps(case: Case) -> tuple[float, ...] | None:
    steps = case.config["denoising_step_list"]
    return step_timesteps(steps, warp=_flag(case, "warp_denoising_step"), levels=_levels(case))


def _levels(case: Case) -> Levels:
    levels = case.config.get("levels", "exact")
    if levels not in ("exact", "table"):
        raise ValueError(f"{case.path}: levels is {levels!r}, neither 'exact' nor 'table'")
    return levels


def _padded_text(case: Case, config: WanConfig) -> jax.Array:
    text = jnp.asarray(case.inputs["text"], jnp.float32)
    return jnp.pad(text, ((0, 0), (0, config.text_len - text.shape[1]), (0, 0)))


def _whole(case: Case, key: str, least: int) -> int:
    value = case.config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{case.path}: {key} is {value!r}, not a whole number of at least {least}")
    return value


def _flag(case: Case, key: str, default: bool | None = None) -> bool:
    value = case.config[key] if default is None else case.config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{case.path}: {key} is {value!r}, not true or false")
    return value


def _joined(blocks: Iterable[jax.Array]) -> jax.Array:
    return _channels_first(jnp.concatenate(list(blocks), axis=1))


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), -3, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)
