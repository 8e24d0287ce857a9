"""Where memory does not suffice, a sentence says what is needed, of what it consists and what would fit."""

import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models

from x2v_jax import Pipeline
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.generate.vae import VaeRunner
from x2v_jax.memory import device, predict
from x2v_jax.memory.need import MemoryNeed, block_sizes
from x2v_jax.models.config import VaeConfig, WanConfig
from x2v_jax.request import Request
from x2v_jax.request.options import RunOptions
from x2v_jax.request.resolve import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def distilled(folder: pathlib.Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_models.write_checkpoint(folder / "d", schedule=tiny_models.DISTILLED))


@pytest.fixture(scope="module")
def base(folder: pathlib.Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_models.write_checkpoint(folder / "b"))


@pytest.fixture(scope="module")
def causal(folder: pathlib.Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_models.write_checkpoint(folder / "c", schedule=tiny_models.CAUSAL))


def needs(
    pipeline: Pipeline, full_size: bool = False, options: dict[str, Any] | None = None, **fields: Any
) -> MemoryNeed:
    """What a request needs; at full size, with the tiny weights but activations of 14B at 720P."""
    request = resolve(Request("a red circle", **fields), pipeline.checkpoint)
    configs = {name: pipeline.checkpoint.config(name) for name in ("transformer", "vae", "text_encoder")}
    latents = (2, 4, 6)
    if full_size:
        configs |= {"transformer": WanConfig.t2v_14b(), "vae": VaeConfig()}
        latents = (21, 90, 160)
    chosen = RunOptions.of(options or {})
    blocks = None
    if isinstance(request.plan, RolloutPlan):
        blocks = block_sizes(request.plan, request.kv_cache or chosen.dtype, request.inputs.encoded_frames_from)
    return MemoryNeed(pipeline.checkpoint, configs, latents, request.uses_guidance, True, blocks, chosen)


def exhausted(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")


@pytest.mark.slow
def test_a_full_device_is_explained_whatever_was_running(distilled: Pipeline, monkeypatch: pytest.MonkeyPatch):
    for owner, name in ((VaeRunner, "decode"), (type(distilled._components.denoiser), "sample_step_distill")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, exhausted)
            with pytest.raises(UserError) as error:
                distilled.generate(Request("a red circle", seed=1))
        assert "the device's memory does not suffice" in str(error.value) and " GB predicted" in str(error.value)
    assert distilled.generate(Request("a red circle", seed=1)).frames.shape == (5, 32, 48, 3)


def test_other_errors_of_the_device_are_left_alone(distilled: Pipeline, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    monkeypatch.setattr(VaeRunner, "decode", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell off"):
        distilled.generate(Request("a red circle", seed=1))


def test_a_full_device_is_explained_in_a_stream(causal: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("x2v_jax.generate.vae.StreamDecoder.__call__", exhausted)
    with pytest.raises(UserError, match=r"memory does not suffice.*set kv_cache to 'int8'"):
        list(causal.stream("a red circle", num_frames=9))


def test_the_sentence_names_the_phase_the_parts_and_settings_that_fit(base: Pipeline):
    own = needs(base, full_size=True, options={"vae_decode": "tiled"})
    plan, enough = own.plan(), own.plan(sequential_guidance=True).peak
    assert plan.peak == plan.phases["denoise"] > plan.phases["vae"]
    sentence = own.explain(enough)
    start = (
        r"^[\d.]+ GB predicted in the phase 'denoise' \(the biggest parts, in GB: activations [\d.]+, weights of the "
    )
    assert re.search(start, sentence)
    # Each of these alone would do; sizes and settings that would not are left out.
    assert f"; set sequential_guidance to true ({enough / 1e9:.1f} GB) or ask for 480 x 832 pixels (" in sentence
    assert "offload" not in sentence


def test_several_settings_are_named_together_where_none_suffices_alone(base: Pipeline):
    own = needs(base, full_size=True)
    both = own.plan(sequential_guidance=True, vae_decode="tiled", latent_size=(21, 60, 104)).peak
    sentence = own.explain(both)
    assert "set sequential_guidance to true and" in sentence and " and ask for 480 x 832 pixels (" in sentence
    assert float(re.findall(r"\(([\d.]+) GB\)", sentence)[-1]) * 1e9 <= both + 5e7
    assert "no settings help enough" in own.explain(1)


def test_the_sentence_never_advises_what_is_set_already(base: Pipeline, causal: Pipeline):
    changed = {"vae_decode": "tiled", "sequential_guidance": True, "offload": "blocks"}
    words = " ".join(change.words for change in needs(base, True, changed).changes())
    assert not any(name in words for name in changed) and "--quantize int8" in words
    assert "keep_encoders" in " ".join(change.words for change in needs(base, True, {"keep_encoders": True}).changes())
    for kind, there in (("int8_e4m3", False), ("bfloat16", True)):
        words = " ".join(change.words for change in needs(causal, kv_cache=kind).changes())
        assert ("set kv_cache to 'int8'" in words) is there


def test_a_limit_is_kept_and_a_prediction_is_only_a_warning(
    distilled: Pipeline, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
):
    request = distilled.resolve(Request("a red circle", seed=1))
    limited = Pipeline(distilled.checkpoint, memory_limit=1e-3)
    loaded = [part.load for part in limited._components.networks.values()]
    monkeypatch.setattr("x2v_jax.generate.network.Network.load", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"memory_limit is 0.001 GB, and this video needs more: .* GB predicted"):
        limited.generate(request)
    assert loaded and not any(part.is_loaded for part in limited._components.networks.values())
    peak = distilled.plan(request).peak
    monkeypatch.setattr(device, "device_bytes", lambda: peak)
    monkeypatch.setattr(device, "device_bytes_free", lambda: peak // 2)
    with pytest.warns(UserWarning, match="may not be enough"):
        distilled.check_memory(request)
    monkeypatch.setattr(device, "device_bytes", lambda: 100)
    with pytest.raises(UserError, match="the weights that are needed at one time take"):
        distilled.check_memory(request)


def test_the_plan_counts_8_bit_weights_and_blocks_on_the_host(base: Pipeline):
    own = needs(base)
    floats, eight = own.plan(), own.plan(quantized=["transformer", "text_encoder"])
    assert (
        eight.weights["transformer"] < floats.weights["transformer"] and eight.weights["vae"] == floats.weights["vae"]
    )
    # Four matrices of each attention and two of the MLP, in each of the two layers.
    wan = tiny_models.T2V
    elements = wan.num_layers * (8 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim)
    scales = wan.num_layers * 4 * (8 * wan.dim + wan.ffn_dim + wan.dim)
    assert floats.weights["transformer"] - eight.weights["transformer"] == 2 * elements - (elements + scales)
    network = base._components.network("transformer")
    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(network.load()["blocks"]))
    deep = needs(base, full_size=True).plan(offload="blocks", latent_size=(2, 4, 6))
    assert own.plan(offload="blocks").host == blocks and deep.host == blocks
    assert deep.parts["denoise"]["transformer"] == floats.weights["transformer"] - blocks + 2 * blocks // 40
    assert deep.weights == floats.weights


def test_auto_decodes_in_tiles_where_the_device_could_not_hold_more(base: Pipeline):
    own = needs(base, full_size=True)
    assert own.plan(available=60 << 30).phases["vae"] == own.plan(vae_decode="stream").phases["vae"]
    assert own.plan(available=8 << 30).phases["vae"] == own.plan(vae_decode="tiled").phases["vae"]
    assert own.plan(vae_dtype="bfloat16").phases["vae"] < own.plan().phases["vae"]


def test_copies_of_the_sinks_keys_are_counted():
    config, latents = tiny_models.T2V, (9, 4, 6)
    one, two = (predict.BlockSizes(3, 9, "int8_e4m3", originals=n) for n in (0, 3))
    more = predict.kv_cache_bytes(config, latents, two) - predict.kv_cache_bytes(config, latents, one)
    assert more == config.num_layers * config.dim * 3 * 6 * 2
    assert np.isclose(
        predict.kv_cache_bytes(config, latents, one),
        predict.kv_cache_bytes(config, latents, predict.BlockSizes(3, 9, "int8")),
    )
