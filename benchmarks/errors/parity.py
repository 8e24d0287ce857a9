"""Writes docs/parity.md: how far this project is from the published implementations, case by case.

    python -m benchmarks.errors.parity [--cases DIR] [--output FILE]

Exits with code 1 if a case is outside its tolerance. Takes about a minute on two CPU cores.
"""

import argparse
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import DOCUMENTS
from benchmarks.errors.beside_diffusers import RECORDED
from tests.reference.cases_lib.case import DEFAULT_CASES, Case, find_cases

if TYPE_CHECKING:
    from tests.reference.cases_lib.measure import Measurement

_DEFAULT_OUTPUT = DOCUMENTS / "parity.md"
# A merged LoRA has an output for each changed weight; the table names only the farthest of so many.
_LISTED_OUTPUTS = 6

_INTRODUCTION = """# Parity with the published implementations

Small random models were run through the published PyTorch code in float32 on a CPU, and their inputs, weights (under
the official names) and outputs recorded in [tests/reference/cases](../tests/reference/cases). Here the same weights go
through this project's conversion tables and the same inputs through its networks, samplers and mergers, in float32
without reduced-precision matmuls. The error is `‖ours − recorded‖ / ‖recorded‖` over all elements of an output; 1e-7 is
the rounding of float32.

This page is made by `python -m benchmarks.errors.parity`; `pytest tests/reference` holds every case to its tolerance,
and `pytest tests/reference --reference-cases DIR` does so for any folder of such cases.
"""


_BESIDE_DIFFUSERS = """
## Beside diffusers

What differs there from Wan2.1's own programs, which this project follows, and why. The figures are
‖theirs − ours‖ / ‖ours‖ of the latents of a shipped model after `export --layout diffusers` and `from_pretrained`, from
the same noise and embeddings in float32, recorded by
`python -m benchmarks.errors.beside_diffusers --other-python=PYTHON` with {versions}.

| what | error |
|---|---|
{rows}

- **UniPC's noise levels.** Wan2.1 begins at 0.999 before the shift and spaces evenly to 0; diffusers' UniPC begins at
  1 − 1e-6 and ends at 1/1000. Nothing in scheduler_config.json changes that: the first row is the whole difference, the
  second what is left when Wan2.1's levels are put into diffusers' scheduler.
- **The picture that CLIP is given.** Wan2.1 squeezes the whole picture to a square without antialiasing. diffusers'
  usual preprocessor_config.json crops the middle out of it; an export has one that squeezes, and what is left is the
  antialiasing of its resizing, which has no switch. It is nil where the picture has CLIP's size, and grows with the
  picture's edges.
- **Few-step models.** No scheduler of diffusers takes a step list from a file. `FlowMatchLCMScheduler(shift=1)` takes
  this project's noise levels as the `sigmas` of its `set_timesteps`.
- **The size of image-to-video.** Wan2.1 rounds the picture's shape down to whole patches, so that 832x480 asked for at
  480x832 becomes 464x832; diffusers makes 480x832 of it.
- **The shift of a folder.** Of a published diffusers folder Wan's own shift counts, of any other the one in its
  scheduler_config.json.
- **The tokenizer under transformers 5.** An export names the class that the published folders name, T5TokenizerFast,
  which transformers 5 builds anew with an unknown token of number 2, whatever tokenizer.json says. Where that is
  another, words outside the vocabulary get another embedding there; `PreTrainedTokenizerFast` reads the file as it is.
- **Lists that are not warped.** Self-Forcing and FastVideo look noise levels up in a table of 1000, CausVid's list is
  exact: a schedule's `levels` says which ([checkpoints.md](checkpoints.md#the-native-format)).
"""


class Section(NamedTuple):
    """One case's part of the report."""

    case: Case
    what: str
    measurements: Sequence["Measurement"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.errors.parity", description="Writes the parity report.")
    parser.add_argument("--cases", type=pathlib.Path, default=DEFAULT_CASES, help="folder of recorded cases")
    parser.add_argument("--output", type=pathlib.Path, default=_DEFAULT_OUTPUT, help="where the report goes")
    arguments = parser.parse_args(argv)
    paths = find_cases(arguments.cases)
    if not paths:
        parser.error(f"--cases {arguments.cases}: no folder with a case.json in it")
    # The cases were recorded on a CPU; JAX_PLATFORMS=cuda measures a GPU instead.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sections = list(_measure_all(paths))
    arguments.output.write_text(report(sections, platform=_platform()), encoding="utf-8")
    failed = [f"{s.case.name}: {m.output}" for s in sections for m in s.measurements if not m.passed]
    print(f"{arguments.output}: {len(sections)} cases, {len(failed)} outputs outside their tolerance")
    for name in failed:
        print(f"  {name}", file=sys.stderr)
    return 1 if failed else 0


def _measure_all(paths: Iterable[pathlib.Path]) -> Iterable[Section]:
    from tests.reference.cases_lib.measure import measure
    from tests.reference.cases_lib.registry import KINDS

    for path in paths:
        case = Case.load(path)
        section = Section(case, KINDS[case.kind].what if case.kind in KINDS else "", measure(case))
        worst = _farthest(section.measurements)
        print(f"{case.name}: {worst.error:.1e} ({worst.output})")
        yield section


def report(sections: Sequence[Section], *, platform: str) -> str:
    """The report as Markdown: a table with one row an output, then what each case was recorded from."""
    lines = [_INTRODUCTION, f"Measured with {platform}.", "", "| case | what | output | error | tolerance |"]
    lines.append("|---|---|---|---|---|")
    for section in sections:
        name, what = section.case.name, section.what
        for output, worst in _rows(section.measurements):
            error = f"{worst.error:.1e}" if worst.passed else f"**{worst.error:.1e}**"
            lines.append(f"| {name} | {what} | {output} | {error} | {worst.tolerance:.0e} |")
            name = what = ""  # once a case reads easier than on every row
    lines += ["", "## Sources", "", "| case | recorded from |", "|---|---|"]
    lines += [f"| {section.case.name} | {section.case.source.replace('|', chr(92) + '|')} |" for section in sections]
    return "\n".join(lines) + "\n" + _beside_diffusers()


def _beside_diffusers() -> str:
    """The section about diffusers, with what `beside_diffusers` recorded."""
    recorded = json.loads(RECORDED.read_text())
    rows = "\n".join(f"| {row['what']} | {row['error']:.1e} |" for row in recorded["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    return _BESIDE_DIFFUSERS.format(rows=rows, versions=versions)


def _rows(measurements: Sequence["Measurement"]) -> list[tuple[str, "Measurement"]]:
    if len(measurements) <= _LISTED_OUTPUTS:
        return [(m.output, m) for m in measurements]
    worst = _farthest(measurements)
    return [(f"{len(measurements)} outputs, farthest {worst.output}", worst)]


def _farthest(measurements: Sequence["Measurement"]) -> "Measurement":
    return max(measurements, key=lambda m: math.inf if math.isnan(m.error) else m.error)


def _platform() -> str:
    import jax

    return f"jax {jax.__version__} on {jax.devices()[0].platform.upper()}"


if __name__ == "__main__":
    sys.exit(main())
