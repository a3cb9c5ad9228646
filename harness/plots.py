"""Pictures of a run without a plotting library: curves in the terminal, curves as SVG, and the before/after table.

What it leaves out: reading files and choosing what to draw. Imports nothing of the project but the names of the kinds.

    print(terminal_plot({"held-out": [(0, 0.29), (50, 0.55)]}))
    Path("curve.svg").write_text(svg_plot(series, "Held-out accuracy", "accuracy"))
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from buffers import KINDS

Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> [(step, value), ...]
MARKS = "*o+x#@%&"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")  # colour-blind safe


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, max(last, first + 1) + 1)]


def bounds(points: Sequence[tuple[float, float]]) -> tuple[float, float, list[float]]:
    """(smallest x, largest x, ticks of y) of all finite points; raises ValueError when there are none."""
    if not points:
        raise ValueError("a plot needs at least one point with a finite value")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), max(xs), ticks(min(ys), max(ys))


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return sorted((x, y) for x, y in points if y is not None and math.isfinite(y))


def terminal_plot(series: Series, width: int = 72, height: int = 12) -> str:
    """Curves in plain ASCII, one mark per series: `height` rows of at most `width` columns, then axis and legend."""
    lines = {name: finite(points) for name, points in series.items()}
    left, right, y_ticks = bounds([point for points in lines.values() for point in points])
    bottom, top = y_ticks[0], y_ticks[-1]
    labels = [f"{top:.4g}", f"{bottom:.4g}"]
    margin = max(map(len, labels)) + 2
    columns = max(8, width - margin)
    grid = [[" "] * columns for _ in range(height)]

    def place(x: float, y: float, mark: str) -> None:
        column = round((x - left) / (right - left or 1) * (columns - 1))
        row = round((top - y) / (top - bottom) * (height - 1))
        if mark != "." or grid[row][column] == " ":
            grid[row][column] = mark

    for points in lines.values():  # first the dotted lines, so that marks lie on top
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            for k in range(columns):
                place(x0 + (x1 - x0) * k / columns, y0 + (y1 - y0) * k / columns, ".")
    for number, points in enumerate(lines.values()):
        for x, y in points:
            place(x, y, MARKS[number % len(MARKS)])
    sides = [labels[0]] + [""] * (height - 2) + [labels[1]]
    rows = [f"{side:>{margin - 2}} |{''.join(row).rstrip()}" for side, row in zip(sides, grid, strict=True)]
    ends = f"{left:g}", f"{right:g}"
    rows.append(" " * (margin - 1) + "+" + "-" * columns)
    rows.append(" " * margin + ends[0] + ends[1].rjust(columns - len(ends[0])))
    return "\n".join(rows + ["  ".join(f"{MARKS[k % len(MARKS)]} {name}" for k, name in enumerate(lines))])


def svg_plot(series: Series, title: str, y_label: str, bands: Mapping | None = None) -> str:
    """The same curves as a standalone SVG. `bands`: name -> [(x, low, high), ...], drawn pale behind the curve of that
    name (a confidence interval, or the range over seeds)."""
    lines = {name: finite(points) for name, points in series.items()}
    bands = bands or {}
    edges = [(x, y) for name in lines for x, low, high in bands.get(name, ()) for y in (low, high)]
    left, right, y_ticks = bounds([point for points in lines.values() for point in points] + edges)
    x_ticks = [x for x in ticks(left, right, 8) if left <= x <= right] or [left]
    x0, x1, y0, y1 = 70, 540, 50, 340  # the plot area inside 720 x 400

    def at(x: float, y: float) -> str:
        across = (x - left) / (right - left or 1)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{x0 + across * (x1 - x0):.1f},{y1 - up * (y1 - y0):.1f}"

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'

    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="400" fill="white"/>',
        text((x0 + x1) / 2, 28, title, 'text-anchor="middle" font-size="16"'),
        text((x0 + x1) / 2, 385, "step", 'text-anchor="middle"'),
        text(18, (y0 + y1) / 2, y_label, f'text-anchor="middle" transform="rotate(-90 18 {(y0 + y1) / 2})"'),
    ]
    for value in y_ticks:
        y = float(at(left, value).split(",")[1])
        out.append(
            f'<path d="M{x0} {y}H{x1}" stroke="#dddddd"/>' + text(x0 - 8, y + 4, f"{value:g}", 'text-anchor="end"')
        )
    for value in x_ticks:
        x = float(at(value, y_ticks[0]).split(",")[0])
        out.append(f'<path d="M{x} {y1}v5" stroke="black"/>' + text(x, y1 + 20, f"{value:g}", 'text-anchor="middle"'))
    out.append(f'<path d="M{x0} {y0}V{y1}H{x1}" fill="none" stroke="black"/>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        band = sorted(bands.get(name, ()))
        if band:
            corners = [at(x, high) for x, _, high in band] + [at(x, low) for x, low, _ in reversed(band)]
            out.append(f'<polygon points="{" ".join(corners)}" fill="{colour}" opacity="0.18"/>')
        corners = " ".join(at(x, y) for x, y in points)
        out.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            across, down = at(x, y).split(",")
            out.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>')
        y = y0 + 10 + 22 * number
        out.append(f'<path d="M{x1 + 15} {y}h22" stroke="{colour}" stroke-width="3"/>' + text(x1 + 43, y + 4, name))
    return "\n".join([*out, "</svg>"]) + "\n"


def comparison_table(before: Mapping, after: Mapping) -> str:
    """Accuracy before, after, and the difference with its standard error, for every suite that both records of
    metrics.jsonl have: per task type and their mean, or as a whole where a suite has no task types. The error is that
    of two independent samples, which is larger than that of paired ones."""
    lines = [("", "before", "after", "change", "standard error")]
    for suite in [key.removesuffix("/all/n") for key in before if key.endswith("/all/n") and key in after]:
        names = {kind: f"{suite}/{kind}/n" for kind in KINDS if f"{suite}/{kind}/n" in after} or {"": f"{suite}/all/n"}
        rows = []
        for name, tasks in names.items():
            old, new = (record[f"{suite}/{name}/accuracy".replace("//", "/")] for record in (before, after))
            rows.append((name, old, new, math.sqrt((old * (1 - old) + new * (1 - new)) / after[tasks])))
        if len(rows) > 1:
            old, new = (statistics.fmean(row[k] for row in rows) for k in (1, 2))
            rows.append(("mean", old, new, math.sqrt(sum(row[3] ** 2 for row in rows)) / len(names)))
        label = suite.removeprefix("eval/")
        lines += [(f"{label} {n}", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", f"{e:.3f}") for n, a, b, e in rows]
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{name:<{width}}{a:>8}{b:>8}{change:>9}   {error}" for name, a, b, change, error in lines)
