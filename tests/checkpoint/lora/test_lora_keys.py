"""LoRA keys: every published spelling of a module is found, and nothing that a file may hold breaks the parser."""

import hypothesis
import pytest
from hypothesis import strategies as st

from x2v_jax.checkpoint.lora.keys import ModelNames, ParsedKey, Role, bare_module, parse_key, refused_kind
from x2v_jax.checkpoint.names.diffusers import DiffusersNames
from x2v_jax.checkpoint.names.wan import official_shapes
from x2v_jax.models.config import WanConfig

OFFICIAL = tuple(official_shapes("transformer", WanConfig.i2v_14b()))
NAMES = ModelNames(OFFICIAL)
DIFFUSERS = DiffusersNames("transformer")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.b.lora_A.weight", ParsedKey("a.b", Role.DOWN)),
        ("a.b.lora_B.weight", ParsedKey("a.b", Role.UP)),
        ("a.b.lora_A.default.weight", ParsedKey("a.b", Role.DOWN, "default")),
        ("a.b.lora_B.turbo_v2.weight", ParsedKey("a.b", Role.UP, "turbo_v2")),
        ("a.b.lora_B.bias", ParsedKey("a.b", Role.UP_BIAS)),
        ("a.b.lora_B.default.bias", ParsedKey("a.b", Role.UP_BIAS, "default")),
        ("a_b.lora_down.weight", ParsedKey("a_b", Role.DOWN)),
        ("a_b.lora_up.weight", ParsedKey("a_b", Role.UP)),
        ("a_b.lora_down", ParsedKey("a_b", Role.DOWN)),
        ("a.b.lora.down.weight", ParsedKey("a.b", Role.DOWN)),
        ("a.b.lora_linear_layer.up.weight", ParsedKey("a.b", Role.UP)),
        ("a.b.alpha", ParsedKey("a.b", Role.ALPHA)),
        ("a.b.diff", ParsedKey("a.b", Role.WEIGHT_DIFF)),
        ("a.b.diff_b", ParsedKey("a.b", Role.BIAS_DIFF)),
        ("blocks.3.diff_m", ParsedKey("blocks.3", Role.MODULATION_DIFF)),
        ("a.b.w_norm", ParsedKey("a.b", Role.WEIGHT_DIFF)),
        ("a.b.b_norm", ParsedKey("a.b", Role.BIAS_DIFF)),
        ("a.b.weight", None),
        ("a.b.lora_A.bias", None),
        (".lora_A.weight", None),
        ("alpha", None),
        ("", None),
    ],
)
def test_a_key_splits_into_module_and_role(key, expected):
    assert parse_key(key) == expected


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.q.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_blocks_0_self_attn_q.hada_w1_a", "LoHa"),
        ("lycoris_blocks_0_self_attn_q.lokr_w2_b", "LoKr"),
        ("lycoris_blocks_0_self_attn_q.lokr_w1", "LoKr"),
        ("lycoris_blocks_0_self_attn_q.oft_blocks", "OFT"),
        ("blocks.0.q.lora_mid.weight", "LoCon with a middle (Tucker) tensor"),
        ("blocks.0.q.a1.weight", "GLoRA"),
        ("diffusion_model.patch_embedding.reshape_weight", "ComfyUI's weight-replacing"),
        ("diffusion_model.blocks.0.self_attn.q_loras.down.weight", "Stand-In"),
    ],
)
def test_a_parametrisation_that_is_no_lora_is_called_by_its_name(key, kind):
    assert refused_kind(key) == kind


def test_no_key_of_a_plain_lora_is_refused():
    suffixes = ("lora_A.weight", "lora_up.weight", "alpha", "diff", "diff_b", "diff_m", "w_norm")
    assert not [k for key in OFFICIAL for s in suffixes if refused_kind(k := f"{key.rpartition('.')[0]}.{s}")]


def spellings(module: str) -> list[str]:
    return [
        module,
        f"diffusion_model.{module}",
        f"model.diffusion_model.{module}",
        f"transformer.{module}",
        f"base_model.model.{module}",
        f"base_model.model.model.{module}",
        f"pipe.dit.{module}",
        f"model._fsdp_wrapped_module.{module}",
        module.replace("blocks.7.", "blocks.7._checkpoint_wrapped_module."),
        f"lora_unet_{module.replace('.', '_')}",
        f"lora_unet__{module.replace('.', '_')}",
        f"lora_transformer_{module.replace('.', '_')}",
        f"lycoris_{module.replace('.', '_')}",
    ]


@pytest.mark.parametrize("key", [k for k in OFFICIAL if "blocks." not in k or "blocks.7." in k or "blocks.17." in k])
def test_every_module_of_the_largest_model_is_found_under_every_spelling(key):
    (diffusers,), _ = DIFFUSERS.format(key)
    for name in (key, diffusers):
        module, _, leaf = name.rpartition(".")
        if "modulation" in key:
            roles = [(name, Role.WEIGHT_DIFF), (name, Role.MODULATION_DIFF)]
            roles += [(module, Role.MODULATION_DIFF)] if module else []
        elif leaf == "bias":
            roles = [(module, Role.BIAS_DIFF), (module, Role.UP_BIAS)]
        else:
            roles = [(module, role) for role in (Role.DOWN, Role.UP, Role.ALPHA, Role.WEIGHT_DIFF)]
        for written, role in roles:
            assert {NAMES.parameter(spelling, role) for spelling in spellings(written)} == {key}


def test_the_output_projection_is_found_without_its_place_in_the_sequential():
    assert NAMES.parameter("transformer.blocks.3.attn1.to_out", Role.UP) == "blocks.3.self_attn.o.weight"


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("blocks.40.self_attn.q", Role.UP),  # one block too many
        ("blocks.0.self_attn.norm_q", Role.BIAS_DIFF),  # this norm has no bias
        ("blocks.0", Role.WEIGHT_DIFF),
        ("blocks.0.self_attn", Role.UP),
        ("double_blocks.0.img_attn.qkv", Role.UP),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", Role.UP),
        ("transformer.", Role.UP),
    ],
)
def test_a_module_that_the_model_lacks_is_not_guessed(module, role):
    assert NAMES.parameter(module, role) is None


def test_an_underscored_name_that_fits_two_parameters_is_not_guessed():
    names = ModelNames(["a.b_c.weight", "a_b.c.weight", "a.b.weight"])
    assert names.parameter("lora_unet_a_b_c", Role.UP) is None
    assert names.parameter("a.b_c", Role.UP) == "a.b_c.weight"
    assert names.parameter("lora_unet_a_b", Role.UP) == "a.b.weight"


def test_a_prefix_is_taken_off_however_often_it_stands_there():
    assert bare_module("base_model.model.model.diffusion_model.blocks.0") == "blocks.0"
    assert bare_module("lora_unet_blocks_0") == "blocks_0"


PIECES = st.sampled_from(
    [
        *["blocks", "0", "self_attn", "q", "lora_A", "lora_up", "weight", "alpha", "diff_m", "default", "model", "_"],
        "",
        "é\n",
    ]
)
KEYS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=10).map(".".join), st.lists(PIECES).map("_".join))


@hypothesis.given(KEYS)
@hypothesis.settings(max_examples=300)
def test_any_key_is_parsed_or_left_but_never_breaks(key):
    parsed = parse_key(key)
    refused_kind(key)
    if parsed is not None:
        assert parsed.module
        assert key.startswith(parsed.module + ".")
        assert parsed.adapter is None or f".{parsed.adapter}" in key
        parameter = NAMES.parameter(parsed.module, parsed.role)
        assert parameter is None or parameter in OFFICIAL


@hypothesis.given(st.sampled_from(OFFICIAL), st.sampled_from(["lora_A.weight", "lora_up.weight", "diff", "diff_b"]))
@hypothesis.settings(max_examples=100)
def test_a_made_key_comes_back_as_the_module_it_was_made_of(key, suffix):
    module = key.rpartition(".")[0]
    parsed = parse_key(f"diffusion_model.{module}.{suffix}")
    assert parsed is not None
    assert bare_module(parsed.module) == module
