"""A fast path is believed once it was compared, and left, with one warning, where it is wrong."""

import dataclasses
import time
import warnings

import jax
import jax.numpy as jnp
import pytest

from x2v_jax.ops import self_check
from x2v_jax.ops.self_check import FastPath, works

PATH = FastPath("double", "clever", "int8", instead="the plain one")


@pytest.fixture(autouse=True)
def _forget():
    self_check.forget()
    yield
    self_check.forget()


def comparison(factor: float, calls: list):
    def error() -> float:
        x = jax.random.normal(jax.random.key(0), (8,))
        calls.append(type(x).__name__)
        return float(jax.jit(lambda x: jnp.linalg.norm(factor * x - 2 * x) / jnp.linalg.norm(2 * x))(x))

    return error


def test_a_right_path_is_compared_once_and_taken():
    calls: list = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(works(PATH, comparison(2.0, calls), 0.01) for _ in range(3))
    assert len(calls) == 1


def test_a_wrong_path_warns_once_with_what_was_measured():
    calls: list = []
    with pytest.warns(RuntimeWarning) as warned:
        assert not any(works(PATH, comparison(2.5, calls), 0.01) for _ in range(3))
    assert len(warned) == 1 and len(calls) == 1
    for word in ("double", "'clever'", "'int8'", "0.25", "0.01", "the plain one"):
        assert word in str(warned[0].message)


def test_a_comparison_that_does_not_end_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_check, "_PATIENCE", 0.01)
    path = dataclasses.replace(PATH, way_out="doubling to 'plain'")
    with pytest.warns(RuntimeWarning, match="double by 'clever'.*after 0.01 s; should it .* set doubling to 'plain'"):
        assert works(path, lambda: time.sleep(0.1) or 0.0, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_wrong(value: float):
    with pytest.warns(RuntimeWarning, match="relative error"):
        assert not works(PATH, lambda: value, 0.01)


def test_an_exception_is_a_failure_and_named():
    def error() -> float:
        raise RuntimeError("too much shared memory\nand much more")

    with pytest.warns(RuntimeWarning, match="RuntimeError: too much shared memory,"):
        assert not works(PATH, error, 0.01)


def test_precisions_and_implementations_are_judged_apart():
    assert works(PATH, lambda: 0.0, 0.01)
    with pytest.warns(RuntimeWarning):
        assert not works(FastPath("double", "clever", "e4m3"), lambda: 1.0, 0.01)
    assert works(PATH, lambda: 1.0, 0.01)


def test_it_may_be_asked_while_a_program_is_traced():
    seen: list = []

    def double(x: jax.Array) -> jax.Array:
        good = works(PATH, comparison(2.0, seen), 0.01)
        return 2 * x if good else x

    def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + double(x), double(x)

    total, each = jax.jit(jax.grad(lambda x: jax.lax.scan(body, x[0], x)[0].sum(), has_aux=False))(jnp.ones(3)), seen
    assert total.tolist() == [3.0, 2.0, 2.0]
    # What it made there was an array, not a part of the program.
    assert each == ["ArrayImpl"]


def test_it_may_be_asked_inside_a_mesh():
    def double(x: jax.Array) -> jax.Array:
        return 2 * x if works(PATH, comparison(2.0, []), 0.01) else x

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(double, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    assert jax.jit(sharded)(jnp.ones(4)).tolist() == [2.0] * 4
