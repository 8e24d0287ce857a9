"""What users of diffusers write: it works, or the refusal names what is meant here."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from x2v_jax.errors import UserError
from x2v_jax.request import Request
from x2v_jax.request.calls import Call, CallFields, CallOptions
from x2v_jax.request.diffusers_names import FIELDS, METHODS, OPTIONS, refuse_methods
from x2v_jax.request.options import RunOptions


class Torch:
    def __init__(self, seed: int):
        self._seed = seed

    def initial_seed(self) -> int:
        return self._seed


def seeds(prompt: object, **fields: Any) -> list[int | None]:
    return [request.seed for request in Call.of(prompt, fields).requests]


def test_a_generator_is_a_seed():
    assert seeds("a", generator=7) == seeds("a", generator=Torch(7)) == seeds("a", generator=np.int64(7)) == [7]
    assert seeds("a", generator=Torch(7), num_videos_per_prompt=2) == [7, 8]
    assert seeds(["a", "b"], generator=[Torch(7), 1]) == [7, 1]
    assert seeds(["a", "b"], seed=3, num_videos_per_prompt=2) == [3, 4, 3, 4]
    assert seeds(["a", "b"], num_videos_per_prompt=2) == [None] * 4


def test_prompts_with_their_own_negative_prompt_and_picture():
    fields: dict[str, Any] = {"negative_prompt": ["x", "y"], "image": "a.png", "height": 64}
    call = Call.of(["a", "b"], fields)
    assert [(r.prompt, r.negative_prompt, r.image, r.height) for r in call.requests] == [
        ("a", "x", "a.png", 64),
        ("b", "y", "a.png", 64),
    ]
    assert call.is_batch and Call.of(["a"], {}).is_batch and not Call.of("a", {}).is_batch


def test_latents_are_the_noise_of_each_video():
    noise = np.arange(2 * 16 * 2 * 4 * 6, dtype=np.float64).reshape(2, 16, 2, 4, 6)
    (request,) = Call.of("a", {"latents": noise[:1]}).requests
    np.testing.assert_array_equal(request.initial_noise, noise[0])
    assert request.initial_noise.dtype == np.float32
    _, second = Call.of("a", {"latents": noise, "num_videos_per_prompt": 2}).requests
    np.testing.assert_array_equal(second.initial_noise, noise[1])


@pytest.mark.parametrize(
    ("prompt", "fields", "sentence"),
    [
        ("a", {"generator": object()}, "generator is a object; give the seed itself"),
        ("a", {"generator": True}, "generator is a bool"),
        ("a", {"generator": 1, "seed": 2}, "seed and generator are both given"),
        ("a", {"generator": [1, 2]}, "generator has 2 entries for 1 videos"),
        ("a", {"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ("a", {"output_type": "pt"}, "torch.from_numpy"),
        ("a", {"output_type": "latent"}, r"generate\(Request\(…\)\).latents"),
        ("a", {"output_type": "gif"}, "output_type is 'gif'; give 'np' or 'pil'"),
        ("a", {"latents": np.zeros((16, 2, 4, 6))}, r"latents are \[16, 2, 4, 6\]; give \[1, C, F, H, W\]"),
        ("a", {"latents": np.zeros((2, 16, 2, 4, 6))}, r"give \[1, C, F, H, W\]"),
        ("a", {"latents": "noise"}, "latents is a str"),
        ("a", {"latents": np.zeros((1, 16, 2, 4, 6)), "initial_noise": "n"}, "latents and initial_noise are both"),
        ("a", {"callback_on_step_end": 3}, "callback_on_step_end is 3; give a function"),
        ([], {}, "list of prompts is empty"),
        (["a", "b"], {"negative_prompt": ["x"]}, "negative_prompt has 1 entries for 2 prompts"),
        (Request("a"), {}, r"write generate\(request\)"),
        ("a", {"widht": 3}, "did you mean width"),
    ],
)
def test_what_cannot_be_is_a_sentence(prompt: object, fields: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        Call.of(prompt, fields)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_each_foreign_field_is_refused_with_what_is_meant_here(name: str):
    with pytest.raises(UserError, match=f"unknown field '{name}'; .{{7}}"):
        Call.of("a", {name: None})
    assert name not in Request.field_names()


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_each_foreign_option_is_refused_with_what_is_meant_here(name: str):
    with pytest.raises(UserError, match=f"unknown option '{name}'; .{{7}}"):
        RunOptions.of({name: None})
    assert name not in RunOptions.names()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_foreign_method_answers_with_a_sentence(name: str):
    class Pipe:
        pass

    refuse_methods(Pipe)
    for holder in (Pipe, Pipe()):
        assert not hasattr(holder, name)
        with pytest.raises(UserError, match=f"Pipe has no '{name}' as diffusers' pipelines do; .{{7}}") as caught:
            getattr(holder, name)
        assert "{" not in str(caught.value).replace("loras={", "")


def test_keywords_of_a_call_are_its_options():
    own = set(CallFields.__annotations__) - set(Request.field_names())
    assert own == {field.name for field in dataclasses.fields(CallOptions)} - {"output_type"}
