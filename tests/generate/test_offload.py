"""With the transformer's blocks in the host's memory, videos are the same to the bit."""

import pathlib

import jax
import numpy as np
import pytest
import tiny_models

from x2v_jax import Pipeline
from x2v_jax.models import functional
from x2v_jax.request import Request


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["base", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("distilled", "causal", "image"))]
)
def test_blocks_in_the_hosts_memory_give_the_same_video(kind: str, tmp_path: pathlib.Path):
    schedules = {"base": tiny_models.BASE, "causal": tiny_models.CAUSAL}
    schedule = schedules.get(kind, tiny_models.DISTILLED)
    path = tiny_models.write_checkpoint(tmp_path / kind, schedule=schedule, image=kind == "image")
    picture = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8) if kind == "image" else None
    request = Request("a red circle", seed=3, image=picture, num_frames=21 if kind == "causal" else None)
    plain, offloaded = (Pipeline.from_checkpoint(path, offload=offload) for offload in ("none", "blocks"))
    expected, result = plain.generate(request), offloaded.generate(request)
    np.testing.assert_array_equal(result.latents, expected.latents)
    np.testing.assert_array_equal(result.frames, expected.frames)
    params = functional.flatten(offloaded._components.network("transformer").load())
    kinds = {name.split(".")[0] == "blocks": leaf.sharding.memory_kind for name, leaf in params.items()}
    assert kinds == {True: "pinned_host", False: jax.devices()[0].default_memory().kind}
    assert result.memory_plan.host == sum(leaf.nbytes for name, leaf in params.items() if name.startswith("blocks."))


def test_blocks_in_the_hosts_memory_are_compiled_ahead_too(tmp_path: pathlib.Path):
    path = tiny_models.write_checkpoint(tmp_path / "d", schedule=tiny_models.DISTILLED)
    pipeline = Pipeline.from_checkpoint(path, offload="blocks")
    names = [name for name, _ in pipeline.warm_up(Request("a red circle", seed=1))]
    assert names == ["text encoder", "noise", "denoising", "VAE decoder, whole"]
    assert not any(network.is_loaded for network in pipeline._components.networks.values())
