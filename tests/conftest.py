"""Shared test set-up: CPU only, one compilation cache for all workers, run-time shape checks on the library."""

import os
import pathlib
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"x2v_jax_test_cache_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files instead of comparing")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")
