"""Files of recorded activations: what is written is read, and what is not such a file is refused by name."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_models
from small_checkpoints import save
from smooth_checkpoints import recording

from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.names.smoothing import GROUPS, module_of, smoothing_shapes
from x2v_jax.checkpoint.quantize.calibration import check_destination, read_calibration
from x2v_jax.errors import UserError

CONFIG = tiny_models.T2V


def test_what_is_written_is_read(tmp_path):
    written = recording(tmp_path / "c.safetensors", CONFIG)
    found = read_calibration(written.path)
    assert found.path == written.path and found.about.items() >= written.about.items()
    assert found.maxima.keys() == GROUPS.keys()
    for name, values in written.maxima.items():
        np.testing.assert_array_equal(found.maxima[name], values)
    found.check(CONFIG)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((2, 32), np.nan, np.float32), r"self_attn\.o holds NaN or infinity; calibrate again"),
        (np.full((2, 32), np.inf, np.float32), r"self_attn\.o holds NaN or infinity"),
        (np.full((2, 32), -1, np.float32), r"self_attn\.o holds negative numbers"),
        (np.ones((3, 32), np.float32), r"self_attn\.o has shape \[3, 32\] and needs \[2, 32\]"),
    ],
)
def test_damaged_numbers_are_named(tmp_path, value, message):
    path = recording(tmp_path / "c.safetensors", CONFIG, changes={"self_attn.o": value}).path
    with pytest.raises(UserError, match=message):
        read_calibration(path).check(CONFIG)


def test_another_models_recording_is_refused_with_its_sizes(tmp_path):
    path = recording(tmp_path / "c.safetensors", tiny_models.I2V).path
    with pytest.raises(UserError, match=r"of other sizes .*model_type is 'i2v' there and 't2v' here"):
        read_calibration(path).check(CONFIG)


@pytest.mark.parametrize("config", ["{}", "not json", "[]", None])
def test_a_header_without_sizes_is_refused(tmp_path, config):
    path = tmp_path / "c.safetensors"
    written = recording(path, CONFIG)
    about: dict[str, Any] = {**written.about, "format": "x2v-jax calibration", "version": "1"}
    about = {**about, "config": config} if config is not None else {k: v for k, v in about.items() if k != "config"}
    _write(path, written.maxima, about)
    with pytest.raises(UserError, match="does not say of which sizes it is"):
        read_calibration(path).check(CONFIG)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    written = recording(path, CONFIG)
    header = {"format": "x2v-jax calibration", "version": "1", "config": json.dumps(CONFIG.to_dict())}
    lora = save(tmp_path / "l.safetensors", {"x": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"--smooth .*l\.safetensors: it holds no recorded activations"):
        read_calibration(lora)
    with pytest.raises(UserError, match=r"it is a folder; give the file that `python -m convert calibrate` made"):
        read_calibration(tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        read_calibration(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"^--smooth is empty; give a file"):
        read_calibration("")
    (tmp_path / "text.safetensors").write_text("a prompt")
    with pytest.raises(UserError, match=r"--smooth .*text\.safetensors: "):
        read_calibration(tmp_path / "text.safetensors")
    _write(path, written.maxima, header | {"version": "2"})
    with pytest.raises(UserError, match="its version is '2', and this program reads '1'"):
        read_calibration(path)
    _write(path, {"self_attn.q": written.maxima["self_attn.q"]}, header)
    with pytest.raises(UserError, match=r"c\.safetensors: self_attn\.o is missing; cross_attn\.q is missing; "):
        read_calibration(path)
    _write(path, {**written.maxima, "ffn.linear_2": np.ones((2, 32), np.float32)}, header)
    with pytest.raises(UserError, match=r"c\.safetensors: ffn\.linear_2 is unknown; calibrate again"):
        read_calibration(path)
    _write(path, {**written.maxima, "self_attn.q": np.ones((2, 32), np.float64)}, header)
    with pytest.raises(UserError, match=r"c\.safetensors: self_attn\.q is float64 of shape \[2, 32\] and must be f"):
        read_calibration(path)


def test_nothing_but_zeros_is_no_recording(tmp_path):
    zeros = {name: np.zeros((2, 32), np.float32) for name in GROUPS}
    path = recording(tmp_path / "c.safetensors", CONFIG, changes=zeros).path
    with pytest.raises(UserError, match="nothing was recorded, all of its numbers are 0; calibrate again"):
        read_calibration(path).check(CONFIG)


@pytest.mark.parametrize("left", [0, 5, 300, -4])
def test_a_file_that_was_cut_is_not_downloaded_again(tmp_path, left):
    path = recording(tmp_path / "c.safetensors", CONFIG).path
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError) as caught:
        read_calibration(path)
    text = str(caught.value)
    assert text.count(str(path)) == 1 and "?" not in text and "ownload" not in text and ".;" not in text
    assert text.startswith(f"--smooth {path}: it is ") and text.endswith("; run `python -m convert calibrate` again")


def test_a_place_that_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "there.safetensors").touch()
    for path, message in (
        (tmp_path / "there.safetensors", "exists; give another name"),
        (tmp_path / "c.txt", r"give a file that ends in \.safetensors"),
        (tmp_path / "none/c.safetensors", "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_destination(path)
    assert check_destination(tmp_path / "new.safetensors") == tmp_path / "new.safetensors"


def test_names():
    assert set(smoothing_shapes(CONFIG).values()) == {(2, 32)} and len(smoothing_shapes(CONFIG)) == 5
    assert module_of("blocks.ffn.linear_1.kernel") == "ffn.linear_1" and module_of("blocks.modulation") == ""


def _write(path: pathlib.Path, tensors: Any, header: dict[str, str]) -> None:
    with SafetensorsWriter(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, header) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
