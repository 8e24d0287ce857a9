"""How the timesteps of a list that is not warped become noise levels: exactly, or by a table that is looked up in."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import random_tensors, save
from tiny_models import CAUSAL, DISTILLED, write_checkpoint

from x2v_jax.checkpoint.conversion.convert import ConversionOptions, convert
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.diffusion import step_distill
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.diffusion.schedules import step_sigmas
from x2v_jax.errors import UserError
from x2v_jax.generate.whole import schedule
from x2v_jax.models.config import Schedule
from x2v_jax.request import Request
from x2v_jax.request.resolve import resolve

STEPS = (1000, 757, 522)
UNWARPED = {"denoising_step_list": [1000, 757, 522], "warp_denoising_step": False, "shift": 8.0}


def test_the_nearest_of_a_thousand_shifted_levels():
    looked_up = step_sigmas((1000, 757, 522, 250), 8.0, warp=False, levels="table")
    np.testing.assert_allclose(looked_up * 1000, [1000, 756.757, 521.739, 250], atol=2e-3)
    causvid = step_sigmas((756, 140, 74), 8.0, warp=False, levels="table")
    np.testing.assert_allclose(causvid * 1000, [755.842, 140.351, 74.766], atol=2e-3)
    assert np.array_equal(step_sigmas(STEPS, 8.0, warp=False), np.float32([1, 0.757, 0.522]))
    assert np.array_equal(step_sigmas(STEPS, 8.0, levels="table"), step_sigmas(STEPS, 8.0)), "warped: no table"
    with pytest.raises(UserError, match="two steps get the same noise level"):
        step_sigmas((500, 7, 6), 8.0, warp=False, levels="table")


@pytest.mark.parametrize("base", [DISTILLED, CAUSAL])
def test_the_network_is_asked_at_the_lists_own_timesteps(tmp_path, base: Schedule):
    own = dataclasses.replace(
        base, denoising_step_list=STEPS, num_inference_steps=3, warp_denoising_step=False, shift=8.0
    )
    path = write_checkpoint(tmp_path / "c", schedule=dataclasses.replace(own, levels="table"))
    plan = resolve(Request(prompt="a"), open_checkpoint(path)).plan
    assert plan.timesteps == STEPS and plan.sigmas[1] == pytest.approx(0.7567567)
    model = json.loads((path / "model.json").read_text())
    del model["schedule"]["levels"]  # as earlier versions wrote it
    (path / "model.json").write_text(json.dumps(model))
    plan = resolve(Request(prompt="a"), open_checkpoint(path)).plan
    assert plan.timesteps is None and plan.sigmas == tuple(map(float, np.float32([1, 0.757, 0.522])))
    if isinstance(plan, RolloutPlan):
        assert plan.asked_timesteps[0] == 1000
        with pytest.raises(UserError, match="give one for each"):
            dataclasses.replace(plan, timesteps=(1000.0,))


def test_a_whole_video_is_sampled_with_pairs_of_level_and_timestep(tmp_path):
    own = dataclasses.replace(
        DISTILLED, denoising_step_list=STEPS, warp_denoising_step=False, shift=8.0, levels="table"
    )
    path = write_checkpoint(tmp_path / "c", schedule=dataclasses.replace(own, num_inference_steps=3))
    plan = resolve(Request(prompt="a"), open_checkpoint(path)).plan
    levels = schedule(plan)  # pyright: ignore[reportArgumentType]
    asked = []

    def one(latents, sigma, following, added):
        return step_distill.evaluate(
            lambda x, t: (asked.append(float(t)), 0.5 * x)[1], latents, sigma, following, added
        ), 0

    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
    between = [0.1 * noise, 0.2 * noise]
    found, _ = step_distill.unrolled(one, noise, levels, lambda i: between[i])
    expected = noise
    for sigma, following, added in zip(plan.sigmas, (*plan.sigmas[1:], 0.0), [*between, 0 * noise], strict=True):
        expected = (1 - following) * (expected - sigma * 0.5 * expected) + following * added
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert asked == list(STEPS)


@pytest.mark.parametrize(
    ("variant", "values", "levels"),
    [
        ("self_forcing", UNWARPED, "table"),
        ("distill", UNWARPED, "table"),
        ("self_forcing", UNWARPED | {"levels": "exact"}, "exact"),
        ("self_forcing", {"shift": 8.0}, "exact"),
        ("causvid", {"shift": 8.0}, "exact"),
        ("distill", UNWARPED | {"denoising_step_list": [999, 934, 862, 756, 603, 410, 250, 140, 74]}, "exact"),
    ],
)
def test_convert_sets_the_table_for_unwarped_lists_but_causvids(tmp_path, variant, values, levels):
    source = save(tmp_path / "m.safetensors", random_tensors("transformer"))
    options = ConversionOptions(
        variant=variant, schedule=json.dumps(values), settings={"transformer": {"num_heads": 2}}
    )
    convert(source, tmp_path / "out", options)
    assert open_checkpoint(tmp_path / "out").schedule.levels == levels
    with pytest.raises(UserError, match="levels is 'nearest'; it must be 'exact' or 'table'"):
        convert(source, tmp_path / "o2", dataclasses.replace(options, schedule='{"levels": "nearest"}'))
