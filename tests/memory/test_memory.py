"""What a run will take is predicted from sizes alone."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from x2v_jax import Pipeline
from x2v_jax.diffusion.rollout import Rollout
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.memory import predict
from x2v_jax.memory.activations import decode_bytes, decode_method, decoder_cache_bytes, denoise_bytes
from x2v_jax.models import functional
from x2v_jax.models.config import VaeConfig, WanConfig
from x2v_jax.models.vae import WanVae
from x2v_jax.models.wan import WanModel
from x2v_jax.request import Request
from x2v_jax.request.options import DTYPES


def test_the_predicted_weights_are_those_that_are_loaded(tmp_path: pathlib.Path):
    path = tiny_models.write_checkpoint(tmp_path / "i2v", image=True)
    picture = np.zeros((32, 48, 3), np.uint8)
    for dtype in DTYPES:
        pipeline = Pipeline.from_checkpoint(path, dtype=dtype)
        plan = pipeline.plan(pipeline.resolve(Request("a red circle", image=picture)))
        assert set(plan.phases) == {"text", "image", "denoise", "vae"} and plan.peak == max(plan.phases.values())
        for name, each in pipeline._components.networks.items():
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
    predicted = denoise_bytes(config, (5, 32, 32), 1, 4, on_cpu=True)
    assert 1 / 3 < predicted / analysis.temp_size_in_bytes < 3


def test_full_size_plans_are_plausible():
    """14B at 480p: 80 GB must suffice beside weights of 28.6 GB; decoding the whole video at once would not."""
    latents = (21, 60, 104)
    assert 3e9 < denoise_bytes(WanConfig.t2v_14b(), latents, 1, 2) < 15e9
    assert decode_method(VaeConfig(), latents, 60 << 30) == "stream"
    assert decode_method(VaeConfig(), latents, 8 << 30) == "tiled"
    assert decode_method(VaeConfig(), (1, 8, 8), None) == "whole"
    whole, stream, tiled = (decode_bytes(VaeConfig(), latents, m) for m in ("whole", "stream", "tiled"))
    assert whole > 40e9 > 20e9 > stream > 4 * tiled


def test_eight_bit_weights_are_refused_by_name():
    with pytest.raises(UserError, match="stored as int8"):
        predict.device_dtype("transformer", "blocks.ffn.linear_1.kernel", np.int8, "bfloat16")


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "int8_e4m3"])
@pytest.mark.parametrize("sink", [0, 3])
def test_the_cache_of_a_block_by_block_video_is_counted_once(kind: str, sink: int):
    config = tiny_models.T2V
    plan = RolloutPlan((1.0,), window=9, sink=sink, mode="sliding", positions="relative")
    graphdef, _ = functional.abstract(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    rollout = Rollout(graphdef, config, plan, (4, 6), cache_dtype=kind)
    shapes = jax.eval_shape(rollout.empty_cache)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    blocks = predict.BlockSizes(block=3, window=9, kv_cache=kind, originals=sink)
    counted = predict.kv_cache_bytes(dataclasses.replace(config, text_len=0), (9, 4, 6), blocks)
    assert counted == held
    # 1.3B at 480p: 21 frames of 1560 tokens, 30 layers, 1536 wide.
    full = predict.kv_cache_bytes(WanConfig.t2v_1_3b(), (21, 60, 104), dataclasses.replace(blocks, window=21))
    assert full > 2 * 30 * 21 * 1560 * 1536 * {"bfloat16": 2, "float32": 4}.get(kind, 1)


def test_the_plan_of_a_block_by_block_video_does_not_know_its_length(tmp_path: pathlib.Path):
    pipeline = Pipeline.from_checkpoint(tiny_models.write_checkpoint(tmp_path / "c", schedule=tiny_models.CAUSAL))
    short, long, endless = (
        pipeline.plan(pipeline.resolve(Request("a", **fields)))
        for fields in ({"num_frames": 9}, {"num_frames": 9 + 12 * 999}, {"endless": True})
    )
    assert short == long == endless and short.kv_cache > 0
    assert min(short.phases["denoise"], short.phases["vae"]) > short.kv_cache
    pictured = pipeline.plan(pipeline.resolve(Request("a", image=np.zeros((32, 48, 3), np.uint8))))
    assert pictured.phases.keys() == {"text", "image", "denoise", "vae"}


def test_what_the_decoder_keeps_is_counted_to_the_byte():
    for config in (tiny_models.VAE, VaeConfig()):
        graphdef, params = functional.abstract(lambda config=config: WanVae(config, rngs=nnx.Rngs(0)))
        latents = jax.ShapeDtypeStruct((1, 1, 4, 6, config.z_dim), jnp.float32)
        decode = lambda p, z, g=graphdef: functional.merge(g, p).decode_chunk(z)  # noqa: E731
        _, cache = jax.eval_shape(decode, params, latents)
        assert sum(leaf.size * 4 for leaf in jax.tree.leaves(cache)) == decoder_cache_bytes(config, (1, 4, 6))
