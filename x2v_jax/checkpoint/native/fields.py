"""What the fields of model.json, config.json and the command line may hold: types and ranges, before they are used."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import TypeGuard

from x2v_jax.errors import UserError, is_number
from x2v_jax.models.config import QUANTIZABLE, QUANTIZATIONS, CausalSchedule


def check_schedule_field(name: str, value: object, default: object, where: str = "--schedule") -> None:
    """Raises a UserError when a schedule's field has a value that it cannot have."""
    if name == "denoising_step_list":
        good = value is None or (isinstance(value, list) and _is_step_list(value))
        kind = "a falling list of timesteps in 1..1000, or null"
    elif name == "sampler":
        good, kind = value in ("unipc", "step_distill"), "'unipc' or 'step_distill'"
    elif name == "levels":
        good, kind = value in ("exact", "table"), "'exact' or 'table'"
    elif name == "causal":
        good, kind = _is_causal_schedule(value), "null, or an object of block, window, mode and the like"
    elif isinstance(default, bool):
        good, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, kind = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a positive integer"
    elif isinstance(default, float):
        good, kind = is_number(value) and value > 0, "a positive number"
    else:
        good, kind = isinstance(value, str), "text"
    if not good:
        raise UserError(f"{where}: {name} is {value!r}; it must be {kind}")


def _is_causal_schedule(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or not set(value) <= {field.name for field in dataclasses.fields(CausalSchedule)}:
        return False
    good = {
        "mode": lambda v: v in ("full", "sliding", "fragments"),
        "positions": lambda v: v in ("relative", "absolute"),
        "independent_first_frame": lambda v: isinstance(v, bool),
        "context_timestep": lambda v: v is None or (is_number(v) and 0 <= v <= 1000),
        "sink": lambda v: _is_whole(v) and v >= 0,
        "block": lambda v: _is_whole(v) and v > 0,
        "window": lambda v: _is_whole(v) and v > 0,
    }
    return all(good[name](v) for name, v in value.items())


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_step_list(values: list[object]) -> bool:
    steps = [value for value in values if is_number(value) and 0 < value <= 1000]
    return bool(steps) and len(steps) == len(values) and all(a > b for a, b in itertools.pairwise(steps))


_WHOLE = ("num_attention_heads", "attention_head_dim", "d_kv", "intermediate_size")


_LISTS = {"patch_size": int, "dim_mult": int, "temporal_downsample": bool, "latents_mean": float, "latents_std": float}


def check_sizes(
    component: str, said: Mapping[str, object], config: Mapping[str, object], where: str = "in config.json or --set"
) -> None:
    """Refuses, say, a text where a number belongs, which would otherwise surface as an error far from the file.

    Args:
        said: values by our names. config: the whole file, for the sizes that only diffusers' name. where: they stand.
    """
    for name, value in {**said, **{key: config[key] for key in _WHOLE if config.get(key) is not None}}.items():
        if name in _LISTS and component != "image_encoder":  # CLIP's patch_size is one number
            kind = "a list of " + ("true and false" if _LISTS[name] is bool else "numbers")
            good = isinstance(value, tuple | list) and all(_is_a(_LISTS[name], item) for item in value)
        elif name in ("model_type", "eps"):
            good, kind = (
                _is_a(str if name == "model_type" else float, value),
                "a text" if name[0] == "m" else "a number",
            )
        else:
            good, kind = isinstance(value, int) and _is_a(int, value) and value > 0, "a whole number above 0"
        if not good:
            raise UserError(f"{component}: {name} is {value!r} {where}; it must be {kind}")


def _is_a[T](kind: type[T], value: object) -> TypeGuard[T]:
    if kind in (bool, str):
        return isinstance(value, kind)
    return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)


def check_quantization(file: pathlib.Path, entries: object) -> None:
    """Raises a UserError when model.json says of a network that it is 8-bit in a way that is not run."""
    if entries is None:
        return
    if not isinstance(entries, dict):
        raise UserError(f"{file}: quantization is no JSON object; convert the checkpoint again")
    for component, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if component not in QUANTIZABLE or dtype not in QUANTIZATIONS:
            raise UserError(
                f"{file}: quantization of {component} is {dtype!r}; this program runs {' and '.join(QUANTIZATIONS)} "
                f"for {', '.join(QUANTIZABLE)}. Update it, or convert the checkpoint again"
            )
        alpha = entry.get("smoothing")
        if alpha is not None and not (is_number(alpha) and 0 <= alpha <= 1 and component == "transformer"):
            raise UserError(
                f"{file}: smoothing of {component} is {alpha!r}; transformers have a number from 0 to 1, other "
                "networks none. Convert the checkpoint again"
            )
