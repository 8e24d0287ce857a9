"""Who computes an 8-bit layer: what this device, dtype and shape have, and what proved itself here."""

import warnings
from collections.abc import Callable
from typing import get_args

import jax
from jax.typing import DTypeLike

from x2v_jax.errors import UserError
from x2v_jax.ops.choice import LinearImplementation
from x2v_jax.ops.devices import compute_capability, cuda_device, is_hopper, named
from x2v_jax.ops.linear_8bit.quantize import name_of
from x2v_jax.ops.self_check import FastPath, relative_error, works

Implementation = LinearImplementation

# The first compute capability whose tensor cores multiply the dtype.
_FIRST_WITH = {"int8": (7, 5), "float8_e4m3fn": (8, 9)}
_warned: set[str] = set()


def check_implementation(implementation: str) -> None:
    if implementation not in get_args(Implementation):
        raise UserError(f"linear is {implementation!r}; it must be one of {', '.join(get_args(Implementation))}")


def wants_hopper(implementation: Implementation) -> bool:
    """Whether a Hopper kernel may be used at all.

    In a process that has no NVIDIA GPU, a program for CUDA is for a GPU elsewhere, which is taken to be a Hopper.

    Raises:
        UserError: "hopper" was asked for by name, and this process' GPU is another.
    """
    device = cuda_device()
    if implementation not in ("auto", "hopper") or device is None or is_hopper(device):
        return implementation in ("auto", "hopper")
    if implementation == "auto":
        return False
    raise UserError(f"linear='hopper' needs a Hopper GPU (compute capability 9.0); {named(device)}: set it to 'auto'")


def xla_product(implementation: Implementation, dtype: DTypeLike) -> bool:
    """Whether XLA is given the 8-bit product on CUDA, rather than the reference's.

    Raises:
        UserError: "xla" was asked for by name, and this process' GPU has no instructions for the dtype.
    """
    name, device = name_of(dtype), cuda_device()
    if implementation == "reference":
        return False
    if device is None or compute_capability(device) >= _FIRST_WITH[name]:
        return True
    needs = ".".join(map(str, _FIRST_WITH[name]))
    lack = f"8-bit weights in {name} need compute capability {needs} to be multiplied in 8 bits; {named(device)}"
    if implementation == "xla":
        raise UserError(f"linear='xla': {lack}: set linear to 'auto', or linear_activations to '16bit'")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{lack}: multiplied in 16 bits instead, as exact but slower", RuntimeWarning, stacklevel=4)
    return False


def proved(
    op: str,
    precision: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    allowed: float,
    instead: str = "XLA",
) -> bool:
    """Whether a kernel may be used: on this process' GPU, `ours()` has been found to be near `reference()`.

    Both give trees of arrays that are made inside; the largest relative error of a leaf counts. instead: what is used
    where it fails.
    """
    if cuda_device() is None:
        return True

    def error() -> float:
        pairs = zip(jax.tree.leaves(jax.jit(ours)()), jax.tree.leaves(jax.jit(reference)()), strict=True)
        return max(float(relative_error(x, y)) for x, y in pairs)

    return works(FastPath(op, "hopper", precision, instead, "linear to 'xla'"), error, allowed)
