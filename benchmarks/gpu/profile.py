"""Where the time of a run goes: a trace of the profiler, as a picture of seconds by kind of operation.

    python -m benchmarks.gpu models --profile            # records one run of each model, and draws it
    python -m benchmarks.gpu.profile FOLDER --png=a.png  # draws a trace that is there

The trace itself opens in xprof or Perfetto. Overlapping events of one track count once.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# By what a kernel's or an instruction's name holds; the first that fits.
CATEGORIES: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|fmha|flash"),
    ("8-bit matmul", r"linear_8bit|matmul_8bit|matmul_hopper|s8|int8|f8e4m3|igmma|qgmma"),
    ("norms, rotation, quantization", r"layernorm|rmsnorm|quantize|rope|fused_norm"),
    ("convolution", r"conv(?!ert)|implicit|fprop"),
    ("matmul", r"gemm|ynn|cublas|nvjet|cutlass|xmma|dot|matmul"),
    ("communication", r"nccl|all[-_]?reduce|all[-_]?gather|all[-_]?to[-_]?all|permute"),
    ("copies", r"memcpy|memset|copy|transpose|dynamic[-_](update[-_])?slice|concatenate"),
    ("other fusions", r"fusion|loop_|input_|wrapped_|reduce|broadcast|convert"),
)
_OTHER = "other"
# Tracks of the host that only wait or call.
_SKIPPED = re.compile(r"^(ThreadpoolListener|ThunkExecutor|\$|end:|Thread)", re.IGNORECASE)


def profiled(folder: pathlib.Path, call: Callable[[], Any]) -> dict[str, float]:
    """Runs `call` under the profiler, draws its trace into `folder`.png and gives the seconds by category."""
    import jax

    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(call())
    seconds = categories(read_trace(newest_trace(folder)))
    draw(seconds, folder.with_suffix(".png"), title=folder.name)
    return seconds


def newest_trace(folder: pathlib.Path) -> pathlib.Path:
    """The trace.json.gz that the profiler wrote last below a folder."""
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no trace below {folder}")
    return found[-1]


def read_trace(path: pathlib.Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def categories(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the device's operations by category, the largest first.

    A GPU's streams are taken where there are any; else the operations of XLA's CPU client. An event within another of
    the same track counts for itself and not for the outer one.
    """
    events = list(events)
    tracks = _operation_tracks(events)
    seconds: dict[str, float] = collections.defaultdict(float)
    by_track: dict[tuple[int, int], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if (
            event.get("ph") == "X"
            and event.get("dur")
            and (event["pid"], event["tid"]) in tracks
            and _is_operation(event)
        ):
            by_track[event["pid"], event["tid"]].append(event)
    for of_track in by_track.values():
        for event, own in _own_times(of_track):
            seconds[category(event)] += own / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def category(event: Mapping[str, Any]) -> str:
    """Of an event, by its name and what it says of the program's instruction."""
    arguments = event.get("args", {})
    names = (event["name"], arguments.get("hlo_op", ""), arguments.get("name", ""), arguments.get("tf_op", ""))
    text = " ".join(map(str, names)).lower()
    return next((name for name, pattern in CATEGORIES if re.search(pattern, text)), _OTHER)


def draw(seconds: Mapping[str, float], path: pathlib.Path, *, title: str) -> None:
    """A PNG with a bar a category: milliseconds, and the share of all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total = sum(seconds.values()) or 1.0
    names = list(seconds)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.4 * max(1, len(names))), layout="constrained")
    bars = axes.barh(names, [1e3 * seconds[name] for name in names], color="#3b6ea5")
    axes.bar_label(bars, [f"{1e3 * seconds[name]:,.1f} ms, {seconds[name] / total:.0%}" for name in names], padding=3)
    axes.set(title=f"{title}: {1e3 * total:,.0f} ms of operations", xlabel="ms")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, help="where the profiler wrote")
    parser.add_argument("--png", type=pathlib.Path, help="picture; default: FOLDER.png")
    options = parser.parse_args(argv)
    try:
        trace = newest_trace(options.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    seconds = categories(read_trace(trace))
    for name, value in seconds.items():
        print(f"{1e3 * value:12,.2f} ms  {name}")
    draw(seconds, options.png or options.folder.with_suffix(".png"), title=options.folder.name)
    return 0


def _operation_tracks(events: Iterable[Mapping[str, Any]]) -> set[tuple[int, int]]:
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    streams = {key for key, name in threads.items() if "GPU" in processes.get(key[0], "") and name.startswith("Stream")}
    if streams:
        return streams
    return {key for key, name in threads.items() if re.search(r"XLA|Eigen|TfrtCpu|PjRt|python", name, re.IGNORECASE)}


def _is_operation(event: Mapping[str, Any]) -> bool:
    arguments = event.get("args", {})
    on_gpu = any(key in arguments for key in ("correlation_id", "memcpy_details", "kernel_details"))
    return (on_gpu or "hlo_op" in arguments) and not _SKIPPED.match(event["name"])


def _own_times(track: list[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Events with their microseconds, less those of events within them."""
    open_events: list[list[Any]] = []  # event, end, own
    for event in sorted(track, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and open_events[-1][1] <= event["ts"]:
            done = open_events.pop()
            yield done[0], max(done[2], 0.0)
        if open_events:
            open_events[-1][2] -= event["dur"]
        open_events.append([event, event["ts"] + event["dur"], event["dur"]])
    for done in reversed(open_events):
        yield done[0], max(done[2], 0.0)


if __name__ == "__main__":
    sys.exit(main())
