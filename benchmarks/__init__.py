"""Measurements, in folders by what they measure. `results` holds what was measured, and documents show it."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ROOT / "docs"
