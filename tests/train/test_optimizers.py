"""Optimizers: the schedule's corners, and which weights Muon takes."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.state import _muon_dimensions, learning_rate_schedule, make_optimizer
from x2v_jax.errors import UserError


def test_the_schedule_warms_up_stays_and_decays():
    schedule = learning_rate_schedule(1.0, steps=100, warmup=10, decay_share=0.4, final_scale=0.1)
    rates = [float(schedule(step)) for step in (0, 5, 10, 59, 80, 100)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 1.0, 0.55, 0.1], atol=1e-6)


def test_without_warm_up_and_decay_the_rate_is_constant():
    schedule = learning_rate_schedule(0.3, steps=50, warmup=0, decay_share=0.0, final_scale=1.0)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 1, 49)], 0.3)


def test_muon_takes_hidden_matrices_only():
    params = {
        "blocks": {"q": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}, "modulation": jnp.ones((2, 6, 4))},
        "text_embedding": {"kernel": jnp.ones((3, 4))},
        "patch_embedding": {"kernel": jnp.ones((1, 2, 2, 3, 4))},
        "head": {"linear": {"kernel": jnp.ones((4, 4))}},
    }
    dimensions = _muon_dimensions(params)
    assert dimensions["blocks"]["q"]["kernel"].reduction_axis == 1
    assert dimensions["text_embedding"]["kernel"].reduction_axis == 0
    assert dimensions["blocks"]["q"]["bias"] is None
    assert dimensions["blocks"]["modulation"] is None
    assert dimensions["patch_embedding"]["kernel"] is None
    assert dimensions["head"]["linear"]["kernel"] is None


def test_muon_orthogonalises_each_layer_of_a_stack_alone():
    grads = {"blocks": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)}}
    optimizer = make_optimizer("muon", 1.0, clip_norm=1e9)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    for layer in np.asarray(updates["blocks"]["kernel"]):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 2.0  # Newton-Schulz leaves them near one another


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="optimizer is 'sgd'; choose adam or muon"):
        make_optimizer("sgd", 1.0, clip_norm=1.0)
