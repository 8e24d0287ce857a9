"""A converted checkpoint goes back to the published layouts with the same bytes."""

import json
import shlex

import numpy as np
import pytest
from small_checkpoints import CONFIGS, diffusers_folder, diffusers_names, official_folder, random_tensors, save

from x2v_jax.checkpoint.conversion.convert import ConversionOptions, convert
from x2v_jax.checkpoint.files.safetensors import read_metadata, read_safetensors
from x2v_jax.checkpoint.files.torch_reader import read_torch_file
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published import export as export_module
from x2v_jax.checkpoint.published.export import export
from x2v_jax.errors import UserError

WAN_FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}


def read(path):
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        array = found[key].read()
        assert (array.dtype, array.shape) == (value.dtype, value.shape), key
        assert array.tobytes() == value.tobytes(), key


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True])
def test_the_official_layout_is_given_back_bit_exactly(tmp_path, image):
    made = official_folder(tmp_path / "src", image=image)
    convert(tmp_path / "src", tmp_path / "native")
    export(tmp_path / "native", tmp_path / "back", "wan")
    for component, tensors in made.items():
        assert_same(read(tmp_path / "back" / WAN_FILES[component]), tensors)
    tokenizer = "google/umt5-xxl/tokenizer.json"
    assert (tmp_path / "back" / tokenizer).read_bytes() == (tmp_path / "src" / tokenizer).read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["model_type"] == ("i2v" if image else "t2v") and config["num_heads"] == 2


@pytest.mark.parametrize("image", [False, True])
def test_the_diffusers_layout_is_given_back_bit_exactly(tmp_path, image):
    made = diffusers_folder(tmp_path / "src", image=image)
    convert(tmp_path / "src", tmp_path / "native")
    export(tmp_path / "native", tmp_path / "back", "diffusers")
    for component, tensors in made.items():
        stem = "diffusion_pytorch_model" if component in ("transformer", "vae") else "model"
        path = tmp_path / "back" / component / f"{stem}.safetensors"
        assert_same(read(path), diffusers_names(component, tensors))
        assert read_metadata(path) == {"format": "pt"}
        given = json.loads((tmp_path / "src" / component / "config.json").read_text())
        written = json.loads((tmp_path / "back" / component / "config.json").read_text())
        assert {name: written[name] for name in given} == given
    index = json.loads((tmp_path / "back/model_index.json").read_text())
    assert index["_class_name"] == ("WanImageToVideoPipeline" if image else "WanPipeline")
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    scheduler = json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == open_checkpoint(tmp_path / "native").schedule.shift
    assert (tmp_path / "back/tokenizer/tokenizer.json").is_file()
    processor = tmp_path / "back/image_processor/preprocessor_config.json"
    assert processor.is_file() == image
    if image:  # the whole picture, squeezed to a square, as Wan2.1 gives it to CLIP
        values = json.loads(processor.read_text())
        assert values["size"] == {"height": 28, "width": 28} and not values["do_center_crop"]


def test_a_clip_without_projection_is_exported_without_one(tmp_path):
    made = diffusers_folder(tmp_path / "src", image=True)
    tensors = diffusers_names("image_encoder", made["image_encoder"])
    del tensors["visual_projection.weight"]
    save(tmp_path / "src/image_encoder/model.safetensors", tensors)
    notes = convert(tmp_path / "src", tmp_path / "native")
    assert any("no projection" in note for note in notes)
    export(tmp_path / "native", tmp_path / "back", "diffusers")
    assert_same(read(tmp_path / "back/image_encoder/model.safetensors"), tensors)
    config = json.loads((tmp_path / "back/image_encoder/config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModel"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wan", "lightx2v", "diffusers"])
def test_what_is_exported_converts_to_the_same_files(tmp_path, layout):
    official_folder(tmp_path / "src", image=True)
    convert(tmp_path / "src", tmp_path / "native")
    export(tmp_path / "native", tmp_path / "back", layout)
    convert(tmp_path / "back", tmp_path / "again")
    first, second = open_checkpoint(tmp_path / "native"), open_checkpoint(tmp_path / "again")
    assert first.model["components"] == second.model["components"]
    for component in WAN_FILES:
        (one,), (two,) = first.files(component), second.files(component)
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("variant", "file"),
    [
        ("distill", "distill_models/distill_model.safetensors"),
        ("causvid", "causvid_models/causal_model.safetensors"),
        ("base", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_lightx2v_has_its_own_place_for_each_variant(tmp_path, variant, file):
    tensors = random_tensors("transformer")
    save(tmp_path / "m.safetensors", tensors)
    options = ConversionOptions(variant=variant, settings={"transformer": {"num_heads": 2}})
    convert(tmp_path / "m.safetensors", tmp_path / "native", options)
    export(tmp_path / "native", tmp_path / "back", "lightx2v")
    assert_same(read(tmp_path / "back" / file), tensors)
    convert(tmp_path / "back", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").variant == variant


def test_lightx2v_has_no_place_for_self_forcing(tmp_path):
    save(tmp_path / "m.safetensors", random_tensors("transformer"))
    options = ConversionOptions(variant="self_forcing", settings={"transformer": {"num_heads": 2}})
    convert(tmp_path / "m.safetensors", tmp_path / "native", options)
    with pytest.raises(UserError, match="no place for 'self_forcing' checkpoints; give --layout wan"):
        export(tmp_path / "native", tmp_path / "back", "lightx2v")
    notes = export(tmp_path / "native", tmp_path / "back", "wan")
    assert any("convert it back with --schedule self_forcing" in note for note in notes)


def test_large_transformers_are_sharded_with_an_index(tmp_path, monkeypatch):
    made = official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 30_000)
    export(tmp_path / "native", tmp_path / "back", "wan")
    index = json.loads((tmp_path / "back/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in made["transformer"].values())
    assert len(set(index["weight_map"].values())) > 2
    convert(tmp_path / "back", tmp_path / "again")
    files = [open_checkpoint(tmp_path / name).files("transformer")[0].read_bytes() for name in ("native", "again")]
    assert files[0] == files[1]


def test_an_existing_destination_is_left_alone(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    with pytest.raises(UserError, match="exists"):
        export(tmp_path / "native", tmp_path / "src", "wan")
    with pytest.raises(UserError, match="give one of wan, lightx2v, diffusers"):
        export(tmp_path / "native", tmp_path / "back", "comfy")


def test_progress_reaches_the_total(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    for layout in ("wan", "diffusers"):
        seen = []
        export(
            tmp_path / "native", tmp_path / layout, layout, lambda done, total, seen=seen: seen.append((done, total))
        )
        assert (
            seen[-1][0]
            == seen[-1][1]
            == sum(
                tensor.nbytes
                for component in ("transformer", "vae", "text_encoder")
                for tensor in open_checkpoint(tmp_path / "native").tensors(component).values()
            )
        )


def test_sizes_that_an_official_folder_cannot_tell_are_written_into_its_config(tmp_path):
    official_folder(tmp_path / "src", image=True)
    convert(tmp_path / "src", tmp_path / "native")
    export(tmp_path / "native", tmp_path / "back", "wan")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["image_encoder"]["num_heads"] == CONFIGS["image_encoder"].num_heads
    assert "vae" not in config and "text_encoder" not in config


def test_arrays_are_transposed_exactly_in_strips():
    from x2v_jax.checkpoint.files.arrays import contiguous

    rng = np.random.default_rng(0)
    for shape in ((1, 1), (63, 130), (64, 64), (200, 3), (0, 4)):
        for dtype in (np.float32, np.float16, np.float64, np.int8):
            values = (rng.standard_normal(shape) * 9).astype(dtype)
            turned = contiguous(values.T)
            assert turned.flags.c_contiguous and np.array_equal(turned, values.T)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wan", "lightx2v", "diffusers"])
@pytest.mark.parametrize("alone", [False, True])
def test_latent_statistics_of_another_vae_survive_and_are_spoken_of(tmp_path, layout, alone):
    diffusers_folder(tmp_path / "src")
    config = json.loads((tmp_path / "src/vae/config.json").read_text())
    config |= {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    (tmp_path / "src/vae/config.json").write_text(json.dumps(config))
    convert(tmp_path / "src", tmp_path / "native", ConversionOptions(components=("vae",) if alone else ()))
    notes = export(tmp_path / "native", tmp_path / "back", layout)
    assert any("latents_mean, latents_std" in note for note in notes) == (layout != "diffusers")
    convert(tmp_path / "back", tmp_path / "again")
    vae = open_checkpoint(tmp_path / "again").config("vae")
    assert vae.latents_mean == (0.5,) * 16 and vae.latents_std == (2.0,) * 16


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["distill", '{"height": 64, "shift": 3.5, "negative_prompt": "it\'s bad"}'])
@pytest.mark.parametrize("layout", ["wan", "lightx2v", "diffusers"])
def test_the_note_about_the_schedule_brings_it_back(tmp_path, layout, schedule):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native", ConversionOptions(schedule=schedule))
    notes = export(tmp_path / "native", tmp_path / "back", layout)
    advice = [note.partition("convert it back with ")[2] for note in notes if "--schedule" in note]
    given = shlex.split(advice[0])[1] if advice else None
    convert(tmp_path / "back", tmp_path / "again", ConversionOptions(schedule=given))
    native, again = open_checkpoint(tmp_path / "native"), open_checkpoint(tmp_path / "again")
    assert (again.schedule, again.variant) == (native.schedule, native.variant)
    assert bool(advice) == (layout != "lightx2v" or schedule != "distill")


def test_a_converted_checkpoint_is_not_exported_over(tmp_path):
    official_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "native")
    with pytest.raises(UserError, match="is a converted checkpoint; choose another destination to export to"):
        export(tmp_path / "native", tmp_path / "native", "wan")
