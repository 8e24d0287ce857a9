"""LoRAs as users write them: in Python, in config files, on the command line."""

import pathlib
from typing import Any

import pytest

from x2v_jax.checkpoint.lora.arguments import distilling, lora_pairs
from x2v_jax.config.flags import parse_value
from x2v_jax.config.inference import inference_config
from x2v_jax.errors import UserError

A, B = "a.safetensors", "b.safetensors"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ([], ()),
        (A, ((A, 1.0),)),
        (pathlib.Path(A), ((A, 1.0),)),
        ((A, 0.3), ((A, 0.3),)),
        ([A, 2], ((A, 2.0),)),
        ([A, B], ((A, 1.0), (B, 1.0))),
        ([(A, 0.3), B, pathlib.Path(A)], ((A, 0.3), (B, 1.0), (A, 1.0))),
        ([[A, 0.3]], ((A, 0.3),)),
        ({A: 0.3, pathlib.Path(B): -1}, ((A, 0.3), (B, -1.0))),
        ([{A: 0.3}, B], ((A, 0.3), (B, 1.0))),
    ],
    ids=str,
)
def test_every_form_gives_files_and_strengths(given: Any, expected: tuple[tuple[str, float], ...]):
    assert lora_pairs(given) == expected


@pytest.mark.parametrize(
    "given", [3, [3], [(A, "a")], {A: None}, {3: 0.5}, [(A, 0.3, 1)], "", [""], {A: float("nan")}, b"a"]
)
def test_anything_else_is_a_sentence(given: Any):
    with pytest.raises(UserError, match=r"loras.*give a"):
        lora_pairs(given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (A, ((A, 1.0),)),
        (f"{A}:0.3", ((A, 0.3),)),
        (f'("{A}", 0.3)', ((A, 0.3),)),
        (f"{A},0.3", ((A, 0.3),)),
        (f'{{"{A}": 0.3}}', ((A, 0.3),)),
        (f"{A},{B}:0.5", ((A, 1.0), (B, 0.5))),
        (f'(("{A}", 0.3), "{B}")', ((A, 0.3), (B, 1.0))),
        (f'["{A}", "{B}"]', ((A, 1.0), (B, 1.0))),
    ],
)
def test_the_command_line_takes_the_same_forms(text: str, expected: tuple[tuple[str, float], ...]):
    assert lora_pairs(parse_value(inference_config(), "lora", text), typed=True) == expected


@pytest.mark.parametrize("value", [A, {A: 1.0}, [(A, 1.0)], ((A, 1.0),)])
def test_a_config_file_does_too(value: Any):
    assert lora_pairs(inference_config(lora=value).lora, typed=True) == ((A, 1.0),)


def test_names_say_what_distills():
    names = ["x_cfg_step_distill_rank32", "Wan21_CausVid_14B", "self-forcing_lora", "wan_4step", "lcm", "a_DMD2"]
    for name in names:
        assert distilling([("x/distill/style.bin", 1.0), (f"x/{name}.safetensors", 0.5)]) == f"x/{name}.safetensors"
        assert not distilling([(f"{name}.safetensors", 0.0)])
    assert not distilling([("style.safetensors", 1.0), ("footsteps.safetensors", 1.0)])
