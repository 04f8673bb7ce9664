"""The report's pictures, as SVG that takes its colours from the page, so that they follow light and dark.

matplotlib draws with stand-in colours (`INK` and the others below); `svg` puts CSS variables in their place. Each
picture is one panel, small enough to be read on a phone; the page sets them side by side where there is room.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from ..evaluate import shares
from ..formats import Format, format_of

Arm = dict[str, Any]
INK, FAINT, HIGH = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707")
VARIABLES = dict(zip((INK, FAINT, HIGH, *SERIES), ("ink", "faint", "high", "one", "two", "three", "four"), strict=True))
PARTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
WINDOW = 10
SIZE = (4.0, 2.8)
SIGNS = ((1, ""), (-1, "−"))


def panel(**labels: str) -> tuple[Any, Any]:
    """A figure with one pair of axes, in the page's style."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fp8", "font.family": "sans-serif"}
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)
    if labels.get("xlabel") == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color=FAINT, linewidth=0.5, alpha=0.35)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=INK, fontsize=9)
    axes.title.set(color=INK, fontsize=10, fontweight="bold")
    return figure, axes


def svg(figure: Any, name: str) -> str:
    """The figure as inline SVG with the page's colours, and with identifiers that no other figure has."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text.replace("\n", " "), count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def legend(axes: Any, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def smooth(losses: Sequence[float], window: int = WINDOW) -> tuple[list[int], list[float]]:
    """The mean of the last steps, at each step that has enough of them."""
    at = range(min(window, len(losses)), len(losses) + 1)
    return list(at), [sum(losses[max(n - window, 0) : n]) / min(n, window) for n in at]


# --------------------------------------------------------------------------- the pictures


def loss_curves(arms: list[Arm], names: list[str]) -> str:
    """Training losses, smoothed over ten steps, and the evaluations as dots."""
    figure, axes = panel(xlabel="step", ylabel="nats a token", title="Loss")
    for arm, name, colour in zip(arms, names, (HIGH, *SERIES), strict=False):
        width, alpha = (4.0, 0.45) if arm is arms[0] else (1.2, 1.0)  # the curves lie on each other
        axes.plot(*smooth(arm["losses"]), color=colour, linewidth=width, alpha=alpha, label=f"{name}, training")
        dots = [(e["step"], e["loss"]) for e in arm["evaluations"]]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5, label=f"{name}, validation")
    legend(axes)
    return svg(figure, "loss")


def loss_differences(arms: list[Arm], names: list[str]) -> str:
    """Each FP8 arm's smoothed training loss against that of high precision, in percent, step by step."""
    figure, axes = panel(xlabel="step", ylabel=f"percent of {names[0]}", title=f"Loss against {names[0]}, same data")
    window = max(WINDOW, len(arms[0]["losses"]) // 20)
    at, high = smooth(arms[0]["losses"], window)
    axes.axhspan(-0.5, 0.5, color=FAINT, alpha=0.18, linewidth=0)
    axes.axhline(0, color=HIGH, linewidth=1)
    for arm, name, colour in zip(arms[1:], names[1:], SERIES, strict=False):
        off = [100 * (low / one - 1) for low, one in zip(smooth(arm["losses"], window)[1], high, strict=True)]
        axes.plot(at, off, color=colour, linewidth=1.6, label=name)
    legend(axes)
    return svg(figure, "difference")


def scale_histories(arm: Arm, role: str) -> str:
    """The scale of each layer's operand over the run: a colour for each of `PARTS`, deeper layers fainter."""
    figure, axes = panel(xlabel="step", title=f"Scale of {ROLES[role]}")
    steps = [probe["step"] for probe in arm["probes"]]
    layers = list(arm["probes"][-1]["layers"]) if arm["probes"] else []
    for layer in layers:
        part = layer.split(".", 2)[-1]
        colour, depth = SERIES[PARTS.index(part) if part in PARTS else 0], layers.index(layer) / len(layers)
        values = [probe["layers"][layer][role]["scale"] for probe in arm["probes"]]
        axes.step(steps, values, where="post", color=colour, alpha=1 - 0.7 * depth, linewidth=1.2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: power(value))
    return svg(figure, f"scale-{arm['name']}-{role}")


def code_histogram(arm: Arm, role: str) -> str:
    """How often each code occurs, from the most negative value to the most positive; NaN and infinities left out."""
    row, counts = format_of(arm["recipe"][role]["format"]), arm["probes"][-1]["histogram"][role]
    title = f"Codes of {ROLES[role]}, {row.name.upper()}"
    figure, axes = panel(xlabel="value of the code, before its scale", ylabel="percent", title=title)
    shares_of = [100 * count / max(sum(counts), 1) for count in by_value(counts, row)]
    last = len(shares_of) // 2
    axes.stairs(shares_of, [i - last - 0.5 for i in range(2 * last + 2)], fill=True, color=SERIES[0])
    marks = [(0, "0")] + [(sign * code, mark + power(value)) for code, value in ticks(row) for sign, mark in SIGNS]
    axes.set_xticks([place for place, _ in marks], [mark for _, mark in marks])
    return svg(figure, f"codes-{arm['name']}-{role}")


def by_value(counts: Sequence[int], row: Format) -> list[int]:
    """Counts of 256 codes in the order of their values, finite ones only; the two zeros are one."""
    last = row.encode(row.max)
    return [*(counts[128 + i] for i in range(last, 0, -1)), counts[0] + counts[128], *counts[1 : last + 1]]


def ticks(row: Format) -> list[tuple[int, float]]:
    """Codes to mark, with their values: some powers of two, and in E4M3 the largest."""
    values = (2.0**-4, 1.0, 16.0, row.max) if row.name == "e4m3" else (2.0**-8, 1.0, 2.0**8, 2.0**15)
    return [(row.encode(value), value) for value in values]


def share_history(arm: Arm, what: str) -> str:
    """The share of elements saturated, or flushed to zero, by role over the run."""
    title = {"saturated": "Clipped at the largest code", "flushed": "Flushed to zero"}[what]
    figure, axes = panel(xlabel="step", ylabel="percent of the elements", title=title)
    steps = [probe["step"] for probe in arm["probes"]]
    seen = [shares(probe["layers"], what) for probe in arm["probes"]]
    for role, colour in zip(ROLES, SERIES, strict=False):
        axes.plot(steps, [100 * one[role] for one in seen], color=colour, linewidth=1.6, label=ROLES[role])
    axes.set_ylim(bottom=0)
    legend(axes)
    return svg(figure, f"{what}-{arm['name']}")


ROLES = {"x": "activations (x)", "w": "weights (w)", "grad": "gradients (grad)"}


def power(value: float) -> str:
    """Powers of two as such, other numbers as they are.

    >>> power(2.0**-4), power(1.0), power(448.0)
    ('2⁻⁴', '1', '448')
    """
    exponent = math.log2(value)
    if value in (1.0, 2.0) or exponent != int(exponent):
        return f"{value:g}"
    return "2" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
