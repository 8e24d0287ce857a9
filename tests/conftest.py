"""Shared test set-up: CPU only, one compilation cache for all workers, run-time shape checks on the library."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(tempfile.gettempdir()) / f"x2v_jax_test_cache_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
