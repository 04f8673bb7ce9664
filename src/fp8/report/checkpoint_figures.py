"""The pictures of a checkpoint's report, from the data of `calibrate/survey.py`.

Layers stand along the x axis by their number, and a colour and a mark tell which kind of matrix it is, so that no
picture needs colour to be read. Where there are no numbers there is no picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .figures import FAINT, HIGH, INK, SERIES, SIZE, panel, power, svg

Row = Mapping[str, Any]
KINDS = ("into attention", "out of attention", "into MLP", "out of MLP", "other")
COLOURS, MARKS = (*SERIES, HIGH), ("o", "s", "^", "D", "x")
ENDS = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "qkv_proj": 0, "query": 0, "key": 0, "value": 0, "o_proj": 1,
    "gate_proj": 2, "up_proj": 2, "gate_up_proj": 2, "w1": 2, "w3": 2, "down_proj": 3, "w2": 3,
}  # fmt: skip


def kind_of(name: str) -> int:
    """The place in `KINDS` of a layer's name."""
    return ENDS.get(name.rpartition(".")[2], len(KINDS) - 1)


def depth_of(name: str) -> int:
    """The number of the layer that a name is in; 0 where it has none.

    >>> depth_of("model.layers.12.mlp.up_proj"), depth_of("lm_head")
    (12, 0)
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else 0


def by_depth(rows: Iterable[Row], value: Callable[[Row], float | None], key: str, title: str, unit: str,
             log: bool = False) -> str:  # fmt: skip
    """A mark for each row that has a value, by depth and kind of its layer; nothing where all are zero or none is."""
    points: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if (found := value(row)) is not None and (found > 0 or not log):
            points.setdefault(kind_of(name_of(row)), []).append((depth_of(name_of(row)), found))
    if not any(found for marks in points.values() for _, found in marks):
        return ""
    figure, axes = panel(xlabel="layer", ylabel=unit, title=title)
    whole_steps(axes)
    for kind in sorted(points):
        place = {"color": COLOURS[kind], "marker": MARKS[kind], "linestyle": "none", "markersize": 4, "alpha": 0.85}
        axes.plot(*zip(*points[kind], strict=True), label=KINDS[kind], **place)
    if log:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    elif unit == "percent":
        axes.set_ylim(bottom=0)
    return svg(figure, key)


def plain_numbers(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, three a decade, or one where there are many."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def name_of(row: Row) -> str:
    return row["name"] if "name" in row else row["layers"][0]


def whole_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def scale_histogram(counts: Mapping[str, int]) -> str:
    """How many scales lie in each binade."""
    if not counts:
        return ""
    figure, axes = panel(xlabel="scale, rounded down to a power of two", ylabel="scales", title="Scales of the weights")
    exponents = [int(exponent) for exponent in counts]
    axes.bar(exponents, list(counts.values()), color=SERIES[0], width=0.8)
    step = max((max(exponents) - min(exponents)) // 6, 1)
    marks = list(range(min(exponents), max(exponents) + 1, step))
    axes.set_xticks(marks, [power(2.0**mark) for mark in marks])
    return svg(figure, "scales")


def estimate_against_measure(groups: Sequence[Row]) -> str:
    """The gradient's estimate of each group's impact beside the measured one."""
    points = [(g["kl"], g["fisher"], kind_of(g["layers"][0])) for g in groups if g["kl"] > 0 and g["fisher"] > 0]
    if not points:
        return ""
    figure, axes = panel(
        xlabel="KL, measured", ylabel="Fisher, estimated", title="One backward pass against all passes"
    )
    ends = [min(min(p[:2]) for p in points), max(max(p[:2]) for p in points)]
    axes.plot(ends, ends, color=FAINT, linewidth=1)
    for kind in sorted({kind for *_, kind in points}):
        xy = [point[:2] for point in points if point[2] == kind]
        axes.plot(*zip(*xy, strict=True), color=COLOURS[kind], marker=MARKS[kind], linestyle="none", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    return svg(figure, "fisher")


def kv_heat(kv: Sequence[Row], which: str) -> str:
    """The scale of each head's keys or values: a row for each head, a column for each layer, stronger where larger."""
    columns = [row[which] for row in kv]
    if not any(columns):
        return ""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    title = {"k": "Scales of keys", "v": "Scales of values"}[which]
    figure, axes = panel(xlabel="layer", ylabel="head", title=title)
    axes.grid(False)
    logs = [[math.log2(scale) for scale in column] for column in columns]
    low, high = (end(end(column) for column in logs if column) for end in (min, max))
    cells, faces = [], []
    for x, column in enumerate(logs):
        for y, value in enumerate(column):
            cells.append(Rectangle((x - 0.5, y - 0.5), 1, 1))
            faces.append(to_rgba(SERIES[0], 0.08 + 0.92 * (value - low) / max(high - low, 1e-9)))
    axes.add_collection(PatchCollection(cells, facecolors=faces, edgecolors="none"))
    axes.set(xlim=(-0.5, len(logs) - 0.5), ylim=(-0.5, max(map(len, logs)) - 0.5))
    whole_steps(axes)
    axes.yaxis.set_major_locator(type(axes.xaxis.get_major_locator())(integer=True))
    axes.set_title(f"{title}, {power(2.0**low)} to {power(2.0**high)}", color=INK, fontsize=10, fontweight="bold")
    return svg(figure, f"kv-{which}")


def losses(rows: Sequence[Row]) -> str:
    """What each measurement lost, with its interval; a row a measurement, all of one unit."""
    figure, axes = panel(xlabel="loss: percent or points", title="Against the base")
    figure.set_size_inches(SIZE[0], 1.0 + 0.4 * len(rows))
    for at, row in enumerate(rows):
        colour = COLOURS[at % len(SERIES)]
        if row["low"] is not None and row["high"] is not None:
            axes.plot((row["low"], row["high"]), (at, at), color=colour, linewidth=1.6)
        axes.plot(row["loss"], at, color=colour, marker="o")
    axes.axvline(0, color=HIGH, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return svg(figure, "losses")
