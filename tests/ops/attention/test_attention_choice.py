"""Who computes attention: by platform, device, precision and shape."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreter import lower_for_cuda

from x2v_jax.errors import UserError
from x2v_jax.ops import self_check
from x2v_jax.ops.attention import Span, api, attention, attention_by_spans, choose_hopper
from x2v_jax.ops.attention.hopper_config import PRECISIONS, HopperConfig, config_for, shape_class
from x2v_jax.ops.attention.hopper_table import ENTRIES

EIGHT_BIT = ("int8", "e4m3", "int8_e4m3", "e4m3_all")


def qkv(d: int = 128, dtype=jnp.bfloat16, queries: int = 16, keys: int = 40):
    return [jax.random.normal(jax.random.key(i), (1, n, 2, d), dtype) for i, n in enumerate((queries, keys, keys))]


def same(x, y, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0, atol=atol)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes this process believe that it has a GPU of a compute capability."""
    self_check.forget()

    def believe(capability: str, error: float | dict[str, float] = 0.0) -> None:
        device = types.SimpleNamespace(compute_capability=capability, device_kind=f"GPU of {capability}")
        for module in (choose_hopper, api):
            monkeypatch.setattr(module, "cuda_device", lambda: device)
        errors = error if isinstance(error, dict) else {"registers": error, "shared": error}
        monkeypatch.setattr(
            choose_hopper, "_comparison", lambda precision, config: lambda: errors[config.probabilities]
        )

    yield believe
    self_check.forget()


@pytest.mark.slow
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_a_program_for_cuda_has_the_kernel_and_one_for_cpu_the_simulation(precision: str):
    arrays = qkv()
    assert "mosaic_gpu_v2" in lower_for_cuda(lambda *x: attention(*x, precision=precision), *arrays)
    here = jax.jit(lambda *x: attention(*x, precision=precision))
    assert "mosaic_gpu_v2" not in here.lower(*arrays).as_text()
    simulated = attention(*arrays, precision=precision, implementation="reference")
    same(here(*arrays), simulated, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, jnp.bfloat16), (12, jnp.bfloat16), (256, jnp.float16), (128, jnp.float32)]
)
@pytest.mark.parametrize("implementation", ["auto", "hopper"])
def test_shapes_that_the_kernel_does_not_take_get_the_reference(d: int, dtype, implementation: str):
    arrays = qkv(d, dtype)
    for precision in PRECISIONS:
        attend = lambda *x, p=precision: attention(*x, precision=p, implementation=implementation)  # noqa: E731
        assert "mosaic_gpu_v2" not in lower_for_cuda(attend, *arrays)
        assert attend(*arrays).dtype == dtype


def test_in_full_precision_the_kernel_is_there_for_who_asks():
    arrays = qkv()
    assert "mosaic_gpu_v2" in lower_for_cuda(lambda *x: attention(*x, implementation="hopper"), *arrays)
    assert "mosaic_gpu_v2" not in lower_for_cuda(lambda *x: attention(*x), *arrays)
    plain = attention(*arrays, implementation="reference")
    np.testing.assert_array_equal(
        *(np.asarray(x, np.float32) for x in (attention(*arrays, implementation="hopper"), plain))
    )


def test_gradients_lower_for_cuda_too():
    arrays = qkv()
    for precision in ("full", "e4m3_all"):
        loss = lambda *x, p=precision: attention(*x, precision=p, implementation="hopper").sum()  # noqa: E731
        assert "mosaic_gpu_v2" in lower_for_cuda(jax.value_and_grad(loss, argnums=(0, 1, 2)), *arrays)


@pytest.mark.parametrize("precision", ["full", *EIGHT_BIT])
def test_another_gpu_is_refused_by_name(gpu, precision: str):
    gpu("8.0")
    with pytest.raises(UserError, match=r"needs a Hopper GPU.*GPU of 8\.0 has 8\.0.*set "):
        attention(*qkv(), precision=precision, implementation="hopper")
    gpu("10.0")
    with pytest.raises(UserError, match="Hopper"):
        attention(*qkv(), precision="int8")


def test_another_gpu_simulates_if_asked(gpu):
    gpu("8.0")
    assert attention(*qkv(), precision="int8", implementation="reference").shape == (1, 16, 2, 128)


@pytest.mark.parametrize("precision", ["int8", "e4m3"])
def test_a_kernel_that_fails_its_check_is_not_used(gpu, monkeypatch: pytest.MonkeyPatch, precision: str):
    gpu("9.0", error=0.5)
    monkeypatch.setattr(api, "takes_cudnn", lambda q: False)
    arrays = qkv()
    with pytest.warns(RuntimeWarning, match="attention in full precision") as warned:
        for _ in range(2):
            program = lower_for_cuda(lambda *x: attention(*x, precision=precision), *arrays)
            assert "mosaic_gpu_v2" not in program
    assert len(warned) == 1
    same(attention(*arrays, precision=precision), attention(*arrays, implementation="reference"))


def test_probabilities_take_the_other_way_where_registers_fail(gpu):
    gpu("9.0", error={"registers": 0.5, "shared": 0.001})
    with pytest.warns(RuntimeWarning, match="through shared memory") as warned:
        config = choose_hopper.hopper_config("e4m3_all", 9000, 9000)
    assert config is not None and config.probabilities == "shared" and config.fits("e4m3_all") and len(warned) == 1


def test_a_measured_entry_makes_auto_choose_the_kernel(gpu, monkeypatch: pytest.MonkeyPatch):
    gpu("9.0")
    monkeypatch.setattr(api, "takes_cudnn", lambda q: False)
    arrays = qkv()
    assert "mosaic_gpu_v2" not in lower_for_cuda(attention, *arrays)
    monkeypatch.setitem(ENTRIES, "full/cross", ENTRIES["full/cross"] | {"measured": True, "faster_than_cudnn": True})
    assert "mosaic_gpu_v2" in lower_for_cuda(lambda *x: attention(*x), *arrays)


def test_a_log_sum_exp_comes_from_the_kernel_on_a_hopper(gpu):
    gpu("9.0")
    assert "mosaic_gpu_v2" in lower_for_cuda(lambda *x: attention(*x, with_log_sum_exp=True), *qkv())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"implementation": "fast"}, "attention is 'fast'; it must be one of auto, reference, cudnn, hopper"),
        ({"precision": "int4"}, "attention_precision is 'int4'"),
        ({"implementation": "cudnn", "precision": "int8"}, "has no attention_precision='int8'"),
        ({"implementation": "cudnn", "with_log_sum_exp": True}, "rounds the log-sum-exp"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, said: str):
    with pytest.raises(UserError, match=said):
        attention(*qkv(), **arguments)


@pytest.mark.slow
def test_a_clip_in_8_bits_is_one_kernel_on_cuda_and_one_quantization_on_cpu():
    q, k, v = qkv(queries=72, keys=72)
    spans = [Span(0, 24, 0, 24), Span(24, 48, 8, 48), Span(48, 72, 24, 72, 8)]
    program = lower_for_cuda(lambda *x: attention_by_spans(*x, spans, precision="int8"), q, k, v)
    assert program.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    full = attention_by_spans(q, k, v, spans)
    ours = attention_by_spans(q, k, v, spans, precision="int8")
    assert np.linalg.norm(np.float32(ours - full)) / np.linalg.norm(np.float32(full)) < 0.02
    asked = attention_by_spans(q, k, v, spans, implementation="hopper")
    same(asked, full)

    def gradient(**arguments):
        return jax.grad(lambda q: attention_by_spans(q, k, v, spans, **arguments).astype(jnp.float32).sum())(q)

    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (gradient(precision="int8"), gradient())), atol=1e-3
    )


def test_every_precision_and_shape_class_has_a_configuration_that_fits():
    classes = {(32_760, 32_760): "long", (4_680, 32_760): "chunk", (32_760, 512): "cross", (32_760, 257): "cross"}
    for (queries, keys), name in classes.items():
        assert shape_class(queries, keys) == name
        for precision in PRECISIONS:
            assert config_for(precision, queries, keys).fits(precision)
    assert set(ENTRIES) == {f"{p}/{c}" for p in PRECISIONS for c in ("long", "chunk", "cross")}
    assert not HopperConfig(stages=4).fits("full")


@pytest.mark.parametrize("fields", [{"block_kv": 96}, {"warpgroups": 4}, {"stages": 1}])
def test_a_configuration_that_cannot_be_is_refused(fields: dict):
    with pytest.raises(ValueError, match=next(iter(fields))):
        HopperConfig(**fields)
