"""Numbers recorded from the published PyTorch implementations, and this project's answers to the same inputs.

`pytest tests/reference --reference-cases DIR` tests a folder of cases, and `python -m benchmarks.errors.parity` writes
the report. `registry.py` says which function answers which kind of case; `case.py` reads them and needs no jax.
"""
