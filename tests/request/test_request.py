"""Requests are completed from the checkpoint's schedule, and every mistake is a sentence that names the fix."""

import dataclasses
import pathlib
import subprocess
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest

from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule, VaeConfig, WanConfig
from x2v_jax.request import Request
from x2v_jax.request.resolve import resolve

BASE = Schedule(num_inference_steps=50, shift=8.0, guidance_scale=6.0, negative_prompt="ugly")
DISTILLED = Schedule(
    sampler="step_distill",
    num_inference_steps=4,
    shift=5.0,
    guidance_scale=1.0,
    denoising_step_list=(1000, 750, 500, 250),
)
ALL = ("transformer", "vae", "text_encoder", "image_encoder", "tokenizer")


def model(
    schedule: Schedule = BASE, *, task: str = "t2v", variant: str | None = None, components: tuple[str, ...] = ALL
) -> Any:
    wan = WanConfig.t2v_1_3b() if task == "t2v" else WanConfig.i2v_14b()
    return types.SimpleNamespace(
        task=task,
        variant=variant or ("distill" if schedule.is_distilled else "base"),
        schedule=schedule,
        config={"transformer": wan, "vae": VaeConfig()}.__getitem__,
        has=components.__contains__,
        path=pathlib.Path("model"),
        files=lambda component: (),
    )


def completed(request: Request, of: Any, **options: Any) -> Request:
    return resolve(request, of, **options).completed


def problem(request: Request, of: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(request, of, **options)
    return str(caught.value)


def test_empty_fields_are_filled_from_the_schedule():
    resolved = completed(Request("a cat"), model())
    assert (resolved.height, resolved.width, resolved.num_frames, resolved.fps) == (480, 832, 81, 16)
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.shift) == (50, 6.0, 8.0)
    assert resolved.negative_prompt == "ugly"
    assert resolved.denoising_step_list is None and resolved.uses_guidance
    assert resolve(Request("a cat"), model()).latent_shape == (21, 60, 104, 16)


def test_given_fields_win_over_the_schedule():
    resolved = completed(Request("a cat", height=720, width=1280, guidance_scale=3, shift=5, seed=9, fps=24), model())
    assert (resolved.height, resolved.width, resolved.guidance_scale, resolved.shift) == (720, 1280, 3.0, 5.0)
    assert (resolved.seed, resolved.fps, resolved.num_frames) == (9, 24, 81)


def test_distilled_checkpoints_bring_their_steps_and_no_guidance():
    resolved = completed(Request("a cat"), model(DISTILLED))
    assert resolved.denoising_step_list == (1000, 750, 500, 250)
    assert resolved.num_inference_steps == 4 and not resolved.uses_guidance and resolved.negative_prompt == ""
    assert resolved.warp_denoising_step is True


def test_resolving_twice_changes_nothing():
    for schedule in (BASE, DISTILLED):
        once = completed(Request("a cat"), model(schedule))
        assert completed(once, model(schedule)) == once


def test_a_missing_seed_is_drawn_and_kept():
    seeds = {completed(Request("a cat"), model()).seed for _ in range(4)}
    assert len(seeds) > 1 and all(seed is not None and 0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"height": 100}, "height is 100; this model makes multiples of 16: use 96 or 112"),
        ({"height": 110}, "use 112 or 96"),
        ({"width": 8}, "width is 8; this model makes multiples of 16: use 16"),
        ({"width": 20000}, "multiples of 16 up to 16384: use 16384"),
        ({"num_frames": 80}, "num_frames is 80; this model makes 4n+1 frames: use 81 or 77"),
        ({"num_frames": 2}, "use 1 or 5"),
        ({"num_frames": 0}, "num_frames is 0; give a whole number from 1"),
        ({"height": -16}, "height is -16; give a whole number from 1"),
        ({"height": "480"}, "height is '480'; give a whole number"),
        ({"height": 480.0}, "height is 480.0; give a whole number"),
        ({"height": True}, "height is True; give a whole number"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "give a whole number from 0 to 18446744073709551615"),
        ({"fps": 0}, "fps is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; give a whole number from 1 to 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; give a number from 0 to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": float("inf")}, "shift is inf"),
        ({"denoising_step_list": ()}, "denoising_step_list is empty"),
        ({"denoising_step_list": (500, 750)}, "timesteps must fall"),
        ({"denoising_step_list": (1010,)}, "1010"),
        ({"prompt": ["a", "b"]}, "prompt is ['a', 'b']; give one string"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"initial_noise": "/no/such/file"}, "initial_noise is '/no/such/file', but there is no such file"),
        ({"text_embeddings": "/no/such/file"}, "text_embeddings is '/no/such/file'"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image is given, but this is a text-to-video checkpoint"),
        ({"pin_first_frame": True}, "pin_first_frame is set, but this is a text-to-video checkpoint"),
        ({"denoising_step_list": (1000, 500)}, "this checkpoint is not distilled and needs its 50 UniPC steps"),
    ],
)
def test_what_a_base_checkpoint_cannot_do_is_refused_with_the_way_out(fields: dict[str, Any], expected: str):
    assert expected in problem(Request(**({"prompt": "a cat"} | fields)), model())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale is 5, but this distilled checkpoint has guidance trained in"),
        ({"denoising_step_list": (1000, 500)}, "was distilled for (1000, 750, 500, 250)"),
        ({"num_inference_steps": 8}, "num_inference_steps is 8, but this checkpoint was distilled for the 4 steps"),
        ({"shift": 8.0}, "shift is 8, but this checkpoint was distilled with 5"),
        ({"warp_denoising_step": False}, "warp_denoising_step is False"),
    ],
)
def test_what_contradicts_a_distilled_schedule_is_refused_unless_insisted_on(fields: dict[str, Any], expected: str):
    request = Request("a cat", **fields)
    message = problem(request, model(DISTILLED))
    assert expected in message and "set allow_mismatch to true" in message
    resolved = completed(request, model(DISTILLED), allow_mismatch=True)
    assert all(getattr(resolved, name) == value for name, value in fields.items())


def test_what_agrees_with_a_distilled_schedule_is_accepted():
    fields = {"guidance_scale": 1, "denoising_step_list": (1000, 750, 500, 250), "num_inference_steps": 4, "shift": 5}
    resolved = completed(Request("a cat", **fields), model(DISTILLED))
    assert resolved.denoising_step_list == (1000, 750, 500, 250)


def test_another_step_count_insisted_on_means_unipc():
    resolved = completed(Request("a cat", num_inference_steps=20), model(DISTILLED), allow_mismatch=True)
    assert resolved.denoising_step_list is None and resolved.num_inference_steps == 20


def test_a_distillation_lora_makes_a_step_list_fit_the_base_model():
    request = Request("a cat", denoising_step_list=(1000, 750, 500, 250), shift=5.0)
    resolved = completed(request, model(), has_loras=True)
    assert resolved.num_inference_steps == 4 and not resolved.uses_guidance
    without_shift = completed(dataclasses.replace(request, shift=None), model(), has_loras=True)
    assert without_shift == dataclasses.replace(resolved, seed=without_shift.seed)
    guided = dataclasses.replace(request, guidance_scale=5.0)
    assert "whose sampler has none" in problem(guided, model(), has_loras=True)


def test_lists_that_are_warped_already_stay_so():
    schedule = dataclasses.replace(DISTILLED, denoising_step_list=(999, 500), warp_denoising_step=False)
    assert completed(Request("a cat"), model(schedule)).warp_denoising_step is False
    as_list: Any = [999, 500]
    given = completed(Request("a cat", denoising_step_list=as_list), model(schedule))
    assert given.warp_denoising_step is False and given.denoising_step_list == (999, 500)


def test_image_to_video_needs_an_image_and_takes_any_area():
    assert "image is missing" in problem(Request("a cat"), model(task="i2v"))
    image = np.zeros((30, 20, 3), np.uint8)
    resolved = completed(Request("a cat", image=image, height=470, width=830), model(task="i2v"))
    assert (resolved.height, resolved.width) == (470, 830)
    assert "image is '/no/such.png'" in problem(Request("a cat", image="/no/such.png"), model(task="i2v"))


def test_several_problems_are_told_together():
    message = problem(Request("a cat", height=100, num_frames=80, denoising_step_list=(1000,)), model())
    assert message.startswith("3 problems with the request:") and message.count("\n  - ") == 3
    assert all(name in message for name in ("height", "num_frames", "denoising_step_list"))


@pytest.mark.parametrize("variant", ["causvid", "self_forcing"])
def test_an_autoregressive_checkpoint_must_say_how_it_goes_on(variant: str):
    assert "its schedule does not say how; convert it again" in problem(
        Request("a cat"), model(DISTILLED, variant=variant)
    )


def test_missing_components_are_named():
    message = problem(Request("a cat"), model(components=("transformer", "vae")))
    assert "text_encoder" in message and "tokenizer" in message
    assert "transformer" in problem(Request("a cat"), model(components=("vae", "text_encoder", "tokenizer")))
    assert "image_encoder" in problem(
        Request("a", image=np.zeros((8, 8, 3), np.uint8)), model(task="i2v", components=ALL[:3] + ALL[4:])
    )


def test_text_embeddings_replace_the_text_encoder(tmp_path: Any):
    file = tmp_path / "text.safetensors"
    file.touch()
    resolve(Request(text_embeddings=file), model(components=("transformer", "vae")))


def test_empty_and_long_prompts_are_accepted():
    with pytest.warns(UserWarning, match="prompt is empty"):
        resolve(Request("  "), model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resolve(Request("word " * 2000), model()).prompt) == 10_000


def test_a_negative_prompt_without_guidance_is_pointed_out():
    with pytest.warns(UserWarning, match="no effect"):
        completed(Request("a cat", negative_prompt="dogs"), model(DISTILLED))


def test_requests_are_checked_without_jax():
    code = "import sys, x2v_jax.request, x2v_jax.memory; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_lora_in_the_prompt_is_a_warning_that_points_at_no_line_of_the_library():
    with pytest.warns(UserWarning, match=r"'<lora:style:0\.8>', which is read as words") as caught:
        completed(Request("a cat <lora:style:0.8>", seed=1), model())
    assert "/x2v_jax/" not in caught[0].filename  # but the test's own, or what checks types around the library


def test_another_number_of_steps_on_a_distilled_model_is_one_problem():
    said = problem(Request("a cat", num_inference_steps=8, denoising_step_list=(1000, 750, 500, 250)), model(DISTILLED))
    assert said.count("num_inference_steps") == 1 and "problems" not in said
