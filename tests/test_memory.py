"""What a run will take is predicted from sizes alone."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from x2v_jax import Pipeline, memory
from x2v_jax.errors import UserError
from x2v_jax.models import functional
from x2v_jax.models.config import VaeConfig, WanConfig
from x2v_jax.models.wan import WanModel
from x2v_jax.request import Request


def test_the_predicted_weights_are_those_that_are_loaded(tmp_path: pathlib.Path):
    path = tiny_models.write_checkpoint(tmp_path / "i2v", image=True)
    picture = np.zeros((32, 48, 3), np.uint8)
    for dtype in memory.DTYPES:
        pipeline = Pipeline.from_checkpoint(path, dtype=dtype)
        plan = pipeline.plan(pipeline.resolve(Request("a red circle", image=picture)))
        assert set(plan.phases) == {"text", "image", "denoise", "vae"} and plan.peak == max(plan.phases.values())
        for name, each in pipeline._networks.items():
            assert plan.weights[name] == sum(leaf.nbytes for leaf in jax.tree.leaves(each.load()))


def test_predicted_activations_are_near_what_the_compiler_reports():
    config = dataclasses.replace(tiny_models.T2V, dim=256, ffn_dim=1024, num_heads=4)
    graphdef, params = functional.abstract(lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 5, 32, 32, 16), (1,), (1, config.text_len, 24))
    ]
    program = jax.jit(lambda p, x, t, text: functional.merge(graphdef, p)(x, t, text)).lower(params, *shapes).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    predicted = memory.denoise_bytes(config, (5, 32, 32), 1, 4, on_cpu=True)
    assert 1 / 3 < predicted / analysis.temp_size_in_bytes < 3


def test_full_size_plans_are_plausible():
    """14B at 480p: 80 GB must suffice beside weights of 28.6 GB; decoding the whole video at once would not."""
    latents = (21, 60, 104)
    assert 3e9 < memory.denoise_bytes(WanConfig.t2v_14b(), latents, 1, 2) < 15e9
    assert memory.decode_method(VaeConfig(), latents, 60 << 30) == "stream"
    assert memory.decode_method(VaeConfig(), latents, 8 << 30) == "tiled"
    assert memory.decode_method(VaeConfig(), (1, 8, 8), None) == "whole"
    whole, stream, tiled = (memory.decode_bytes(VaeConfig(), latents, m) for m in ("whole", "stream", "tiled"))
    assert whole > 40e9 > 20e9 > stream > 4 * tiled


def test_eight_bit_weights_are_refused_by_name():
    with pytest.raises(UserError, match="stored as int8"):
        memory.device_dtype("transformer", "blocks.ffn.linear_1.kernel", np.int8, "bfloat16")
