"""The sampling settings that published checkpoints were made for: their files do not say them, ours do."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.checkpoint.native.fields import check_schedule_field
from x2v_jax.checkpoint.published.hints import is_original
from x2v_jax.errors import UserError, did_you_mean, is_number
from x2v_jax.models.config import NEGATIVE_PROMPTS, CausalSchedule, Schedule, WanConfig, is_published_size

_NEGATIVE = NEGATIVE_PROMPTS["wan"]
_HD: dict[str, Any] = {"height": 720, "width": 1280}


def _distilled(steps: tuple[int, ...], **values: Any) -> Schedule:
    return Schedule(
        sampler="step_distill",
        num_inference_steps=len(steps),
        guidance_scale=1.0,
        denoising_step_list=steps,
        **values,
    )


_FOUR_STEPS = (1000, 750, 500, 250)

SCHEDULES: Mapping[str, Schedule] = {
    "t2v_1_3b": Schedule(shift=8.0, guidance_scale=6.0, negative_prompt=_NEGATIVE),
    "t2v_14b": Schedule(shift=5.0, guidance_scale=5.0, negative_prompt=_NEGATIVE),
    "i2v_480p": Schedule(num_inference_steps=40, shift=3.0, guidance_scale=5.0, negative_prompt=_NEGATIVE),
    "i2v_720p": Schedule(num_inference_steps=40, shift=5.0, guidance_scale=5.0, negative_prompt=_NEGATIVE, **_HD),
    "distill": _distilled(_FOUR_STEPS, shift=5.0),
    "self_forcing": _distilled(_FOUR_STEPS, shift=5.0, causal=CausalSchedule()),
    # This list holds ODE steps of a schedule that was shifted by 8 already: to warp it again ends at sigma 0.39.
    "causvid": _distilled(
        (999, 934, 862, 756, 603, 410, 250, 140, 74),
        shift=8.0,
        warp_denoising_step=False,
        causal=CausalSchedule(mode="fragments"),
    ),
}


def default_schedule(variant: str, config: WanConfig | None, where: str = "") -> Schedule:
    """The published settings of a variant.

    Args:
        variant: base, distill, causvid or self_forcing.
        config: the transformer's sizes; they tell 1.3B from 14B and text from image to video.
        where: the source's path: I2V 480P and 720P have the same tensors and differ by their folder's name only.
    """
    image = config is not None and config.model_type == "i2v"
    high = image and resolution_in(where) == "720p"
    if variant != "base":
        return dataclasses.replace(SCHEDULES[variant], **(_HD if high else {}))
    if image:
        return SCHEDULES["i2v_720p" if high else "i2v_480p"]
    return SCHEDULES["t2v_1_3b" if config is None or config.dim <= 1536 else "t2v_14b"]


def flow_shift(scheduler_file: pathlib.Path | None) -> float | None:
    """The time shift that the scheduler_config.json of a diffusers folder states; None where it states none.

    Raises:
        UserError: the file is damaged.
    """
    config = {} if scheduler_file is None else read_json(scheduler_file)
    shift = config.get("flow_shift", config.get("shift"))
    return float(shift) if is_number(shift) and shift > 0 else None


def with_flow_shift(
    schedule: Schedule, shift: float | None, config: WanConfig, names: Sequence[str]
) -> tuple[Schedule, str | None]:
    """The schedule with the shift that a diffusers folder states, unless the folder is a published model.

    Of those Wan's own number counts.

    Args:
        shift: as `flow_shift` gives it. config: of the transformer. names: of the folder; see `hints.folder_names`.

    Returns:
        The schedule, and a sentence for the user where the file says another shift than the usual one.
    """
    if shift is None or shift == schedule.shift:
        return schedule, None
    said = f"scheduler_config.json says flow_shift {shift:g}"
    if is_published_size(config) and any(map(is_original, names)):
        return schedule, f"{said}, and Wan's own {schedule.shift:g} for this model counts; --schedule says otherwise"
    changed = dataclasses.replace(schedule, shift=shift)
    return changed, f"{said}, which counts here in place of the usual {schedule.shift:g}"


def resolution_in(path: str) -> str | None:
    """ "480p" or "720p", whichever stands last in a path; None when neither does.

    >>> resolution_in("/data/720p/Wan2.1-I2V-14B-480P/config.json")
    '480p'
    """
    found = re.findall(r"480p|720p", path.lower())
    return found[-1] if found else None


def override_schedule(text: str, default: Schedule) -> Schedule:
    """Reads --schedule: a published name, a JSON object whose fields replace the default's, or a file of such.

    Raises:
        UserError: none of these, an unknown field, or a value of the wrong type.
    """
    if text in SCHEDULES:
        return SCHEDULES[text]
    values = _values(text)
    fields = {f.name: f for f in dataclasses.fields(Schedule)}
    for name, value in values.items():
        if name not in fields:
            advice = did_you_mean(name, fields, f"the fields are {', '.join(fields)}")
            raise UserError(f"--schedule: unknown field {name!r}; {advice}")
        check_schedule_field(name, value, getattr(default, name))
    changed = Schedule.from_dict(default.to_dict() | values)
    if "denoising_step_list" in values and changed.denoising_step_list and "num_inference_steps" not in values:
        changed = dataclasses.replace(changed, num_inference_steps=len(changed.denoising_step_list))
    unwarped = changed.is_distilled and not changed.warp_denoising_step
    if unwarped and default.warp_denoising_step and "levels" not in values and not _is_causvids(changed):
        # Self-Forcing and FastVideo look such a list up in their table of 1000 levels.
        changed = dataclasses.replace(changed, levels="table")
    if changed.is_distilled != (changed.sampler == "step_distill"):
        raise UserError(
            f"--schedule: sampler {changed.sampler!r} with denoising_step_list {changed.denoising_step_list}; a "
            "step list goes with 'step_distill' and only with it"
        )
    return changed


def _is_causvids(schedule: Schedule) -> bool:
    return schedule.denoising_step_list == SCHEDULES["causvid"].denoising_step_list


def _values(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"--schedule: not valid JSON ({error}); write for example '{{\"shift\": 8.0}}'") from None
        if not isinstance(values, dict):
            raise UserError("--schedule: a JSON object is needed, for example '{\"shift\": 8.0}'")
        return values
    if text.endswith(".json"):
        return read_json(pathlib.Path(text))
    raise UserError(f"--schedule: {text!r} is neither JSON nor one of {', '.join(SCHEDULES)}")
