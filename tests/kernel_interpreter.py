"""Pallas' interpreter for Mosaic GPU kernels, with what it lacks in jax 0.11: for tests only.

The interpreter plays threads, shared memory, barriers and asynchronous copies on a CPU and detects races. Taught here:
accumulators that live through `pl.run_state`, `accumulator[...] = value`, a wgmma whose first operand is in registers,
and the one piece of code below Pallas that our kernels have, `hopper_products.repack_registers`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret, shared_memory
from jax._src.state import discharge, types
from jax.experimental.pallas import mosaic_gpu as plgpu

_plain = jaxpr_interpret.JaxprInterpreter.interpret


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Kernels that are traced inside run in the interpreter; raises AssertionError where threads raced."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield
    assert not detect_races or not interpret_pallas_call.get_races().races_found


@pytest.fixture
def kernel_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`interpreted` for a whole test."""
    teach(monkeypatch)
    with interpreted():
        yield


def teach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxpr_interpret.JaxprInterpreter, "interpret", _interpret)


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    """The program that a CUDA device would be given, of a function of arrays or their shapes; no device is needed."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def _interpret(self: Any, jaxpr: Any, token: Any, *arguments: Any) -> Any:
    if not any(_is_new(equation) for equation in jaxpr.eqns):
        return _plain(self, jaxpr, token, *arguments)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, jax_core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        new = _is_new(equation)
        if new is None:
            inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, jax_core.Literal)))
            outputs = [v for v in equation.outvars if not isinstance(v, jax_core.DropVar)]
            alone = jaxpr.replace(
                constvars=[], invars=inputs, outvars=outputs, eqns=[equation], effects=equation.effects,
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )  # fmt: skip
            token, results = _plain(self, alone, token, *(values[v] for v in inputs))
        else:
            outputs = equation.outvars
            token, results = new(self, equation, token, [read(v) for v in equation.invars])
        values.update((v, x) for v, x in zip(outputs, results, strict=True) if not isinstance(v, jax_core.DropVar))
    return token, [read(v) for v in jaxpr.outvars]


def _is_new(equation: Any) -> Any:
    """What computes an equation that the interpreter cannot; None where it can."""
    if equation.primitive is discharge.run_state_p:
        return _run_state
    if equation.primitive is primitives.wgmma_accumulator_store_p:
        return _store_accumulator
    if equation.primitive is primitives.wgmma_ref_p and not _is_ref(equation.invars[1]):
        return _product_from_registers
    if equation.primitive is primitives.inline_mgpu_p and equation.params["mgpu_fn"].__name__ == "repack_registers":
        return _repack
    return None


def _is_ref(variable: Any) -> bool:
    return isinstance(variable.aval, types.AbstractRef)


def _run_state(self: Any, equation: Any, token: Any, arguments: list) -> Any:
    keys, own = [], []
    for variable, value in zip(equation.invars, arguments, strict=True):
        if not _is_ref(variable):
            token, value = _allocate(self, equation, token, value)
            own.append(value)
        keys.append(value)
    token, _ = self.interpret(equation.params["jaxpr"], token, *keys)
    results = list(arguments)
    for i, (variable, key) in enumerate(zip(equation.invars, keys, strict=True)):
        if not _is_ref(variable):
            token, results[i] = gpu_callbacks.call_get(
                token=token, result_shape_and_dtype=variable.aval, mesh_location=self.mesh_location,
                thread=self.thread, allocation_key_as_array=key, transforms=(), source_info=equation.source_info,
            )  # fmt: skip
    for key in own:
        token = _free(self, equation, token, key)
    return token, results


def _store_accumulator(self: Any, equation: Any, token: Any, arguments: list) -> Any:
    key, value = arguments
    token, old = gpu_callbacks.call_swap(
        token=token, result_shape_and_dtype=equation.invars[1].aval, mesh_location=self.mesh_location,
        thread=self.thread, allocation_key_as_array=key, transforms=(), val=value, mask=None,
        source_info=equation.source_info,
    )  # fmt: skip
    return token, [old]


def _product_from_registers(self: Any, equation: Any, token: Any, arguments: list) -> Any:
    token, key = _allocate(self, equation, token, arguments[1])
    with_key = [arguments[0], key, *arguments[2:]]
    token, results = self._interpret_wgmma_ref_p(equation, token, lambda: with_key)
    return _free(self, equation, token, key), results


def _repack(self: Any, equation: Any, token: Any, arguments: list) -> Any:
    """What the registers' new places mean, by the layouts: column 2t + 8h + i of every 16 becomes 4t + 2h + i."""
    rows, columns = arguments[0].shape
    halves = jnp.reshape(arguments[0], (rows, columns // 16, 2, 4, 2))
    return token, [halves.transpose(0, 1, 3, 2, 4).reshape(rows, columns)]


def _allocate(self: Any, equation: Any, token: Any, value: Any) -> Any:
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token, compute_unit=self.thread, initial_ref_count=1,
        memory_space_id=shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
    )  # fmt: skip
    return gpu_callbacks.call_allocate_buffer(
        token=token, mesh_location=self.mesh_location, thread=self.thread, allocation_request_as_array=request,
        value=value, source_info=equation.source_info,
    )  # fmt: skip


def _free(self: Any, equation: Any, token: Any, key: Any) -> Any:
    return gpu_callbacks.call_deallocate_buffer(
        token=token, mesh_location=self.mesh_location, thread=self.thread, allocation_key_as_array=key,
        source_info=equation.source_info,
    )  # fmt: skip
