"""Native checkpoints: written whole or not at all, opened with sentences where they are damaged, loaded as they are."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from small_checkpoints import CONFIGS

from x2v_jax.checkpoint.files.lazy_tensor import Streamed
from x2v_jax.checkpoint.names.wan import native_shapes
from x2v_jax.checkpoint.native.reader import open_checkpoint, save_native
from x2v_jax.checkpoint.native.writer import complete_folder, write_component
from x2v_jax.errors import UserError
from x2v_jax.models.config import Schedule

VAE = CONFIGS["vae"]


def parameters(component="vae", seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = native_shapes(component, CONFIGS[component])
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(path, component="vae", values=None, **more):
    values = parameters(component) if values is None else values
    components = {component: (CONFIGS[component], values)}
    arguments = {"task": None, "variant": "base", "schedule": Schedule(), "components": components}
    save_native(path, **(arguments | more))
    return values


def edit(path, **changes):
    file = path / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_saved_is_what_is_opened(tmp_path):
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_text("{}")
    steps = (1000, 500)
    schedule = Schedule("step_distill", num_inference_steps=2, guidance_scale=1.0, denoising_step_list=steps)
    values = save(tmp_path / "c", task="t2v", variant="distill", schedule=schedule, tokenizer_file=tokenizer)
    native = open_checkpoint(tmp_path / "c")
    assert (native.task, native.variant, native.schedule) == ("t2v", "distill", schedule)
    assert native.config("vae") == VAE
    assert native.components == ("vae", "tokenizer")
    assert native.tokenizer_file() == tmp_path / "c/tokenizer.json"
    tensors = native.tensors("vae")
    assert tensors.keys() == values.keys()
    assert all(np.array_equal(tensors[name].read(), values[name]) for name in values)
    assert open_checkpoint(tmp_path / "c/model.json").path == native.path
    assert native.model["components"]["vae"]["parameters"] == sum(v.size for v in values.values())


def test_loading_gives_nested_jax_arrays(tmp_path):
    import jax

    values = save(tmp_path / "c")
    native = open_checkpoint(tmp_path / "c")
    tree = native.load("vae")
    kernel = tree["encoder"]["downsamples"]["0"]["conv1"]["kernel"]
    assert isinstance(kernel, jax.Array) and kernel.dtype == np.float32
    assert np.array_equal(kernel, values["encoder.downsamples.0.conv1.kernel"])
    half = native.load("vae", "bfloat16")["conv1"]["kernel"]
    assert np.array_equal(np.asarray(half), values["conv1.kernel"].astype(ml_dtypes.bfloat16))


def test_loading_reads_only_the_slices_of_a_sharding(tmp_path):
    script = f"""
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from x2v_jax.checkpoint.native.reader import open_checkpoint
native = open_checkpoint({str(tmp_path / "c")!r})
mesh = jax.make_mesh((2,), ("model",))
name = "encoder.downsamples.0.conv1.kernel"
sharding = NamedSharding(mesh, PartitionSpec(None, None, None, None, "model"))
tree = native.load("vae", sharding={{name: sharding}})
array = tree["encoder"]["downsamples"]["0"]["conv1"]["kernel"]
assert array.sharding.is_equivalent_to(sharding, array.ndim)
assert [s.data.shape[-1] for s in array.addressable_shards] == [2, 2]
assert np.array_equal(array, native.tensors("vae")[name].read())
"""
    save(tmp_path / "c")
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120)


def test_components_can_be_shared_by_reference(tmp_path):
    values = save(tmp_path / "a")
    text = parameters("text_encoder")
    save(tmp_path / "b", "text_encoder", text, references={"vae": "../a"})
    save(tmp_path / "c", "text_encoder", text, references={"vae": str(tmp_path / "b")})
    for name in ("b", "c"):
        native = open_checkpoint(tmp_path / name)
        assert native.has("vae") and native.config("vae") == VAE
        assert native.holder("vae").path.resolve() == (tmp_path / "a").resolve()
        assert np.array_equal(native.tensors("vae")["conv1.bias"].read(), values["conv1.bias"])
    (tmp_path / "a/model.json").unlink()
    with pytest.raises(UserError, match=r"takes its vae from another checkpoint.*Put that one back"):
        open_checkpoint(tmp_path / "b").tensors("vae")


def test_references_in_a_circle(tmp_path):
    text = parameters("text_encoder")
    save(tmp_path / "a", "text_encoder", text, references={"vae": "../b"})
    save(tmp_path / "b", "text_encoder", text, references={"vae": "../a"})
    with pytest.raises(UserError, match="leads in a circle"):
        open_checkpoint(tmp_path / "a").config("vae")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"format_version": 4}, "format_version is 4, and this program reads up to 3; update it"),
        ({"format_version": "new"}, "format_version is 'new'"),
        ({"components": []}, "components is not"),
        ({"components": {"rogue": {}}}, "components is not"),
        ({"components": {"vae": []}}, "vae is no JSON object"),
        ({"components": {"vae": {"config": {}, "files": []}}}, "lists no files"),
        ({"components": {"vae": {"config": {}, "files": ["../x.safetensors"]}}}, "outside it; refused"),
        ({"components": {"vae": {"config": {}, "files": ["gone.safetensors"]}}}, "gone.safetensors is missing"),
        ({"quantization": {"transformer": {"dtype": "int4"}}}, "is .int4.; this program runs int8"),
    ],
)
def test_a_damaged_model_json(tmp_path, changes, message):
    save(tmp_path / "c")
    edit(tmp_path / "c", **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "c").tensors("vae")


def test_paths_that_are_no_native_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"convert it with `python -m convert wan"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path):
    save(tmp_path / "c")
    file = tmp_path / "c/vae.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        open_checkpoint(tmp_path / "c").tensors("vae")


def test_weights_that_do_not_fit_the_config(tmp_path):
    save(tmp_path / "c")
    entry = json.loads((tmp_path / "c/model.json").read_text())["components"]["vae"]
    edit(tmp_path / "c", components={"vae": entry | {"config": entry["config"] | {"num_res_blocks": 2}}})
    with pytest.raises(UserError, match=r"encoder\.downsamples\.1\.norm1\.gamma is missing.*convert"):
        open_checkpoint(tmp_path / "c").tensors("vae")


def test_a_component_that_is_not_there(tmp_path):
    save(tmp_path / "c")
    native = open_checkpoint(tmp_path / "c")
    assert native.tokenizer_file() is None
    with pytest.raises(UserError, match="has no text_encoder; convert it with one, or with --reuse"):
        native.tensors("text_encoder")


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    values = parameters()
    values["conv1.bias"] = values["conv1.bias"][:-1]
    values["extra"] = np.zeros(1, np.float32)
    del values["conv2.bias"]
    with pytest.raises(UserError) as error:
        save(tmp_path / "c", values=values)
    for words in ("conv2.bias is missing", "extra is unknown", "conv1.bias has shape"):
        assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_path_is_replaced_only_on_request_and_only_if_it_is_ours(tmp_path):
    save(tmp_path / "c")
    with pytest.raises(UserError, match="exists; choose another destination or give --overwrite"):
        save(tmp_path / "c")
    new = {name: value + 1 for name, value in parameters().items()}
    save(tmp_path / "c", values=new, overwrite=True)
    assert np.array_equal(open_checkpoint(tmp_path / "c").tensors("vae")["conv1.bias"].read(), new["conv1.bias"])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_text("x")
    with pytest.raises(UserError, match="is not a converted checkpoint"):
        save(tmp_path / "photos", overwrite=True)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "empty", "photos"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "c") as folder:
        (folder / "half").write_text("x")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_up_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"c.tmp-{dead.pid}").mkdir()
    (tmp_path / f"c.tmp-{os.getppid()}").mkdir()  # somebody at work: left alone
    save(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", f"c.tmp-{os.getppid()}"]


def test_what_a_killed_process_was_replacing_gets_its_name_back(tmp_path):
    save(tmp_path / "c")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "c").rename(tmp_path / f"c.old-{dead.pid}")
    with pytest.raises(UserError, match="exists; choose another destination"):
        save(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and open_checkpoint(tmp_path / "c").has("vae")


def test_an_interruption_while_replacing_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path / "c")
    before = (tmp_path / "c" / "model.json").read_bytes()
    rename = pathlib.Path.rename

    def interrupted(self, target):
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "c", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c" / "model.json").read_bytes() == before


def test_folders_that_were_made_on_the_way_go_with_what_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "a" / "b" / "c"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_the_work(tmp_path):
    folder = complete_folder(tmp_path / "c", nbytes=10**18)
    with pytest.raises(UserError, match="needs 1,000,000,000,000,000,000 bytes"), folder:
        pass
    assert not list(tmp_path.iterdir())


def test_large_components_are_split_into_shards(tmp_path):
    values = parameters()
    streams = {name: Streamed.of(value) for name, value in values.items()}
    entry = write_component(tmp_path, "vae", VAE, streams, shard_bytes=40_000)
    assert len(entry["files"]) > 3 and entry["files"][0] == f"vae-00001-of-{len(entry['files']):05d}.safetensors"
    largest = max(value.nbytes for value in values.values())
    assert all((tmp_path / file).stat().st_size <= max(40_000, largest) + 8_000 for file in entry["files"])


def test_opening_imports_no_jax(tmp_path):
    save(tmp_path / "c")
    script = f"""
import sys
from x2v_jax.checkpoint.native.reader import open_checkpoint
open_checkpoint({str(tmp_path / "c")!r}).tensors("vae")
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=pathlib.Path(__file__).parents[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["schedule"].update(shift="5"), "schedule: shift is '5'; it must be a positive number"),
        (lambda model: model.update(task="v2v"), "task is 'v2v'"),
        (lambda model: model.update(variant="fast"), "variant is 'fast'"),
        (lambda model: model.update(schedule=[1]), "schedule is no JSON object"),
        (lambda model: model["components"]["vae"]["config"].update(dim_mult=3), "the config of vae is damaged"),
    ],
)
def test_a_damaged_model_json_is_a_sentence(tmp_path, change, message):
    save(tmp_path / "c")
    model = json.loads((tmp_path / "c/model.json").read_text())
    change(model)
    (tmp_path / "c/model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match=message):
        checkpoint = open_checkpoint(tmp_path / "c")
        _ = checkpoint.schedule, checkpoint.tensors("vae")
