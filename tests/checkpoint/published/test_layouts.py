"""What a folder or file holds is told by its tensors; what is not there is never replaced by something else."""

import json
import pathlib

import numpy as np
import pytest
from small_checkpoints import CONFIGS, I2V, diffusers_folder, official_folder, random_tensors, save, save_json

from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.published.infer_config import infer_config
from x2v_jax.checkpoint.published.layouts import declared, recognise
from x2v_jax.checkpoint.published.read import identify, read_raw, to_official, unwrapped
from x2v_jax.checkpoint.published.select import select
from x2v_jax.errors import UserError

TRANSFORMER = random_tensors("transformer")


def components(layout):
    return sorted(source.component for source in layout.sources)


@pytest.mark.parametrize("image", [False, True])
def test_an_official_folder(tmp_path, image):
    official_folder(tmp_path, image=image)
    layout = recognise(tmp_path)
    assert layout.kind == "wan"
    expected = ["image_encoder"] if image else []
    assert components(layout) == sorted(["text_encoder", "transformer", "vae", *expected])
    assert layout.variants == ("base",)
    assert layout.tokenizer == tmp_path / "google/umt5-xxl/tokenizer.json"


def test_a_diffusers_folder(tmp_path):
    diffusers_folder(tmp_path, image=True)
    layout = recognise(tmp_path)
    assert layout.kind == "diffusers"
    assert {source.naming for source in layout.sources} == {"diffusers"}
    assert len(layout.sources) == 4


def test_base_weights_under_original(tmp_path):
    official_folder(tmp_path, transformer=False)
    save(tmp_path / "original/diffusion_pytorch_model.safetensors", TRANSFORMER)
    layout = recognise(tmp_path)
    assert layout.variants == ("base",)
    assert layout.of("transformer")[0].config_file == tmp_path / "config.json"


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("distill_models/distill_model.safetensors", "distill"),
        ("distill_models/distill_model.pt", "distill"),
        ("causvid_models/causal_model.safetensors", "causvid"),
        ("causvid_models/causal_model.pt", "causvid"),
        ("distill_fp8/block_0.safetensors", "distill"),
    ],
)
def test_lightx2v_files(tmp_path, file, variant):
    official_folder(tmp_path)
    save(tmp_path / file, TRANSFORMER)
    layout = recognise(tmp_path)
    assert layout.kind == "lightx2v"
    assert set(layout.variants) == {"base", variant}
    with pytest.raises(UserError, match="holds 2 transformers; say which with --variant"):
        select(layout, None, ())
    assert select(layout, variant, ())["transformer"].files == (tmp_path / file,)


@pytest.mark.parametrize(
    "name",
    ["Wan2.1-T2V-14B", "wan2.1-i2v-14b-720p", "Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v"],
)
def test_a_missing_distilled_file_is_not_replaced_by_the_base_weights(tmp_path, name):
    for folder in (tmp_path / name, tmp_path / f"models--some--{name}/snapshots/0123abc"):
        official_folder(folder)
        missing = r"distill_models/distill_model\.safetensors or \.pt is missing.*holds base.*give --schedule"
        with pytest.raises(UserError, match=missing):
            select(recognise(folder), "distill", ())


@pytest.mark.parametrize("make", [official_folder, diffusers_folder])
def test_what_the_user_says_counts_more_than_a_guess(tmp_path, make):
    make(tmp_path / "exported")
    layout = recognise(tmp_path / "exported")
    assert layout.variants == ("base",) and layout.of("transformer")[0].is_guess
    assert select(layout, "distill", ())["transformer"].variant == "distill"


DISTILLED = "Wan2.1-T2V-14B-StepDistill-CfgDistill-Diffusers"


@pytest.mark.parametrize(
    ("name", "variant", "asks"),
    [
        (DISTILLED, "distill", None),
        (f"models--lightx2v--{DISTILLED}/snapshots/0123abc", "distill", None),
        ("wan_4step_dmd", "distill", None),
        ("Wan2.1-T2V-14B-CfgDistill-Diffusers", "base", "CfgDistill"),
        ("models--me--wan-dmd/snapshots/0123abc", "base", "dmd"),
        ("wan_8steps", "base", "8steps"),
        ("Wan2.1-T2V-1.3B-Diffusers", "base", None),
    ],
)
def test_a_name_picks_a_schedule_only_where_it_says_which(tmp_path, name, variant, asks):
    diffusers_folder(tmp_path / name)
    (source,) = recognise(tmp_path / name).of("transformer")
    assert (source.variant, source.asks) == (variant, asks)


def test_the_safetensors_twin_of_a_torch_file_is_taken(tmp_path):
    for suffix in ("pt", "safetensors"):
        save(tmp_path / f"distill_models/distill_model.{suffix}", TRANSFORMER)
    layout = recognise(tmp_path)
    assert [s.files[0].suffix for s in layout.sources] == [".safetensors"]
    assert layout.left_out[0][0].name == "distill_model.pt"


def test_shards_with_an_index(tmp_path):
    keys = sorted(TRANSFORMER)
    names = ("diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002")
    for name, part in zip(names, (keys[:20], keys[20:]), strict=True):
        save(tmp_path / f"{name}.safetensors", {k: TRANSFORMER[k] for k in part})
    index = {k: f"{names[i >= 20]}.safetensors" for i, k in enumerate(keys)}
    path = save_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": index})
    for given in (tmp_path, path, tmp_path / f"{names[1]}.safetensors"):
        source = recognise(given).of("transformer")[0]
        assert len(source.files) == 2 and len(source.read().tensors) == len(keys)
    (tmp_path / f"{names[1]}.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is not in the folder"):
        recognise(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is missing"):
        recognise(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    save(tmp_path / "m.safetensors", TRANSFORMER)
    save_json(tmp_path / "m.safetensors.index.json", {"weight_map": {"head.head.bias": name}})
    with pytest.raises(UserError, match="outside the index's own folder"):
        recognise(tmp_path)


def test_an_index_that_lies_about_keys(tmp_path):
    save(tmp_path / "m.safetensors", TRANSFORMER)
    weight_map = dict.fromkeys([*TRANSFORMER, "blocks.9.modulation"], "m.safetensors")
    save_json(tmp_path / "m.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(UserError, match=r"blocks\.9\.modulation not in the files"):
        recognise(tmp_path).of("transformer")[0].read()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        recognise(tmp_path)


def test_blocks_and_parts_are_one_network(tmp_path):
    for i in range(3):
        block = {k: v for k, v in TRANSFORMER.items() if k.startswith(f"blocks.{i}.")}
        save(tmp_path / f"a/block_{i}.safetensors", block)
    save(tmp_path / "a/non_block.safetensors", {k: v for k, v in TRANSFORMER.items() if not k.startswith("blocks.")})
    keys = sorted(TRANSFORMER)
    for part in range(2):
        save(tmp_path / f"b/converted_part{part}.safetensors", {k: TRANSFORMER[k] for k in keys[part::2]})
    for folder in ("a", "b"):
        (source,) = recognise(tmp_path / folder).sources
        assert set(source.read().tensors) == set(TRANSFORMER)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "model._fsdp_wrapped_module.", "_orig_mod.module.model.", "diffusion_model.", "model.diffusion_model."],
)
def test_wrapper_prefixes_at_any_depth(tmp_path, prefix):
    wrapped = {
        prefix + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.").replace("ffn.", "ffn._orig_mod."): v
        for k, v in TRANSFORMER.items()
    }
    assert {unwrapped(key) for key in wrapped} == set(TRANSFORMER)
    (source,) = recognise(save(tmp_path / "x.safetensors", wrapped)).sources
    assert to_official(source.read(), source.convention).tensors.keys() == TRANSFORMER.keys()


def test_8_bit_copies_stand_back_behind_full_precision(tmp_path):
    made = official_folder(tmp_path)
    stored = {key: value.astype(np.int8) for key, value in TRANSFORMER.items()}
    save(tmp_path / "int8/block_0.safetensors", stored)
    save(
        tmp_path / "int8/models_t5_umt5-xxl-enc-int8.pth",
        {k: v.astype(np.int8) for k, v in made["text_encoder"].items()},
    )
    layout = recognise(tmp_path)
    chosen = select(layout, None, ())
    assert chosen["transformer"].precision is None and chosen["text_encoder"].precision is None
    with pytest.raises(UserError, match="has no such transformer"):
        select(layout, "distill", ())  # nothing says that int8/ was made from distilled weights
    assert select(recognise(tmp_path / "int8"), None, ())["transformer"].precision == "int8"
    save(tmp_path / "distill_int8/block_0.safetensors", stored)
    with pytest.raises(UserError, match=r"--variant distill: .*distill_int8"):
        select(recognise(tmp_path), None, ())
    assert select(recognise(tmp_path), "distill", ())["transformer"].precision == "int8"


def test_a_trainers_file_as_torch_writes_it():
    data = pathlib.Path(__file__).parents[1] / "files/data"
    raw = read_raw([data / "trainer.pth"])
    plain = read_safetensors(data / "trainer.safetensors")
    assert (raw.state, raw.other_states) == ("generator_ema", ("generator", "critic", "step"))
    assert raw.tensors.keys() == {unwrapped(key) for key in plain}
    for key, tensor in plain.items():
        assert np.array_equal(raw.tensors[unwrapped(key)].read(), tensor.read())


def trainer_file(path, **states):
    """torch.save of nested dicts needs torch; a pickle of plain dicts is enough for the writer's flat archive."""
    from x2v_jax.checkpoint.published import read

    tensors = {f"{state}/{key}": value for state, part in states.items() for key, value in part.items()}
    save(path, tensors)
    original = read.read_torch_file

    def nested(given):
        flat = original(given)
        result = {}
        for key, tensor in flat.items():
            state, _, name = key.partition("/")
            result.setdefault(state, {})[name] = tensor
        return result

    return nested


def test_a_trainers_file_gives_the_averaged_generator(tmp_path, monkeypatch):
    ema = {f"model._fsdp_wrapped_module.{k}": v + 1 for k, v in TRANSFORMER.items()}
    plain = {f"model.{k}": v for k, v in TRANSFORMER.items()}
    nested = trainer_file(tmp_path / "model.pt", generator=plain, critic=plain, generator_ema=ema)
    monkeypatch.setattr("x2v_jax.checkpoint.published.read.read_torch_file", nested)
    layout = recognise(tmp_path / "model.pt")
    (source,) = layout.sources
    assert layout.kind == "trainer"
    assert (source.state, sorted(source.other_states)) == ("generator_ema", ["critic", "generator"])
    assert source.variant is None
    value = source.read().tensors["head.head.bias"].read()
    assert np.array_equal(value, TRANSFORMER["head.head.bias"] + 1)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("self_forcing_dmd.pt", "self_forcing"),
        ("wan_distill.safetensors", "distill"),
        ("wan2.1_t2v_14b_lightx2v_4step.safetensors", "distill"),
        ("wan2.1_i2v_480p_cfg_step_distill.safetensors", "distill"),
        ("wan_14step.safetensors", None),
        ("wan_cfg_distill.safetensors", None),
        ("causal_forcing.pt", None),
        ("causal_model.pt", "causvid"),
        ("diffusion_pytorch_model.safetensors", "base"),
        ("weights.safetensors", None),
    ],
)
def test_a_single_file_is_named_after_its_variant(tmp_path, name, variant):
    layout = recognise(save(tmp_path / name, TRANSFORMER))
    assert layout.sources[0].variant == variant
    assert select(layout, "causvid", ())["transformer"].variant == "causvid"


def test_single_files_of_every_network(tmp_path):
    for component in CONFIGS:
        for suffix in ("safetensors", "pth"):
            path = save(tmp_path / component / f"x.{suffix}", random_tensors(component))
            assert components(recognise(path)) == [component]


def test_loras_and_strangers_are_left_out_with_a_reason(tmp_path):
    official_folder(tmp_path)
    save(tmp_path / "turbo.safetensors", {"diffusion_model.blocks.0.ffn.0.lora_A.weight": np.ones((2, 24), np.float32)})
    save(tmp_path / "taew2_1.pth", {"decoder.1.weight": np.ones((2, 2), np.float32)})
    layout = recognise(tmp_path)
    assert len(layout.sources) == 3
    reasons = {path.name: reason for path, reason in layout.left_out}
    assert "--lora" in reasons["turbo.safetensors"]
    assert "none of Wan2.1" in reasons["taew2_1.pth"]
    assert recognise(tmp_path / "turbo.safetensors").kind == "lora"


def test_two_files_with_the_same_network_are_not_chosen_between(tmp_path):
    official_folder(tmp_path)
    save(tmp_path / "another_vae.pth", random_tensors("vae"))
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth and .*another_vae\.pth both hold a vae|both hold a vae"):
        select(recognise(tmp_path), None, ())


def test_the_same_tensor_twice_in_a_set_of_files(tmp_path):
    for i in range(2):
        save(tmp_path / f"x_part{i}.safetensors", TRANSFORMER)
    with pytest.raises(UserError, match=r"are the same tensor"):
        recognise(tmp_path)


@pytest.mark.parametrize("given", ["missing", "notes.txt", "empty"])
def test_paths_that_hold_no_checkpoint(tmp_path, given):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=given):
        select(recognise(tmp_path / given), None, ())


@pytest.mark.parametrize(("component", "config"), [*CONFIGS.items(), ("transformer", I2V)])
def test_sizes_are_measured_on_the_tensors(component, config):
    shapes = {k: v.shape for k, v in random_tensors(component, config).items()}
    told = {"transformer": {"num_heads": 2, "text_len": 12}, "image_encoder": {"num_heads": 2}}.get(component, {})
    assert infer_config(component, shapes, told) == config


def test_heads_that_nothing_tells_are_asked_for():
    shapes = {k: v.shape for k, v in TRANSFORMER.items()}
    with pytest.raises(UserError, match=r"num_heads cannot be read.*--set transformer\.num_heads=N"):
        infer_config("transformer", shapes)
    wide = {"patch_embedding.bias": (256,), "blocks.0.ffn.0.bias": (8,)}
    assert infer_config("transformer", wide).num_heads == 2  # heads of 128, as published


def test_a_config_of_another_model_is_noticed():
    shapes = {k: v.shape for k, v in TRANSFORMER.items()}
    with pytest.raises(UserError, match=r"dim is 1536 in config\.json and 24 by the tensors"):
        infer_config("transformer", shapes, {"dim": 1536, "num_heads": 12})
    with pytest.raises(UserError, match="model_type is 'vace'"):
        infer_config("transformer", shapes, {"model_type": "vace", "num_heads": 2})
    with pytest.raises(UserError, match="hidden_act is 'quick_gelu'"):
        infer_config("image_encoder", {}, {"hidden_act": "quick_gelu"})


def test_a_lost_shard_shows_as_missing_tensors_not_as_a_shallower_network():
    shapes = {k: v.shape for k, v in TRANSFORMER.items() if not k.startswith("blocks.2.")}
    assert infer_config("transformer", shapes, {"num_layers": 3, "num_heads": 2}).num_layers == 3


def test_a_vae_of_other_channels_needs_its_statistics():
    shapes = {"conv2.bias": (8,), "encoder.conv1.bias": (4,)}
    with pytest.raises(UserError, match="z_dim is 8"):
        infer_config("vae", shapes)
    both = {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    assert infer_config("vae", shapes, both).z_dim == 8


def test_only_the_transformers_config_is_read_from_an_official_folder(tmp_path):
    official_folder(tmp_path, image=True)
    told = {source.component: declared(source) for source in recognise(tmp_path).sources}
    assert told["vae"] == {} and told["text_encoder"] == {}
    assert told["image_encoder"] == {"num_heads": 2}
    assert told["transformer"]["dim"] == 24
    json.dumps(told)


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("blocks.3.self_attn.q.weight", "transformer"),
        ("condition_embedder.time_proj.bias", "transformer"),
        ("visual.transformer.0.mlp.0.bias", "image_encoder"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "text_encoder"),
        ("decoder.upsamples.3.resample.1.bias", "vae"),
        ("decoder.up_blocks.0.resnets.0.conv1.bias", "vae"),
        ("lora_unet_blocks_0_ffn_0.alpha", "lora"),
        ("unrelated.weight", None),
    ],
)
def test_one_key_can_be_enough(key, component):
    assert identify([key]).component == component


def test_reading_nothing(tmp_path):
    with pytest.raises(UserError, match="no tensors"):
        read_raw([])
