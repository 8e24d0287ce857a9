import subprocess
import sys

import numpy as np
import pytest

from x2v_jax.diffusion.schedules import step_sigmas, unipc_schedule
from x2v_jax.errors import UserError

CAUSVID = (999, 934, 862, 756, 603, 410, 250, 140, 74)


def test_published_step_list_at_shift_5():
    sigmas = step_sigmas((1000, 750, 500, 250), 5.0)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, [1.0, 0.9375, 0.8333333, 0.625], rtol=1e-7)
    np.testing.assert_allclose(1000 * sigmas, [1000, 937.5, 833.3333, 625], rtol=1e-7)


def test_causvid_list_is_not_warped_twice():
    sigmas = step_sigmas(CAUSVID, 8.0, warp=False)
    np.testing.assert_allclose(1000 * sigmas, CAUSVID, rtol=1e-7)
    np.testing.assert_array_equal(sigmas, step_sigmas(CAUSVID, 1.0))
    # What warping a second time would do: stop denoising at 0.39.
    assert step_sigmas(CAUSVID, 8.0)[-1] == pytest.approx(0.389987, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((), "is empty"),
        ((1000, 0), "holds 0"),
        ((1010, 500), "holds 1010"),
        ((1000, -250), "holds -250"),
        ((1000, float("nan")), "holds nan"),
        ((1000, "750"), "holds '750'"),
        ((True,), "holds True"),
        ((1000, 500, 500), "500 after 500"),
        ((250, 500), "500 after 250"),
        ("1000", "'1000'"),
        (4, "is 4"),
        (None, "is None"),
        ((1000, 999.99999999), "same noise level"),
    ],
)
def test_bad_step_list_is_named(value, named):
    with pytest.raises(UserError, match="denoising_step_list.*" + named):
        step_sigmas(value, 5.0)


@pytest.mark.parametrize("shift", [0, -3.0, float("inf"), float("nan"), 10**400, "5", None, True])
def test_bad_shift_is_named(shift):
    for make in (lambda: step_sigmas((1000, 500), shift), lambda: unipc_schedule(4, shift)):
        with pytest.raises(UserError, match=f"shift is {shift!r}"):
            make()


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.0, "50", None, True])
def test_bad_step_count_is_named(num_steps):
    with pytest.raises(UserError, match=f"num_inference_steps is {num_steps!r}"):
        unipc_schedule(num_steps, 5.0)


@pytest.mark.parametrize(("shift", "reason"), [(1e5, "no signal at the first step"), (1e9, "same noise level")])
def test_a_shift_that_float32_cannot_follow_is_refused(shift, reason):
    with pytest.raises(UserError, match=f"shift is 1.*{reason}"):
        unipc_schedule(4, shift)


@pytest.mark.parametrize(
    ("num_steps", "shift", "first", "last"),
    [
        (50, 8, [999, 997, 994, 991, 989, 986], [409, 337, 249, 140]),
        (50, 5, [999], [302, 241, 172, 92]),
        (40, 5, [999, 994, 989, 983, 978, 972], [356, 288, 208, 113]),
        (40, 3, [999, 991, 982, 973], [249, 195, 136, 71]),
        (5, 5, [999, 952, 882, 768, 555], []),
        (3, 8, [999, 941, 799], []),
    ],
)
def test_published_unipc_timesteps(num_steps, shift, first, last):
    sigmas, timesteps = unipc_schedule(num_steps, shift)
    assert sigmas.dtype == timesteps.dtype == np.float32
    assert sigmas.shape == (num_steps + 1,) and sigmas[-1] == 0
    np.testing.assert_array_equal(timesteps[: len(first)], first)
    np.testing.assert_array_equal(timesteps[num_steps - len(last) :], last)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_any_permitted_step_count_falls_to_zero(num_steps):
    sigmas, timesteps = unipc_schedule(num_steps, 5.0)
    assert (np.diff(sigmas) < 0).all() and len(timesteps) == num_steps


def test_bad_values_are_named_without_importing_jax():
    code = (
        "import sys, x2v_jax.diffusion.schedules as s\n"
        "try: s.step_sigmas((0,))\n"
        "except ValueError as e: print(e)\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("denoising_step_list holds 0") and done.stdout.endswith("False\n")
