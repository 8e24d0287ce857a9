"""Block-by-block fields of requests: completed from the checkpoint, and refused in sentences that name the fix."""

import dataclasses
import pathlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.models.config import CausalSchedule, Schedule, VaeConfig, WanConfig
from x2v_jax.request import Request
from x2v_jax.request.resolve import ResolvedRequest, resolve

STEPS = (1000, 750, 500, 250)
SLIDING = Schedule(
    sampler="step_distill", num_inference_steps=4, shift=5.0, guidance_scale=1.0, denoising_step_list=STEPS,
    causal=CausalSchedule(),
)  # fmt: skip
FRAGMENTS = dataclasses.replace(SLIDING, causal=CausalSchedule(mode="fragments"))
ALONE = dataclasses.replace(SLIDING, causal=CausalSchedule(independent_first_frame=True, window=22))
PICTURE = np.zeros((8, 8, 3), np.uint8)


def model(schedule: Schedule = SLIDING, *, task: str = "t2v") -> Any:
    return types.SimpleNamespace(
        task=task,
        variant="self_forcing" if schedule.causal else "distill",
        schedule=schedule,
        config={"transformer": WanConfig.t2v_1_3b(), "vae": VaeConfig()}.__getitem__,
        has=lambda component: True,
        path=pathlib.Path("model"),
        files=lambda component: (),
    )


def decided(of: Schedule = SLIDING, **fields: Any) -> ResolvedRequest:
    return resolve(Request("a cat", seed=0, **fields), model(of))


def completed(of: Schedule = SLIDING, **fields: Any) -> Request:
    return decided(of, **fields).completed


def plan_of(of: Schedule = SLIDING, **fields: Any) -> RolloutPlan:
    plan = decided(of, **fields).plan
    assert isinstance(plan, RolloutPlan)
    return plan


def problem(of: Schedule = SLIDING, task: str = "t2v", **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(Request("a cat", **fields), model(of, task=task))
    return str(caught.value)


def test_empty_fields_are_filled_from_the_schedule():
    request = completed()
    assert (request.rollout_mode, request.rollout_window, request.rollout_sink) == ("sliding", 21, 0)
    assert (request.rollout_positions, request.context_noise, request.num_frame_per_block) == ("relative", 0.0, 3)
    assert request.num_frames == 81 and request.kv_cache is None
    assert decided().latent_shape == (21, 60, 104, 16)
    plan = plan_of()
    assert (plan.block, plan.mode, plan.window, plan.context_timestep, plan.num_steps) == (3, "sliding", 21, 0.0, 4)
    assert plan.sigmas == pytest.approx((1.0, 0.9375, 0.8333333, 0.625))


@pytest.mark.parametrize("schedule", [SLIDING, FRAGMENTS, ALONE])
@pytest.mark.parametrize("fields", [{}, {"seconds": 7.0}, {"endless": True}, {"prompt_schedule": [[2, "a dog"]]}])
def test_resolving_twice_changes_nothing(schedule: Schedule, fields: dict[str, Any]):
    once = completed(schedule, **fields)
    assert resolve(once, model(schedule)).completed == once


@pytest.mark.parametrize(
    ("schedule", "fields", "frames"),
    [
        (SLIDING, {"seconds": 5.0}, 81),
        (SLIDING, {"seconds": 81 / 16}, 81),
        (SLIDING, {"seconds": 5.1}, 93),
        (SLIDING, {"seconds": 60}, 969),
        (SLIDING, {"seconds": 0.01}, 9),
        (SLIDING, {"seconds": 5.0, "fps": 24}, 129),
        (ALONE, {}, 73),
        (ALONE, {"seconds": 0.01}, 1),
        (ALONE, {"seconds": 5.0}, 85),
        (FRAGMENTS, {"num_fragments": 1}, 81),
        (FRAGMENTS, {"num_fragments": 3}, 225),
        (FRAGMENTS, {"num_fragments": 3, "num_frames": 225, "num_blocks": 7, "frame_seq_length": 1560}, 225),
        (FRAGMENTS, {"num_fragments": 2, "num_blocks": 3, "num_frame_per_block": 3}, 57),
        (SLIDING, {"endless": True}, None),
        (SLIDING, {"num_frames": 9}, 9),
        (SLIDING, {"rollout_mode": "full", "rollout_window": 9}, 33),
        (SLIDING, {"num_frames": 4_000_005}, 4_000_005),
    ],
)
def test_the_length_is_whole_blocks(schedule: Schedule, fields: dict[str, Any], frames: int | None):
    assert completed(schedule, **fields).num_frames == frames


def test_a_continuation_counts_what_it_adds(tmp_path: Any):
    file = tmp_path / "l.safetensors"
    file.touch()
    assert completed(continue_from=file).num_frames == 84
    assert completed(continue_from=file, seconds=1.0).num_frames == 24
    assert completed(FRAGMENTS, continue_from=file, num_fragments=1).num_frames == 72
    assert completed(continue_from=file, rollout_mode="full").num_frames == 72
    assert decided(continue_from=file, num_frames=12).latent_shape == (3, 60, 104, 16)
    message = problem(continue_from=file, num_frames=81)
    assert "num_frames is 81; this model makes multiples of 12 when it continues a video: use 84 or 72" in message
    assert "image and continue_from are both given" in problem(continue_from=file, image=PICTURE)
    assert "rollout_window is 3 latent frames, one block" in problem(continue_from=file, rollout_window=3)


def test_an_image_is_the_start_of_a_text_to_video_model():
    assert completed(image=PICTURE).num_frames == 81
    assert "num_frames is 9, which the image fills alone; give at least 21" in problem(image=PICTURE, num_frames=9)
    assert "which the image fills alone; give at least 13" in problem(ALONE, image=PICTURE, num_frames=1)


def test_no_clean_pass_is_minus_one():
    request = completed(context_noise=-1)
    assert request.context_noise == -1.0
    assert plan_of(context_noise=-1).context_timestep is None
    noisy = dataclasses.replace(SLIDING, causal=CausalSchedule(context_timestep=None))
    assert completed(noisy).context_noise == -1.0
    assert completed(noisy, context_noise=0).context_noise == 0.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rollout_mode": "rolling"}, "rollout_mode is 'rolling'; give one of 'full', 'sliding', 'fragments'"),
        ({"rollout_positions": "none"}, "rollout_positions is 'none'; give one of 'relative', 'absolute'"),
        ({"kv_cache": "int4"}, "kv_cache is 'int4'; give one of 'bfloat16', 'float32', 'int8'"),
        ({"rollout_window": 2}, "rollout_window is 2 latent frames; it holds the sink (0) and one block (3), so"),
        ({"rollout_window": 9, "rollout_sink": 7}, "so give at least 10"),
        ({"rollout_window": "all"}, "rollout_window is 'all'; give a whole number"),
        ({"rollout_sink": -1}, "rollout_sink is -1"),
        ({"rollout_sink": 3, "rollout_mode": "full"}, "rollout_sink is 3 in rollout_mode 'full', which forgets"),
        ({"rollout_mode": "fragments", "rollout_window": 20}, "rollout_window is 20 latent frames, but a fragment has"),
        ({"rollout_mode": "fragments", "rollout_window": 3}, "the first from the fragment before; give 6"),
        ({"rollout_window": 42}, "rollout_window is 42, a window of 42 latent frames, but this checkpoint was trained"),
        ({"context_noise": 1001}, "context_noise is 1001; give the timestep"),
        ({"context_noise": -0.5}, "or -1 for no such pass"),
        ({"context_noise": True}, "context_noise is True"),
        ({"seconds": 0}, "seconds is 0; give a number from 0.001"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"endless": 1}, "endless is 1; give True or False"),
        ({"seconds": 5.0, "num_frames": 81}, "num_frames is 81 and seconds is 5.0; the length is said once"),
        ({"seconds": 5.0, "endless": True}, "the length is said once, leave endless out"),
        ({"endless": True, "num_fragments": 2}, "leave num_fragments out"),
        ({"endless": True, "rollout_mode": "full"}, "endless is True, but rollout_mode 'full' ends with its window"),
        ({"num_frames": 80}, "num_frames is 80; this model makes 12n+9 frames: use 81 or 69"),
        ({"num_frames": 1}, "use 9"),
        ({"num_frames": 5}, "use 9"),
        ({"num_frames": 85}, "use 81 or 93"),
        ({"num_frames": 93, "rollout_mode": "full"}, "num_frames is 93 (5.8125 s), and rollout_mode 'full' makes"),
        ({"seconds": 60.0, "rollout_mode": "full"}, "makes at most 81; give that, or choose rollout_mode 'sliding'"),
        ({"num_frames": 4_194_321}, "rollout_mode 'sliding' makes at most 4194297; give that, or continue it in a"),
        ({"num_fragments": 3}, "num_fragments is 3 in rollout_mode 'sliding', which has no fragments"),
        ({"num_fragments": 3, "rollout_mode": "fragments", "num_frames": 81}, "which gives 225 frames, but num_frames"),
        ({"num_blocks": 7, "rollout_window": 18}, "num_blocks is 7 of num_frame_per_block 3, which is 21 latent"),
        ({"num_blocks": 8}, "num_blocks is 8, a window of 24 latent frames, but this checkpoint was trained with 21"),
        ({"num_frame_per_block": 4}, "num_frame_per_block is 4, but this checkpoint was trained with blocks of 3"),
        ({"frame_seq_length": 1024}, "frame_seq_length is 1024, but a latent frame of 480x832 has 30 x 52 = 1560"),
        ({"frame_seq_length": 1560, "height": 320}, "20 x 52 = 1040 tokens; give that, or leave it out"),
        ({"guidance_scale": 5.0}, "this distilled checkpoint has guidance trained in"),
        ({"num_inference_steps": 20}, "this checkpoint was distilled for the 4 steps"),
        ({"denoising_step_list": (1000, 500)}, "this checkpoint was distilled for (1000, 750, 500, 250)"),
        ({"pin_first_frame": True, "image": PICTURE}, "pin_first_frame is set, but a causal model starts"),
        ({"continue_from": "/no/file.mp4"}, "continue_from is '/no/file.mp4', but there is no such file"),
        ({"prompt_schedule": "5:a dog"}, "prompt_schedule is '5:a dog'; give pairs of second and prompt"),
        ({"prompt_schedule": (3.0, "a dog")}, "prompt_schedule holds 3.0; give pairs"),
        ({"prompt_schedule": ((3.0, "a dog"), (2.0, "a cat"))}, "prompt_schedule has the second 2.0 after 3"),
        ({"prompt_schedule": ((0.0, "a dog"),)}, "the second 0.0 after 0"),
        ({"prompt_schedule": ((1.0, " "),)}, "prompt_schedule has the prompt ' ' at 1 s"),
        ({"prompt_schedule": ((5.1, "a dog"),)}, "changes the prompt at 5.1 s, but the video ends after 5.0625 s"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(fields: dict[str, Any], expected: str):
    assert expected in problem(**fields)


def test_fragments_need_whole_first_blocks():
    assert "this checkpoint's first frame is a block of its own" in problem(ALONE, rollout_mode="fragments")
    assert "12n+1 frames: use 73 or 85" in problem(ALONE, num_frames=77)


def test_files_that_need_a_length_or_the_encoder_are_refused(tmp_path: Any):
    file = tmp_path / "f.safetensors"
    file.touch()
    assert "initial_noise holds noise for some blocks and endless asks" in problem(endless=True, initial_noise=file)
    message = problem(text_embeddings=file, prompt_schedule=((1.0, "a dog"),))
    assert "prompt_schedule needs the text encoder, which text_embeddings replaces" in message


def test_what_contradicts_the_training_runs_when_insisted_on():
    fields: dict[str, Any] = {"rollout_window": 42, "num_frame_per_block": 6}
    request = resolve(Request("a cat", **fields), model(), allow_mismatch=True).completed
    assert (request.rollout_window, request.num_frame_per_block, request.num_frames) == (42, 6, 69)
    for more, expected in [({"guidance_scale": 5.0}, "has no guidance"), ({"num_inference_steps": 9}, "is missing")]:
        with pytest.raises(UserError, match=expected):
            resolve(Request("a cat", **more), model(), allow_mismatch=True)


def test_models_that_make_the_whole_video_have_no_blocks():
    whole = dataclasses.replace(SLIDING, causal=None)
    message = problem(whole, seconds=60.0)
    assert "seconds is 60.0, but this checkpoint makes a video as a whole" in message and "num_frames" in message
    assert "kv_cache is 'int8', but" in problem(whole, kv_cache="int8")
    assert "rollout_mode is 'full', endless is True, but" in problem(whole, rollout_mode="full", endless=True)


def test_causal_image_to_video_checkpoints_are_refused():
    assert "the checkpoint is image-to-video and causal" in problem(task="i2v", image=PICTURE)


def test_requests_and_files_are_checked_without_jax():
    code = "import sys, x2v_jax.request.resolve, x2v_jax.media.tensor_files; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
