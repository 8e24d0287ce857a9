"""8-bit checkpoints from the converter to frames: the trained tiny model makes the same video."""

import pathlib

import numpy as np
import pytest
import tiny_models
from small_checkpoints import save

from x2v_jax import Pipeline
from x2v_jax.checkpoint.conversion.convert import convert
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.generate.network import Network, describe_networks

SHAPES = pathlib.Path(__file__).resolve().parents[2] / "assets/shapes_t2v_4step"
# Peak signal to noise against the bfloat16 video, with transformer and text encoder in 8 bits; measured 51.4 and 39.0.
LEAST_PSNR = {"int8": 44.0, "fp8": 32.0}
DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def frames_of(path: pathlib.Path) -> np.ndarray:
    return Pipeline.from_checkpoint(path)("a red circle moves right", seed=3, num_frames=9).astype(np.float32)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return frames_of(SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("word", DTYPES)
def test_the_video_of_8_bit_weights_is_close_to_that_of_bfloat16(tmp_path, exact, word):
    everything = ("transformer", "text_encoder")
    notes = convert(SHAPES, tmp_path / word, ConversionOptions(quantize=word, quantize_components=everything))
    assert f"transformer: 60 matrices become {DTYPES[word]} with a float32 scale a row" in notes
    native = open_checkpoint(tmp_path / word)
    assert native.model["components"]["vae"] == {"reference": str(SHAPES.parent / "shapes")}
    sizes = [sum(f.stat().st_size for f in c.files("transformer")) for c in (native, open_checkpoint(SHAPES))]
    assert sizes[0] < 0.6 * sizes[1]
    frames = frames_of(tmp_path / word)
    psnr = 10 * np.log10(255**2 / np.mean((frames - exact) ** 2))
    assert LEAST_PSNR[word] < psnr < 70, f"{psnr:.1f} dB"


@pytest.mark.slow
@pytest.mark.parametrize("word", DTYPES)
def test_weights_reach_the_device_as_they_are(tmp_path, word):
    source = tiny_models.write_checkpoint(tmp_path / "source", image=True)
    parts = ("transformer", "text_encoder", "image_encoder")
    convert(source, tmp_path / word, ConversionOptions(quantize=word, quantize_components=parts))
    checkpoint = open_checkpoint(tmp_path / word)
    networks, _ = describe_networks(checkpoint, (), dtype="bfloat16")
    for name in parts:
        stored, loaded = checkpoint.tensors(name), networks[name].load()
        assert networks[name].quantization == DTYPES[word]
        own = loaded["blocks"]["attn" if name != "transformer" else "self_attn"]
        own = own["to_qkv" if name == "image_encoder" else "q"]
        assert (str(own["weight"].dtype), str(own["scale"].dtype)) == (DTYPES[word], "float32")
        key = next(key for key in stored if key.endswith(("attn.q.weight", "to_qkv.weight")))
        assert name == "transformer" or np.array_equal(np.asarray(own["weight"]), np.asarray(stored[key]))
    # Callers that know the tensors alone get the same network.
    bare = Network("text_encoder", tiny_models.TEXT, checkpoint.tensors("text_encoder"), dtype="float32")
    assert bare.quantization == DTYPES[word]


def test_a_lora_at_load_is_merged_into_8_bit_weights_with_a_sentence(tmp_path):
    source = tiny_models.write_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "int8", ConversionOptions(quantize="int8"))
    rng = np.random.default_rng(0)
    pair = {"lora_up.weight": (48, 2), "lora_down.weight": (2, 32)}
    tensors = {
        f"diffusion_model.blocks.1.ffn.0.{k}": rng.standard_normal(s).astype(np.float32) for k, s in pair.items()
    }
    lora = save(tmp_path / "l.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path / "int8")
    plain, _ = describe_networks(checkpoint, (), dtype="float32")
    merged, report = describe_networks(checkpoint, ((str(lora), 1.0),), dtype="float32")
    assert "1 of the changed matrices are int8: they are dequantized, merged in float32" in str(report)
    before, after = (n["transformer"].load()["blocks"]["ffn"]["linear_1"] for n in (plain, merged))
    assert np.array_equal(before["weight"][0], after["weight"][0])
    assert not np.array_equal(before["weight"][1], after["weight"][1])
    up, down = tensors.values()
    change, exact = np.asarray(_values(after)[1] - _values(before)[1]), up @ down
    assert np.abs(change - exact).max() < 2 * np.asarray(after["scale"]).max()


def _values(linear) -> np.ndarray:
    return np.asarray(linear["weight"], np.float32) * np.asarray(linear["scale"])[..., None]
