"""The guards of this test suite themselves: shapes, types, warnings, promotion and examples are really checked."""

import ast
import pathlib
import subprocess
import sys
import warnings

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from x2v_jax.diffusion.image_condition import image_condition
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.rope import apply_rope, rope_tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPED = {"Bool", "Float", "Float32", "Int", "Int32", "Integer", "Key", "Num", "Shaped", "UInt8"}


def test_a_wrong_shape_given_to_the_library_is_refused():
    tables = rope_tables((1, 2, 2), 12)
    assert apply_rope(jnp.zeros((1, 4, 2, 12)), tables).shape == (1, 4, 2, 12)
    with pytest.raises(TypeCheckError, match="apply_rope"):
        apply_rope(jnp.zeros((4, 2, 12)), tables)


def test_a_wrong_dtype_given_to_the_library_is_refused():
    with pytest.raises(TypeCheckError, match="image_condition"):
        image_condition(jnp.zeros((2, 4, 4, 16), jnp.int32))


def test_a_wrong_type_in_a_field_is_refused():
    with pytest.raises(TypeCheckError, match="independent_first_frame"):
        CausalPattern(3, independent_first_frame="no")  # type: ignore[arg-type]


def test_a_wrong_shape_that_the_library_gives_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("x2v_jax.models.rope.rotate", lambda x, cos, sin: x[0])
    with pytest.raises(TypeCheckError, match="return value"):
        apply_rope(jnp.zeros((1, 4, 2, 12)), rope_tables((1, 2, 2), 12))


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="like this"):
        warnings.warn("like this", stacklevel=1)


def test_dtypes_do_not_promote_each_other():
    with pytest.raises(ValueError, match="no available implicit dtype promotion"):
        jnp.zeros(3, jnp.float32) * jnp.zeros(3, jnp.int32)


def test_ranks_do_not_promote_each_other():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)


def test_the_library_runs_without_the_type_checker():
    command = "import sys, x2v_jax.pipeline; assert 'beartype' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_no_fewer_arguments_carry_shapes():
    assert sum(_shaped_arguments(ast.parse(path.read_text())) for path in (ROOT / "x2v_jax").rglob("*.py")) >= 259


def _shaped_arguments(module: ast.Module) -> int:
    """How many arguments of a module's functions say a shape, themselves or through an alias of the module."""
    names = set(SHAPED)
    for node in module.body:
        if isinstance(node, ast.Assign) and _names(node.value) & names:
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    arguments = [node for node in ast.walk(module) if isinstance(node, ast.arg) and node.annotation]
    return sum(bool(_names(argument.annotation) & names) for argument in arguments)


def _names(node: ast.expr | None) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} if node else set()


def test_any_is_said_rarely():
    """Aliases of Any count as Any: they would be the way around this."""
    assert sum(_anys(ast.parse(path.read_text())) for path in (ROOT / "x2v_jax").rglob("*.py")) <= 328


def _anys(module: ast.Module) -> int:
    names = {"Any"}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in names:
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return sum(isinstance(node, ast.Name) and node.id in names for node in ast.walk(module))
