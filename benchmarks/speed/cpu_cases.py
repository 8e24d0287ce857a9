"""What benchmarks.speed.cpu times, and how: nothing but the standard library, so that both sides import it.

Whoever runs a case answers a line of JSON to each line: {"load": CASE} builds and warms it up, {"run": CASE} times one
run, {"drop": CASE} frees it.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO


class TransformerCase(NamedTuple):
    """One evaluation of the velocity: 1.3B block shapes, 4096 tokens."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 2
    text_len: int = 512
    text_dim: int = 4096
    latents: tuple[int, int, int, int] = (4, 64, 64, 16)  # frames, rows, columns, channels; patches of 1 x 2 x 2


class VaeCase(NamedTuple):
    """Decoding nine frames of 128 x 128 with the full-size VAE."""

    latents: tuple[int, int, int, int] = (3, 16, 16, 16)


CASES: dict[str, TransformerCase | VaeCase] = {"dit": TransformerCase(), "vae": VaeCase()}

Runner = Callable[[], None]


def seconds(run: Runner) -> dict[str, float]:
    """Wall-clock seconds of one run, and the seconds of CPU that all threads of the process spent on it."""
    cpu, start = time.process_time(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def serve(make: Callable[[str], Runner], about: dict[str, Any], lines: TextIO, answers: TextIO) -> None:
    """Answers the lines until they end; the first answer is `about`."""
    loaded: dict[str, Runner] = {}

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(about)
    for line in lines:
        ((verb, case),) = json.loads(line).items()
        if verb == "load":
            loaded[case] = make(case)
            loaded[case]()
            answer({})
        elif verb == "run":
            answer(seconds(loaded[case]))
        else:
            del loaded[case]
            answer({})
