"""Modules as pure functions: a graph definition and a plain nested dict of arrays.

Flax NNX defines the networks; everything that runs them (jit, grad, shard_map, checkpoints) sees `(graphdef, params)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Takes a module apart: its static structure, and its parameters as a nested dict of arrays."""
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, _plain(nnx.to_pure_dict(state))


def abstract(make_module: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """Like `split`, without allocating: the leaves are `jax.ShapeDtypeStruct`."""
    return split(nnx.eval_shape(make_module))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The inverse of `split`: a module that holds `params`."""
    return nnx.merge(graphdef, nnx.State(_with_int_keys(params)))


def flatten(params: Mapping[str, object]) -> dict[str, Any]:
    """{"blocks": {"ffn": {"kernel": a}}} -> {"blocks.ffn.kernel": a}, in sorted order of names."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: object):
        if isinstance(node, Mapping):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = node

    visit("", params)
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, object]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def parameter_count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _plain(tree: object) -> Any:
    return {str(k): _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _with_int_keys(tree: object) -> Any:
    # nnx.List children carry integer keys; file formats only know strings.
    if not isinstance(tree, Mapping):
        return tree
    return {int(k) if k.isdecimal() else k: _with_int_keys(v) for k, v in tree.items()}
