"""The tables of names hold every tensor of the published files, once, and lead back to the same bytes."""

import json
import pathlib

import numpy as np
import pytest
from small_checkpoints import CONFIGS, I2V, random_tensors

from x2v_jax.checkpoint.names import wan
from x2v_jax.checkpoint.names.diffusers import DiffusersNames, Part, res_blocks_of
from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

MANIFESTS = pathlib.Path(__file__).parents[2] / "reference/manifests"
PUBLISHED = {
    "wan2.1-t2v-1.3b": ("transformer", WanConfig.t2v_1_3b()),
    "wan2.1-t2v-14b": ("transformer", WanConfig.t2v_14b()),
    "wan2.1-i2v-14b": ("transformer", WanConfig.i2v_14b()),
    "umt5-xxl-encoder": ("text_encoder", Umt5Config()),
    "wan2.1-vae": ("vae", VaeConfig()),
    "clip-vit-h-14-visual": ("image_encoder", ClipConfig()),
}
SMALL = [*CONFIGS.items(), ("transformer", I2V)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_hold_exactly_the_tensors_of_the_published_files(name):
    component, config = PUBLISHED[name]
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    published = {key: tuple(shape) for key, (_, shape) in manifest["tensors"].items()}
    assert wan.official_shapes(component, config) == published
    assert wan.parameter_count(component, config) == manifest["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_official_key_goes_to_one_place_of_one_parameter(name):
    component, config = PUBLISHED[name]
    rows = wan.table(component, config)
    keys = [key for row in rows for key in row.official_keys]
    assert len(keys) == len(set(keys))
    assert len(rows) == len({row.native for row in rows})
    assert all(row.transform.forward_shape(row.official_shape) == row.shape for row in rows)


@pytest.mark.parametrize(("component", "config"), SMALL)
def test_transforms_are_exact_both_ways(component, config):
    tensors = random_tensors(component, config)
    for row in wan.table(component, config):
        for key in row.official_keys:
            ours = row.transform.forward(tensors[key])
            assert ours.shape == row.shape
            assert np.array_equal(row.transform.backward(ours), tensors[key])


def test_a_linear_layer_is_transposed_and_a_convolution_puts_channels_last():
    weight = np.arange(6).reshape(2, 3)
    assert np.array_equal(wan.LINEAR.forward(weight), weight.T)
    kernel = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    assert wan.CONV3D.forward(kernel)[1, 2, 3, 0, 1] == kernel[1, 0, 1, 2, 3]
    time = np.arange(24).reshape(4, 2, 3, 1, 1)
    assert wan.TIME_CONV.forward(time)[2, 1, 3] == time[3, 1, 2, 0, 0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_trees_of_the_networks_have_these_names_and_shapes(name):
    """Full-size networks, built without allocating."""
    from flax import nnx

    from x2v_jax.models import functional
    from x2v_jax.models.clip import ClipVisionTower
    from x2v_jax.models.umt5 import Umt5Encoder
    from x2v_jax.models.vae import WanVae
    from x2v_jax.models.wan import WanModel

    component, config = PUBLISHED[name]
    network = {
        "transformer": WanModel,
        "text_encoder": Umt5Encoder,
        "vae": WanVae,
        "image_encoder": ClipVisionTower,
    }[component]
    _, params = functional.abstract(lambda: network(config, rngs=nnx.Rngs(0)))
    tree = {key: tuple(leaf.shape) for key, leaf in functional.flatten(params).items()}
    assert tree == wan.native_shapes(component, config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_names_lead_there_and_back(name):
    component, config = PUBLISHED[name]
    translate = DiffusersNames(component, getattr(config, "num_res_blocks", 2))
    seen = set()
    for key in wan.official_shapes(component, config):
        others, transform = translate.format(key)
        for index, other in enumerate(others):
            assert translate.parse(other) == Part(key, index, len(others), transform)
            assert other not in seen
            seen.add(other)
    if component == "vae":
        assert res_blocks_of(seen) == config.num_res_blocks


def test_diffusers_names_that_other_converters_get_wrong():
    translate = DiffusersNames("transformer")
    pairs = {
        "blocks.7.modulation": "blocks.7.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
        "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
        "blocks.0.norm3.bias": "blocks.0.norm2.bias",
        "blocks.39.cross_attn.norm_k_img.weight": "blocks.39.attn2.norm_added_k.weight",
        "blocks.1.self_attn.o.bias": "blocks.1.attn1.to_out.0.bias",
        "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    }
    for official, other in pairs.items():
        assert translate.format(official) == ((other,), None)
        assert translate.parse(other) == Part(official)


def test_the_decoder_of_the_vae_is_grouped_by_stage_in_diffusers():
    translate = DiffusersNames("vae")
    assert translate.format("decoder.upsamples.3.time_conv.bias")[0] == (
        "decoder.up_blocks.0.upsamplers.0.time_conv.bias",
    )
    assert translate.format("decoder.upsamples.4.shortcut.weight")[0] == (
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
    )
    assert translate.parse("decoder.up_blocks.3.resnets.2.norm1.gamma") == Part("decoder.upsamples.14.residual.0.gamma")
    assert translate.parse("decoder.up_blocks.0.resnets.3.norm1.gamma") is None


@pytest.mark.parametrize("component", CONFIGS)
def test_unknown_diffusers_names_are_not_guessed(component):
    translate = DiffusersNames(component)
    assert translate.parse("blocks.01.attn1.to_q.weight") is None
    assert translate.parse("something.else.weight") is None
    with pytest.raises(KeyError):
        translate.format("something.else.weight")
