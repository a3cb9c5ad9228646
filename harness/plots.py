"""Pictures of a run: curves over steps and a histogram over steps, as SVG text that matplotlib draws.

What it does: the same bytes every time, for a file of their own or (`small`, `inline`) as one of many on a page whose
style sheet gives the colours. What it leaves out: what is drawn (report.py, benchmarks/learning.py).

    Path("curve.svg").write_text(svg_plot({"deduction": [(0, 0.3), (10, 0.5)]}, "Held-out accuracy", "accuracy"))
"""

import io
import math
import re
from collections.abc import Mapping, Sequence

from harness.metrics import mean


def thin(points: Sequence[tuple[int, float]], most: int = 100) -> list[tuple[int, float]]:
    """At most `most` points: each the mean of neighbours, at the last one's step."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], mean(value for _, value in group)) for group in groups]


def svg_plot(series: Mapping, title="", y_label="", bands: Mapping | None = None, small: bool = False) -> str:
    """Curves over steps. `series`: name -> [(step, value or None), ...]; `bands`: name -> [(step, low, high), ...],
    drawn pale behind the curve of that name; `small`: the page has the legend. Raises ValueError without any value."""
    points = {name: sorted((x, math.nan if y is None else y) for x, y in found) for name, found in series.items()}
    if not any(math.isfinite(y) for found in points.values() for _, y in found):
        raise ValueError("a plot needs at least one point with a finite value")
    axes = new_axes(small, title=title, xlabel="step", ylabel=y_label)
    dots = "" if small and max(map(len, points.values())) > 20 else "o"
    for name, found in points.items():
        xs, ys = zip(*found, strict=True) if found else ((), ())
        (line,) = axes.plot(xs, ys, marker=dots, markersize=4, linewidth=1.4 if small else None, label=name)
        if band := (bands or {}).get(name):
            axes.fill_between(*zip(*sorted(band), strict=True), color=line.get_color(), alpha=0.18, linewidth=0)
    axes.grid(color="#dddddd")
    if not any(y for found in points.values() for _, y in found):
        axes.set_ylim(0, 1)  # else 0 would lie in the middle, above negative shares
    if not small:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return svg_text(axes.figure)


def svg_histograms(found: Sequence[tuple[int, Sequence[int]]], colour: str) -> str:
    """`found`: (step, how many tasks were solved 0, 1, .. G times); the larger a step's share, the darker the cell."""
    from matplotlib.colors import ListedColormap, to_rgb

    rows = [
        thin([(step, counts[k] / max(1, sum(counts))) for step, counts in found], 25) for k in range(len(found[0][1]))
    ]
    axes = new_axes(small=True, xlabel="step", ylabel="right attempts")
    shades = ListedColormap([(*to_rgb(colour), shade / 100) for shade in range(101)])
    steps = [found[0][0] - 1, *(step for step, _ in rows[0])]
    cells = [[share or math.nan for _, share in row] for row in rows]  # nan: no cell is drawn
    axes.pcolormesh(steps, [solved - 0.5 for solved in range(len(rows) + 1)], cells, cmap=shades, vmin=0)
    return svg_text(axes.figure)


def new_axes(small: bool, **texts: str):
    from matplotlib.figure import Figure  # only here: it takes half a second to import

    if small:
        axes = Figure(figsize=(4.4, 2.4)).add_axes((0.13, 0.18, 0.86, 0.79), **texts)  # to find a layout takes longer
    else:
        axes = Figure(figsize=(7.2, 4.0), layout="constrained").add_subplot(**texts)
    axes.spines[["top", "right"]].set_visible(not small)
    return axes


def svg_text(figure) -> str:
    """A matplotlib figure as the text of an SVG, the same bytes every time."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "azr", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def inline(svg: str) -> str:
    """The picture as a part of a page: its colours are the variables c0 to c9 and `line` of the page's style sheet,
    which differ between light and dark, and ids that a second picture would have, too, are gone."""
    from matplotlib.colors import TABLEAU_COLORS

    colours = {colour: f"var(--c{number})" for number, colour in enumerate(TABLEAU_COLORS.values())}
    colours |= {"#000000": "currentColor", "#dddddd": "var(--line)", "#ffffff": "none"}
    svg = re.sub("#[0-9a-f]{6}", lambda colour: colours.get(colour[0], colour[0]), svg[svg.index("<svg") :])
    svg = re.sub(r"(\.\d\d)\d+(?=[^<>]*>)", r"\1", svg)  # hundredths of a point are enough; numbers in texts stay
    return re.sub(r'<metadata>.*?</metadata>| id="[\w.]+_\d+"| font-family:[^;]*;|(?<=\n)\s+', "", svg, flags=re.DOTALL)
