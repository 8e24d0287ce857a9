"""The error table's operations as a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A PNG: one panel an operation, one group of bars a precision, one bar a kind of data, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(row["operation"] for row in rows))
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    # Bars are as wide in every panel.
    widths = [len({row["precision"] for row in rows if row["operation"] == operation}) for operation in operations]
    figure, panels = pyplot.subplots(
        1, len(operations), figsize=(14, 4.2), sharey=True, layout="constrained", squeeze=False, width_ratios=widths
    )
    width = 0.8 / len(kinds)
    for axes, operation in zip(panels[0], operations, strict=True):
        own = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(row["precision"] for row in own))
        for i, kind in enumerate(kinds):
            points = [(names.index(row["precision"]), row) for row in own if row["data"] == kind]
            places = [x + (i - (len(kinds) - 1) / 2) * width for x, _ in points]
            medians = [row["median"] for _, row in points]
            above = [row["worst"] - row["median"] for _, row in points]
            axes.bar(places, medians, width, yerr=[[0.0] * len(above), above], label=kind, color=f"C{i}", capsize=2)
        axes.set_xticks(
            range(len(names)), [name.replace(", ", "\n").replace(" only", "\nonly") for name in names], fontsize=8
        )
        axes.set(title=operation, yscale="log")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("relative error against float32")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
