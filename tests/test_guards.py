"""The guards of this test suite themselves: shapes, types, warnings, promotion and examples are really checked."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from x2v_jax.diffusion.image_condition import image_condition
from x2v_jax.models.causal import CausalPattern
from x2v_jax.models.rope import apply_rope, rope_tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPED = {"Bool", "Float", "Float32", "Int", "Int32", "Integer", "Key", "Num", "Shaped", "UInt8"}
# Public functions whose signature still says Any. Flax modules that are used alike without a common class, trees of
# parameters, devices and the references of kernels have no type in flax and jax; the others are to be mended.
UNTYPED = {
    "checkpoint/lora/arguments": "lora_pair",
    "checkpoint/lora/merge": "merge_into merge_into_native",
    "checkpoint/lora/write": "write_lora",
    "checkpoint/names/smoothing": "smoothing_shapes",
    "checkpoint/native/load": "load_tensors",
    "checkpoint/native/reader": "NativeCheckpoint.load",
    "checkpoint/quantize/eight_bit": "quantization_of",
    "config/lightx2v": "read_json translate",
    "diffusion/image_condition": "image_condition pin_first_frame",
    "diffusion/rollout": "Rollout.__init__",
    "generate/programs": "identity",
    "generate/components": "Components.network",
    "generate/network": "Network.jit Network.of",
    "generate/tokenizer": "Tokenizer.__init__",
    "models/functional": "flatten merge",
    "models/host_blocks": "with_blocks_on_host",
    "models/layers": "linear stacked",
    "models/networks": "abstract_network make_network",
    "models/vae_blocks": "AttentionBlock.__call__ Conv2d.__call__ run_chain",
    "models/wan_blocks": "Block.__init__ Block.with_cache CrossAttention.__init__ Mlp.__init__ SelfAttention.__init__ "
    "SelfAttention.queries_keys_values SelfAttention.with_cache",
    "ops/attention/api": "attention",
    "ops/attention/hopper_products": "repack repack_registers",
    "ops/attention/reference": "attention_reference",
    "ops/devices": "compute_capability cuda_device named",
    "ops/fused_norms/api": "rmsnorm_rope",
    "ops/linear_8bit/quantize": "quantize_weight",
}


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
    assert sum(_anys(ast.parse(path.read_text())) for path in (ROOT / "x2v_jax").rglob("*.py")) <= 268


@pytest.mark.parametrize("folder", ["request", "memory", "media", "checkpoint/files"])
def test_a_folder_of_strict_types_never_says_any(folder: str):
    files = sorted((ROOT / "x2v_jax" / folder).rglob("*.py"))
    assert files and not [path.name for path in files if _anys(ast.parse(path.read_text()))]
    strict = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["strict"]
    assert f"x2v_jax/{folder}" in strict


def test_no_public_signature_says_any_but_those_that_are_listed():
    """A new one fails, and so does a line of the list that is mended: the list can only become shorter."""
    found = {
        f"{path.relative_to(ROOT / 'x2v_jax').with_suffix('').as_posix()}:{name}"
        for path in (ROOT / "x2v_jax").rglob("*.py")
        if not path.stem.startswith("_") or path.stem.startswith("__")
        for name in _public_anys(ast.parse(path.read_text()))
    }
    listed = {f"{module}:{name}" for module, names in UNTYPED.items() for name in names.split()}
    assert found == listed


def test_the_search_for_any_in_signatures_finds_it():
    source = """
Tree = Any
def f(x: Any): ...
def g() -> "dict[str, Any]": ...
def h(*, x: Tree): ...
def _hidden(x: Any): ...
def good(x: object) -> "Sequence[int]": ...
class A:
    def __call__(self, **x: Any): ...
    def _hidden(self, x: Any): ...
class _B:
    def method(self, x: Any): ...
"""
    assert _public_anys(ast.parse(source)) == ["f", "g", "h", "A.__call__"]


def _any_names(module: ast.Module) -> set[str]:
    names = {"Any"}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in names:
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _anys(module: ast.Module) -> int:
    names = _any_names(module)
    return sum(isinstance(node, ast.Name) and node.id in names for node in ast.walk(module))


def _public_anys(module: ast.Module) -> list[str]:
    """Functions, and methods of classes, that others may call and whose arguments or result are annotated with Any."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [("", node) for node in module.body] + [(f"{owner.name}.", x) for owner in classes for x in owner.body]
    return [
        prefix + node.name
        for prefix, node in functions
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (not node.name.startswith("_") or node.name.endswith("__"))
        and any(_said(hint) & _any_names(module) for hint in _hints(node))
    ]


def _hints(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    own = function.args
    arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
    return [hint for hint in (*(argument.annotation for argument in arguments), function.returns) if hint]


def _said(hint: ast.expr) -> set[str]:
    """The names in an annotation, also where it is written as a string."""
    texts = [x.value for x in ast.walk(hint) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return _names(hint) | {word for text in texts for word in re.findall(r"\w+", text)}
