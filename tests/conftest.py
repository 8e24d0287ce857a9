"""Shared test set-up: CPU only, one compilation cache for all workers, run-time shape checks on the library."""

import os
import pathlib
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the user's own cache folder, where nobody else can put programs for this process to run.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "x2v_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of the tests' time is compilation, of programs that run once: LLVM works less on them. `XLA_FLAGS= pytest` tests
# what users run, and .ci/long does so.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import hypothesis  # noqa: E402
import jax  # noqa: E402 - it reads the environment when it is imported
import jaxtyping  # noqa: E402
import type_checks  # noqa: E402

type_checks.install()
# How long an example takes depends on what the machine does beside it.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Test modules whose arrays may broadcast to another rank, and why.
RANK_PROMOTION_ALLOWED = {
    "test_reference": "the stand-ins for networks in the recorded cases add vectors of channels to latents",
    "test_linear_8bit": "the layers that it compares with are written as NumPy would write them",
}
# Rooms of tests in which neither promotion, warnings nor types are refused yet, and why.
GUARDS_OFF = {
    "train": "the trainers' own arithmetic has not been gone through",
    "test_old_files.py": "it resumes a training run, and Optax raises a float to an int32 step",
    "benchmarks": "measuring programs do not ship, and have not been gone through",
}


# Strict from the start and not test by test: programs are kept by these settings, and fixtures compile some too.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No array changes its dtype or its rank because another one has a different one, but where the tables allow it."""
    is_allowed = any(f"/tests/{room}" in request.path.as_posix() for room in GUARDS_OFF)
    if is_allowed:
        jax.config.update("jax_numpy_dtype_promotion", "standard")
        jaxtyping.config.update("jaxtyping_disable", True)
    if is_allowed or request.path.stem in RANK_PROMOTION_ALLOWED:
        jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(f"/tests/{room}" in item.path.as_posix() for room in GUARDS_OFF):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """For a test of what the library itself says to arguments that its annotations forbid."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files instead of comparing")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")
