"""LightX2V's JSON files are read as they are published: same meaning, warnings for what has none here."""

import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest

from x2v_jax.checkpoint.published.published_schedules import SCHEDULES
from x2v_jax.config.lightx2v import read_json, strip_comments, translate
from x2v_jax.config.load import load_config
from x2v_jax.errors import UserError
from x2v_jax.models.config import VaeConfig, WanConfig
from x2v_jax.request import Request
from x2v_jax.request.resolve import resolve

# configs/distill/wan_t2v_distill_4step_cfg.json
DISTILL = {
    "infer_steps": 4, "target_video_length": 81, "text_len": 512, "target_height": 480, "target_width": 832,
    "self_attn_1_type": "flash_attn3", "cross_attn_1_type": "flash_attn3", "cross_attn_2_type": "flash_attn3",
    "seed": 42, "sample_guide_scale": 6, "sample_shift": 5, "enable_cfg": False, "cpu_offload": False,
    "denoising_step_list": [1000, 750, 500, 250],
}  # fmt: skip
# configs/wan/wan_i2v.json
I2V = {
    "infer_steps": 40, "target_video_length": 81, "target_height": 480, "target_width": 832,
    "self_attn_1_type": "flash_attn3", "cross_attn_1_type": "flash_attn3", "cross_attn_2_type": "flash_attn3",
    "seed": 442, "sample_guide_scale": 5, "sample_shift": 3, "enable_cfg": True, "cpu_offload": False,
}  # fmt: skip


# configs/causvid/wan_t2v_causvid.json
CAUSVID = {
    "infer_steps": 9, "target_video_length": 81, "target_height": 480, "target_width": 832,
    "self_attn_1_type": "flash_attn3", "cross_attn_1_type": "flash_attn3", "cross_attn_2_type": "flash_attn3",
    "seed": 42, "sample_guide_scale": 6, "sample_shift": 8, "enable_cfg": False, "cpu_offload": False,
    "denoising_step_list": [999, 934, 862, 756, 603, 410, 250, 140, 74],
    "num_fragments": 3, "num_frames": 21, "num_frame_per_block": 3, "num_blocks": 7, "frame_seq_length": 1560,
}  # fmt: skip


def write(path: pathlib.Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return f"configs/lightx2v.py:{path}"


@pytest.mark.filterwarnings("ignore")
def test_the_distilled_file_means_four_steps_without_guidance(tmp_path: pathlib.Path):
    config: Any = load_config(write(tmp_path / "a.json", DISTILL))
    assert config.denoising_step_list == (1000, 750, 500, 250)
    assert config.guidance_scale == 1.0 and config.shift == 5.0 and config.num_inference_steps is None
    assert (config.height, config.width, config.num_frames, config.seed) == (480, 832, 81, 42)


@pytest.mark.filterwarnings("ignore")
def test_the_baseline_file_means_unipc_with_guidance(tmp_path: pathlib.Path):
    config: Any = load_config(write(tmp_path / "a.json", I2V | {"task": "i2v", "fps": 24}))
    assert (config.num_inference_steps, config.guidance_scale, config.shift) == (40, 5.0, 3.0)
    assert (config.task, config.fps, config.seed, config.denoising_step_list) == ("i2v", 24, 442, None)


@pytest.mark.filterwarnings("ignore")
def test_the_autoregressive_file_means_fragments_of_an_unwarped_list(tmp_path: pathlib.Path):
    given: Any = load_config(write(tmp_path / "a.json", CAUSVID))
    ours: Any = load_config("configs/causvid/wan_t2v_causvid.py")
    assert given.num_frames is None  # three fragments are longer than target_video_length, which is not looked at
    for name in (
        "num_fragments", "rollout_mode", "rollout_window", "num_frame_per_block", "num_blocks", "frame_seq_length",
        "denoising_step_list", "warp_denoising_step", "guidance_scale", "height", "width", "seed",
    ):  # fmt: skip
        assert given[name] == ours[name], name
    named: Any = load_config(write(tmp_path / "a.json", CAUSVID | {"model_cls": "wan2.1_causvid", "task": "t2v"}))
    assert named.num_fragments == 3


def requested(values: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "a cat"} | translate(values)


@pytest.mark.filterwarnings("ignore")
def test_the_autoregressive_file_fits_the_checkpoint_that_it_is_for():
    networks = {"transformer": WanConfig.t2v_14b(), "vae": VaeConfig()}
    model: Any = types.SimpleNamespace(
        task="t2v",
        variant="causvid",
        schedule=SCHEDULES["causvid"],
        config=networks.__getitem__,
        has=lambda name: True,
        path=pathlib.Path("model"),
        files=lambda name: (),
    )
    request = resolve(Request(**requested(CAUSVID)), model).completed
    assert request.num_frames == 225 and request.rollout_mode == "fragments" and request.shift == 8
    for change, message in (
        ({"frame_seq_length": 3600}, "frame_seq_length is 3600"),
        ({"target_height": 720, "target_width": 1280}, "45 x 80 = 3600 tokens"),
        ({"num_blocks": 6, "num_frames": 18, "num_frame_per_block": 3}, None),
    ):
        values = requested(CAUSVID | change)
        if message is None:
            assert resolve(Request(**values), model).num_frames == 4 * (18 + 2 * 15 - 1) + 1
        else:
            with pytest.raises(UserError, match=message):
                resolve(Request(**values), model)


def test_guidance_switched_off_is_scale_one():
    assert translate({"sample_guide_scale": 5, "enable_cfg": False})["guidance_scale"] == 1.0
    assert translate({"sample_guide_scale": 5, "enable_cfg": True})["guidance_scale"] == 5
    assert translate({"sample_guide_scale": 5})["guidance_scale"] == 5
    assert "guidance_scale" not in translate({"enable_cfg": True})


@pytest.mark.filterwarnings("ignore")
def test_command_line_keys_inside_the_file_are_taken_over(tmp_path: pathlib.Path):
    extra = {"model_cls": "wan2.1_distill", "model_path": "ck", "prompt": "a // cat", "save_video_path": "out.mp4"}
    loras = [{"path": "a.safetensors", "strength": 0.5}, {"path": "b.safetensors"}]
    values = DISTILL | extra | {"lora_configs": loras, "use_tiling_vae": True, "image_path": "", "negative_prompt": ""}
    config: Any = load_config(write(tmp_path / "a.json", values))
    assert (config.checkpoint, config.prompt, config.output) == ("ck", "a // cat", "out.mp4")
    assert config.lora == (("a.safetensors", 0.5), ("b.safetensors", 1.0))
    assert config.vae_decode == "tiled" and config.image is None and config.negative_prompt is None


def test_comments_and_trailing_commas_are_allowed(tmp_path: pathlib.Path):
    text = """{
        // the prompt
        "prompt": "see http://a.b/*c*/ and \\" // d",  // trailing
        /* several
           lines */ "seed": 7,
        "denoising_step_list": [1000, 500,],
    }"""
    (tmp_path / "a.json").write_text(text)
    values = read_json(str(tmp_path / "a.json"))
    assert values == {
        "prompt": 'see http://a.b/*c*/ and " // d',
        "seed": 7,
        "denoising_step_list": [1000, 500],
    }
    assert len(strip_comments(text).splitlines()) == len(text.splitlines())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"enable_cfg": True}, "enable_cfg is true beside a denoising_step_list"),
        ({"enable_dynamic_cfg": True, "cfg_scale": 4.0}, "enable_dynamic_cfg is true"),
        ({"feature_caching": "Tea"}, "feature_caching is 'Tea' beside a denoising_step_list"),
        ({"model_cls": "wan2.1"}, "which that class ignores"),
        ({"model_cls": "hunyuan"}, "this project runs wan2.1, wan2.1_distill, wan2.1_causvid"),
        ({"num_blocks": 7, "model_cls": "wan2.1_distill"}, "beside num_blocks, which are settings of autoregressive"),
        (
            {"num_blocks": 7, "num_frame_per_block": 3, "num_frames": 20},
            "num_frames is 20 latent frames, but num_blocks",
        ),
        ({"num_fragments": 0}, "num_fragments is 0; give a whole number"),
        ({"num_fragments": 3, "task": "i2v"}, "task is 'i2v' in settings of an autoregressive model"),
        ({"num_fragments": 3, "denoising_step_list": None}, "model_cls is 'wan2.1_causvid' without"),
        ({"denoising_step_list": None, "model_cls": "wan2.1_distill"}, "without its denoising_step_list"),
        ({"denoising_step_list": "1000"}, "give a list such as"),
        ({"lora_configs": 5}, "lora_configs is 5; give a list"),
        ({"lora_configs": ["a.safetensors"]}, "lora_configs holds 'a.safetensors'"),
        ({"target_hight": 480}, "unknown key 'target_hight'; did you mean target_height?"),
        ({"zzz": 1}, "LightX2V has no such setting"),
        ({"target_height": "480"}, "config.height is '480'; give a value of type int"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_contradictions_and_misspelt_keys_are_refused(tmp_path: pathlib.Path, change: dict[str, Any], expected: str):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "a.json", DISTILL | change))
    assert expected in str(caught.value) and "a.json" in str(caught.value)


def test_what_only_steers_cuda_is_ignored_with_a_warning():
    with pytest.warns(UserWarning) as caught:
        translate(DISTILL | {"cpu_offload": True, "mm_config": {"mm_type": "W-int8"}, "text_len": 256})
    messages = "\n".join(str(w.message) for w in caught)
    assert "self_attn_1_type" in messages and "cpu_offload" in messages and "mm_config" in messages
    assert "text_len 256" in messages


@pytest.mark.filterwarnings("ignore:.*_attn_.*")
def test_frame_counts_and_steps_are_mended_as_there():
    with pytest.warns(UserWarning, match="80 becomes 81|83 becomes 81"):
        assert translate({"task": "i2v", "target_video_length": 83})["num_frames"] == 81
    with pytest.warns(UserWarning, match="infer_steps is ignored"):
        assert "num_inference_steps" not in translate(DISTILL | {"infer_steps": 20})


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[1]", "holds a JSON list"), ('{"a": }', "is not JSON"), ("", "is not JSON"), (None, "cannot be read")],
)
def test_files_that_are_no_settings_are_refused(tmp_path: pathlib.Path, content: str | None, expected: str):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=expected):
        load_config(f"configs/lightx2v.py:{path}")


def test_the_file_must_be_named():
    with pytest.raises(UserError, match=r"write --config=configs/lightx2v\.py:FILE\.json"):
        load_config("configs/lightx2v.py")


def test_it_is_read_without_jax():
    code = "import sys, configs.lightx2v; from x2v_jax.config.load import load_config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("values", "command"),
    [
        ({"mm_config": {"mm_type": "W-int8-channel-sym-A-int8-channel-sym-dynamic-Vllm"}}, "--quantize int8`"),
        ({"mm_config": {"mm_type": "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm"}}, "--quantize fp8`"),
        ({"quant_method": "smoothquant-int8"}, "--quantize int8`"),
        ({"mm_config": {"mm_type": "Default"}}, None),
        ({"t5_quantized": True}, None),
    ],
)
def test_8_bit_matrices_that_the_file_asks_for_are_told_with_the_command_that_makes_them(values, command):
    with pytest.warns(UserWarning, match="whether weights are in 8 bits is the checkpoint's to say here") as caught:
        translate(values)
    said = str(caught[0].message)
    assert f"{next(iter(values))} is ignored: " in said and ("--quantize" in said) == (command is not None)
    assert (command or "") in said
