"""What measurements of the tiny world leave behind: tables, JSON files, plots and contact sheets."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.shapes.judge import Verdict
from x2v_jax.media.video import write_png

_FRAMES = 9  # in a row of the sheet
_GAP = 2
_MARK = 18  # width of the column with tick or cross
_TEXT = 330
_GREEN, _RED, _INK, _PAPER = (24, 128, 56), (200, 30, 30), (30, 30, 30), (255, 255, 255)

# heading, key, how to write it, width
_COLUMNS = (
    ("colour", "colour", "{:.1%}", 8),
    ("shape", "shape", "{:.1%}", 8),
    ("direction", "direction", "{:.1%}", 10),
    ("all right", "all", "{:.1%}", 10),
    ("95 % interval", None, "", 17),
    ("jerk px", "jerk", "{:.3f}", 9),
    ("size var.", "size_variation", "{:.4f}", 10),
    ("Fréchet", "frechet", "{:.3f}", 9),
)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Results (of `summarize`, and `frechet`) as text, one row a set of videos."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>{size}}" for name, _, _, size in _COLUMNS)]
    for name, values in rows.items():
        cells = []
        for _, key, form, size in _COLUMNS:
            if key is None:
                text = f"{values['all_low']:.1%} – {values['all_high']:.1%}"
            else:
                value = values.get(key, math.nan)
                text = form.format(value) if math.isfinite(value) else "–"
            cells.append(f"{text:>{size}}")
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def plain(values: Any) -> Any:
    """The same with values that JSON has: no NaN, no numpy."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    if isinstance(values, float | np.floating):
        return float(values) if math.isfinite(values) else None
    return int(values) if isinstance(values, np.integer) else values


def contact_sheet(
    videos: Sequence[np.ndarray],
    prompts: Sequence[str],
    wanted: Sequence[tuple[str, str, str]],
    verdicts: Sequence[Verdict],
) -> bytes:
    """A PNG with one row a video: tick or cross, frames, the prompt, and what the judge saw where it is not that."""
    height, width = videos[0].shape[1:3]
    row_width = _MARK + _FRAMES * (width + _GAP) + _TEXT
    sheet = Image.new("RGB", (row_width, len(videos) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for row, (video, prompt, asked, verdict) in enumerate(zip(videos, prompts, wanted, verdicts, strict=True)):
        top = row * (height + _GAP)
        right = verdict.names == asked
        _mark(draw, top + height // 2, right)
        for column, frame in enumerate(np.linspace(0, len(video) - 1, _FRAMES).round().astype(int)):
            sheet.paste(Image.fromarray(video[frame]), (_MARK + column * (width + _GAP), top))
        left = _MARK + _FRAMES * (width + _GAP) + 6
        draw.text((left, top + height // 2 - 16), prompt, _INK, font)
        if not right:
            seen = " ".join(f"[{b}]" if a != b else b for a, b in zip(asked, verdict.names, strict=True))
            draw.text(
                (left, top + height // 2 + 2), f"seen: {seen if verdict.found else 'no single shape'}", _RED, font
            )
    return iio.imwrite("<bytes>", np.asarray(sheet), plugin="pillow", extension=".png", optimize=True)


def sheet_rows(right: Sequence[bool], count: int) -> list[int]:
    """Which videos to show: half of the rows at even distances, whatever they are; then failures, if there are any."""
    total = len(right)
    count = min(count, total)
    even = sorted({int(i) for i in np.linspace(0, total - 1, math.ceil(count / 2))})
    failed = [i for i in range(total) if not right[i] and i not in even]
    return even + failed[: count - len(even)]


def _mark(draw: ImageDraw.ImageDraw, middle: int, right: bool) -> None:
    x = 3
    if right:
        draw.line([(x, middle), (x + 4, middle + 5), (x + 12, middle - 6)], _GREEN, 3)
    else:
        draw.line([(x, middle - 6), (x + 12, middle + 6)], _RED, 3)
        draw.line([(x, middle + 6), (x + 12, middle - 6)], _RED, 3)


def plot_horizons(path: pathlib.Path, modes: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracy and drift by horizon of a long video: three panels side by side, a line a mode."""
    from matplotlib.figure import Figure

    panels = {
        "prompt accuracy, %": ("accuracy", 100.0),
        "background drift, grey levels": ("background_drift", 1.0),
        "colour drift, grey levels": ("colour_drift", 1.0),
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, (name, scale)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for mode, values in modes.items():
            axes.plot(np.arange(1, 1 + len(values[name])), scale * np.array(values[name]), marker="o", label=mode)
        axes.set(title=title, xlabel="horizon (33 frames each)")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=110)


def frames_sheet(path: pathlib.Path, shown: Mapping[str, np.ndarray]) -> None:
    """Rows of frames: the first videos of every mode, one mode below the other."""
    most = max(frames.shape[1] for frames in shown.values())
    rows = []
    for frames in shown.values():
        padded = np.zeros((len(frames), most, *frames.shape[2:]), np.uint8)
        padded[:, : frames.shape[1]] = frames
        rows += [np.concatenate(list(video), axis=1) for video in padded]
    image = Image.fromarray(np.concatenate(rows))
    write_png(path, np.asarray(image.resize((image.width // 2, image.height // 2))))
