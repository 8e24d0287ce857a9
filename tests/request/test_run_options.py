"""Options are checked before anything is loaded, and against what the device can run."""

import warnings
from typing import Any

import jax.numpy as jnp
import pytest

from x2v_jax.errors import UserError
from x2v_jax.ops.choice import OpChoice
from x2v_jax.ops.devices import Device, first_device, supported
from x2v_jax.request.options import RunOptions, problems

CPU, HOPPER, ADA, AMPERE = (
    Device("cpu"),
    Device("NVIDIA H200", (9, 0)),
    Device("RTX 4090", (8, 9)),
    Device("A100", (8, 0)),
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; give bfloat16 or float32"),
        ({"dtype": "float16", "vae_dtype": "half"}, "vae_dtype is 'half'"),
        ({"vae_decode": "fast"}, "vae_decode is 'fast'; give one of auto, whole, stream, tiled"),
        ({"denoising_loop": "while"}, "denoising_loop is 'while'; give one of steps, unrolled, scan"),
        ({"offload": "all"}, "offload is 'all'; give none or blocks"),
        ({"attention": "flash"}, "attention is 'flash'; give one of auto, reference, cudnn, hopper"),
        ({"attention_precision": "fp8"}, "attention_precision is 'fp8'"),
        ({"linear": "cublas"}, "linear is 'cublas'"),
        ({"linear_activations": 8}, "linear_activations is 8; give 8bit or 16bit"),
        ({"memory_limit": 0}, "memory_limit is 0; give the GB"),
        ({"memory_limit": True}, "memory_limit is True"),
        ({"memory_limit": float("nan")}, "memory_limit is nan"),
        ({"attention": "cudnn", "attention_precision": "int8"}, "which attention 'cudnn' does not have"),
        ({"atention": "auto"}, "unknown option 'atention'; did you mean attention?"),
        ({"quite_another": 1}, "unknown option 'quite_another'; known are dtype"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], expected: str):
    with pytest.raises(UserError) as error:
        RunOptions.of(values)
    assert expected in str(error.value)


def test_options_name_types_and_choose_operations():
    options = RunOptions.of(
        {"dtype": jnp.bfloat16, "vae_dtype": jnp.dtype("float32"), "linear": "xla", "memory_limit": 24}
    )
    assert (options.dtype, options.vae_dtype) == ("bfloat16", "float32") and options.ops == OpChoice(linear="xla")
    assert options.memory_limit_bytes == 24_000_000_000 and RunOptions().memory_limit_bytes is None
    assert problems({name: getattr(options, name) for name in RunOptions.names()}) == []


@pytest.mark.parametrize(
    ("ops", "device", "expected"),
    [
        (OpChoice(attention="hopper"), CPU, "attention is 'hopper', whose kernels need .* this device is cpu; set"),
        (
            OpChoice(attention="hopper"),
            ADA,
            "this device is RTX 4090 of compute capability 8.9; set attention to 'auto'",
        ),
        (OpChoice(linear="hopper"), AMPERE, "linear is 'hopper'"),
        (OpChoice(attention="cudnn"), CPU, "attention is 'cudnn', which needs an NVIDIA GPU"),
    ],
)
def test_an_implementation_that_the_device_lacks_is_refused_by_name(ops: OpChoice, device: Device, expected: str):
    with pytest.raises(UserError, match=expected):
        supported(ops, (), device)


def test_what_runs_is_left_alone():
    for ops in (OpChoice(), OpChoice("hopper", "int8", "hopper")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert supported(ops, ("float8_e4m3fn",), HOPPER) == ops
    assert first_device().capability is None  # of this processor


def test_slow_ways_are_taken_with_a_warning():
    eight_bit = OpChoice(attention_precision="int8")
    with pytest.warns(UserWarning, match="attention_precision is 'int8', which only Hopper GPUs compute.*imitated"):
        assert supported(eight_bit, (), CPU) == eight_bit
    with pytest.warns(UserWarning, match="attention_precision is 'int8'.*RTX 4090 of compute.*'full' is used"):
        assert supported(eight_bit, (), ADA) == OpChoice()
    with pytest.warns(UserWarning, match="linear_activations is '16bit', .* this one has none"):
        assert supported(OpChoice(linear_activations="16bit"), (), CPU) == OpChoice(linear_activations="16bit")
    with pytest.warns(UserWarning, match="float8_e4m3fn.*A100.*16bit"):
        assert supported(OpChoice(), ("float8_e4m3fn",), AMPERE).linear_activations == "16bit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert supported(OpChoice("reference", "e4m3"), (), ADA) == OpChoice("reference", "e4m3")
        for kinds, device in ((("float8_e4m3fn",), ADA), (("int8",), AMPERE), (("float8_e4m3fn",), CPU)):
            assert supported(OpChoice(), kinds, device) == OpChoice()
