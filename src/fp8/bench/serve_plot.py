"""A picture of `fp8 bench serve`: milliseconds a token of every arm, and the floor of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(results: Mapping[str, Any], path: Path) -> Path | None:
    """Write the picture; without matplotlib say so, and return None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install 'fp8[report]'")
        return None
    arms = {name: arm["rows"] for name, arm in results["arms"].items() if "rows" in arm}
    rows = list(dict.fromkeys(row for found in arms.values() for row in found))
    figure = Figure(figsize=(1.5 + 1.8 * len(rows), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(arms))
    for i, (name, found) in enumerate(arms.items()):
        at = [j + (i - (len(arms) - 1) / 2) * width for j, row in enumerate(rows) if "itl" in found.get(row, {})]
        kept = [found[row] for row in rows if "itl" in found.get(row, {})]
        axes.bar(at, [1e3 * one["itl"]["p50"] for one in kept], 0.92 * width, label=name)
        floors = [(x, 1e3 * one["floor"]) for x, one in zip(at, kept, strict=True) if "floor" in one]
        axes.hlines([y for _, y in floors], [x - width / 2 for x, _ in floors], [x + width / 2 for x, _ in floors], "k")
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlabel("batch x prompt")
    axes.set_ylabel("ms a token (line: floor)")
    axes.set_title(f"{results['model']}, median")
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
