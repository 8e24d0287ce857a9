"""Which implementation a GPU gets, with GPUs that are played."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from x2v_jax.errors import UserError
from x2v_jax.ops import self_check
from x2v_jax.ops.linear_8bit import choose, choose_hopper, hopper_rows
from x2v_jax.ops.linear_8bit.api import linear_8bit
from x2v_jax.ops.linear_8bit.quantize import quantize_rows_reference, quantize_weight


@pytest.fixture
def gpu(monkeypatch):
    def play(name, capability):
        device = types.SimpleNamespace(device_kind=name, compute_capability=capability)
        monkeypatch.setattr(choose, "cuda_device", lambda: device)
        monkeypatch.setattr(choose, "_warned", set())

    return play


def layer(implementation, dtype="int8"):
    weight, scale = quantize_weight(jnp.ones((1536, 1536)), dtype)
    x = jax.random.normal(jax.random.key(0), (128, 1536))
    return linear_8bit(x, weight, scale, implementation=implementation)


def test_a_gpu_that_is_no_hopper_refuses_it_by_name(gpu):
    gpu("NVIDIA A100", "8.0")
    said = r"linear='hopper' needs a Hopper GPU \(compute capability 9.0\); NVIDIA A100 has 8.0: set it to 'auto'"
    with pytest.raises(UserError, match=said):
        layer("hopper")
    assert not choose.wants_hopper("auto")


@pytest.mark.parametrize(
    ("capability", "dtype", "has"),
    [("8.0", "int8", True), ("7.0", "int8", False), ("8.0", "float8_e4m3fn", False), ("8.9", "float8_e4m3fn", True)],
)
def test_a_gpu_without_the_instructions_falls_back_with_one_warning_or_refuses(gpu, capability, dtype, has):
    gpu("NVIDIA GPU", capability)
    if has:
        assert choose.xla_product("xla", dtype) and choose.xla_product("auto", dtype)
        return
    with pytest.raises(UserError, match=f"linear='xla': 8-bit weights in {dtype} need .* NVIDIA GPU has {capability}"):
        layer("xla", dtype)
    with pytest.warns(RuntimeWarning, match=f"in {dtype} need compute capability .* multiplied in 16 bits instead"):
        first = layer("auto", dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (layer("auto", dtype) == first).all()
    assert (first == layer("reference", dtype)).all()


def test_a_newer_gpu_gets_xla(gpu):
    gpu("NVIDIA B200", "10.0")
    assert not choose.wants_hopper("auto") and choose.xla_product("auto", "float8_e4m3fn")


class TestProof:
    """On a Hopper, a kernel is used once it has been compared with the reference."""

    def arguments(self):
        x = quantize_rows_reference(jnp.ones((128, 1536)), "int8")
        return x, jnp.ones((1536, 1536), jnp.int8), None, None, None, None, jnp.bfloat16

    @pytest.fixture(autouse=True)
    def fresh(self, gpu):
        gpu("NVIDIA H200", "9.0")
        self_check.forget()
        yield
        self_check.forget()

    def test_a_right_kernel_is_used_and_asked_once(self, monkeypatch):
        asked = []

        def right(x, *rest, config, num_clusters):
            asked.append(config)
            return choose_hopper.matmul_8bit(x, *rest)

        monkeypatch.setattr(choose_hopper, "matmul_hopper", right)
        for _ in range(2):
            assert choose_hopper.matmul_config(*self.arguments()) is not None
        assert len(asked) == 1

    def test_a_wrong_kernel_is_not_used_and_named_once(self, monkeypatch):
        monkeypatch.setattr(
            choose_hopper, "matmul_hopper", lambda *a, config, num_clusters: 1.02 * choose_hopper.matmul_8bit(*a)
        )
        with pytest.warns(RuntimeWarning, match="8-bit linear layer by 'hopper' in precision 'int8 ") as said:
            assert choose_hopper.matmul_config(*self.arguments()) is None
        endings = [str(warning.message).partition(": using ")[2] for warning in said]
        assert endings == ["one block a cluster instead", "XLA instead"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose_hopper.matmul_config(*self.arguments()) is None

    def test_where_blocks_cannot_share_loads_each_loads_for_itself(self, monkeypatch):
        def wrong_in_clusters(*arguments, config, num_clusters):
            return config.cluster * choose_hopper.matmul_8bit(*arguments)

        monkeypatch.setattr(choose_hopper, "matmul_hopper", wrong_in_clusters)
        with pytest.warns(RuntimeWarning, match="clusters of 2.* relative error of 1, .*: using one block a cluster"):
            config = choose_hopper.matmul_config(*self.arguments())
        assert config is not None and config.cluster == 1

    def test_a_kernel_that_does_not_run_is_not_used(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("no such instruction")

        monkeypatch.setattr(hopper_rows, "quantize_rows_hopper", broken)
        with pytest.warns(
            RuntimeWarning, match="quantization of rows .* failed with RuntimeError: no such instruction"
        ):
            assert not hopper_rows.rows_hopper_works((4680, 5120), "int8")

    def test_what_the_kernel_does_not_take_is_not_asked(self, monkeypatch):
        monkeypatch.setattr(choose_hopper, "proved", lambda *a: pytest.fail("asked"))
        x, weight, *_ = self.arguments()
        residual = jnp.ones((128, 1536))
        assert choose_hopper.matmul_config(x, weight, None, None, residual, None, jnp.float32) is None
        assert choose_hopper.matmul_config(x, weight, None, None, None, residual, jnp.bfloat16) is None
        assert choose_hopper.matmul_config(x, weight[:64], None, None, None, None, jnp.bfloat16) is None
