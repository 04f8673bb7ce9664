"""From measurements to `rates.json`, and how far the model is off on each point.

    python -m fp8.cost.fit bench/results/rates.json      fits, writes the table, prints every error

`fp8 bench rates` measures that file; each point in it says where it comes from and whether it is `held` out. Held
points are predicted, and never fitted: a model that only repeats its own points would look right and be useless.

For each kind of product, `peak`, `fill` and `start` are those with the least absolute error of the logarithm over its
fitted points: absolute, because one product on a hot GPU lies a fifth off the others and should not pull them. All
three are searched over a grid, which gives the same table on every machine. A kind without a small product takes
`fill` and `start` of its sibling. Attention has two unknowns a direction and, where two lengths were measured, two
equations. What a step sustains is fitted last: of the whole steps in the file, the BF16 one that is not held gives
`bf16`, the FP8 one `fp8`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..recipe import Recipe
from . import gemm, traffic
from .memory import memory
from .rates import GPUS, Attention, Gemm, Rates, write
from .shape import Architecture
from .step import Setting, attention_rate, step

FILLS = (0.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0)  # a pipeline has at most four stages of 64 in flight
STARTS = (0.0, 1e-6, 2e-6, 3e-6, 4e-6, 6e-6)
PEAKS = [1.01**power for power in range(-30, 31)]
SIBLING = {"row promoted": "row fast", "1x128 1x128": "1x128 128x128"}
SMALL = 1e11  # FLOPs below which a product says something of fill and start
TABLE = Path(__file__).parent / "rates.json"
Row = dict[str, Any]


class Point(NamedTuple):
    """One measured figure beside its prediction, both in `unit`."""

    what: str
    measured: float
    predicted: float
    unit: str
    held: bool
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def fit(measured: Row) -> Rates:
    """The table from the `results` of bench/results/rates.json."""
    plain = Rates(
        gpu=GPUS["H200"],
        source=measured["source"],
        multiprocessors=measured["multiprocessors"],
        gemm={},
        copy=_bandwidth(measured["copy"]),
        elementwise=_bandwidth(measured["elementwise"]),
        cast={kind: _cast(measured["cast"], kind) for kind in traffic.CAST_BYTES},
        attention=_attention(measured["attention"]),
        kernel=measured["launch"]["kernel"],
        host=measured["launch"]["host"],
        sustained={"bf16": 1.0, "fp8": 1.0},
        estimates=measured["estimates"],
    )
    return _sustained(_gemms(plain, measured["gemm"]), measured["steps"])


def _bandwidth(rows: Iterable[Row]) -> float:
    return statistics.median(row["bytes"] / row["seconds"] for row in rows if not row["held"])


def _cast(rows: Iterable[Row], kind: str) -> float:
    """Bytes a second that a cast moves, counting each time it reads."""
    rates = [traffic.CAST_BYTES[kind] * row["elements"] / row["seconds"]
             for row in rows if row["kind"] == kind and not row["held"]]  # fmt: skip
    return statistics.median(rates)


# --------------------------------------------------------------------------- products


def _gemms(known: Rates, rows: list[Row]) -> Rates:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    for kind in sorted(kinds, key=lambda kind: kind in SIBLING):  # siblings last
        points = [row for row in rows if row["kind"] == kind and not row["held"]]
        known = dataclasses.replace(known, gemm={**known.gemm, kind: _gemm(known, kind, points)})
    return known


def _gemm(known: Rates, kind: str, points: list[Row]) -> Gemm:
    """The least error over a grid of fill and start, peak searched around the best rate seen."""
    largest = max(2.0 * math.prod(row["shape"]) / row["seconds"] for row in points)
    small = any(2.0 * math.prod(row["shape"]) < SMALL and row["shape"][0] > 64 for row in points)
    sibling = known.gemm.get(SIBLING.get(kind, ""))
    fills, starts = (FILLS, STARTS) if small or sibling is None else ((sibling.fill,), (sibling.start,))
    tried = ((peak, fill, start) for fill in fills for start in starts for peak in (largest * p for p in PEAKS))
    looks = {fill: [_look(known, kind, fill, row) for row in points] for fill in fills}
    return Gemm(*min(tried, key=lambda one: _misfit(*one, looks[one[1]])))


Look = tuple[tuple[tuple[float, float], ...], float, float]


def _look(known: Rates, kind: str, fill: float, row: Row) -> Look:
    """What does not change with peak and start: the ways to compute, the seconds of reading, those measured."""
    m, n, k = row["shape"]
    possible = gemm.ways(m, n, k, fill, known.multiprocessors, known.copy, known.kernel)
    return possible, gemm.reading(m, n, k, kind) / known.copy, row["seconds"]


def _misfit(peak: float, fill: float, start: float, points: list[Look]) -> float:
    """`gemm.seconds` against what was measured."""
    total = 0.0
    for possible, reading, measured in points:
        compute = min(work / peak + more for work, more in possible)
        total += abs(math.log((start + max(compute, reading)) / measured))
    return total


def _product(row: Row, known: Rates) -> float:
    m, n, k = row["shape"]
    return gemm.seconds(m, n, k, row["kind"], known)


# --------------------------------------------------------------------------- attention


def _attention(rows: list[Row]) -> dict[int, Attention]:
    """Peak and half length of each head size, forward and backward."""
    sizes = sorted({row["head_dim"] for row in rows})
    return {
        size: Attention(*_saturating(rows, size, "forward", 1.0), *_saturating(rows, size, "backward", 2.5))
        for size in sizes
    }


def _saturating(rows: list[Row], size: int, direction: str, times: float) -> tuple[float, float]:
    """peak and half of rate = peak * S / (S + half): 1 / rate is linear in 1 / S, and drawn through the shortest and
    the longest fitted sequence."""
    mine = sorted((r for r in rows if r["head_dim"] == size and not r["held"]), key=lambda r: r["sequence"])
    inverse = [row[direction] / (times * _attention_flops(row)) for row in mine]
    short, long = mine[0]["sequence"], mine[-1]["sequence"]
    if short == long:
        return 1 / inverse[0], 0.0
    slope = (inverse[0] - inverse[-1]) / (1 / short - 1 / long)
    flat = max(inverse[-1] - slope / long, inverse[-1] / 2)  # no peak is twice the rate of the longest
    return 1 / flat, max((inverse[-1] - flat) * long / flat, 0.0)


def _attention_flops(row: Row) -> float:
    return 2.0 * row["batch"] * row["sequence"] ** 2 * row["heads"] * row["head_dim"]  # causal


# --------------------------------------------------------------------------- whole steps


def architecture(row: Row) -> Architecture:
    return Architecture(**row["model"])


def setting(row: Row) -> Setting:
    """How a measured step was taken. `recipe` is a preset's name or null."""
    plain = dict(row["setting"])
    recipe = plain.pop("recipe", None)
    return Setting(recipe=None if recipe is None else Recipe.of(recipe), **plain)


def seconds_of(row: Row) -> float:
    """What a step took, less what a known fault cost it, which the row names: a fault is repaired, not predicted."""
    return row["seconds"] - row.get("fault_seconds", 0.0)


def _sustained(known: Rates, rows: list[Row]) -> Rates:
    """Rates in a step over rates alone, so that the fitted steps come out as measured: BF16 first, FP8 with it."""
    for name in ("bf16", "fp8"):
        fitted = [row for row in rows if not row["held"] and (row["setting"]["recipe"] is None) == (name == "bf16")]
        if not fitted:
            continue
        factors = [_factor(known, row, name) for row in fitted]
        known = dataclasses.replace(known, sustained={**known.sustained, name: round(statistics.median(factors), 4)})
    return known


def _factor(known: Rates, row: Row, name: str) -> float:
    """The factor that makes this step right: the time on tensor cores over what is left for it."""
    took = step(architecture(row), setting(row), known)
    word = "products, BF16" if name == "bf16" else "products, FP8"
    tensor = took.parts[word] + (took.parts["attention"] if name == "bf16" else 0.0)
    return known.sustained[name] * tensor / (seconds_of(row) - (took.gpu - tensor))


# --------------------------------------------------------------------------- the error


def errors(measured: Row, known: Rates) -> Iterator[Point]:
    """Every measured figure beside its prediction."""
    for row in measured["gemm"]:
        what = f"{' x '.join(map(str, row['shape']))}, {row['kind']}"
        yield _point(what, row, row["seconds"] * 1e6, _product(row, known) * 1e6, "µs")
    for row in measured["cast"]:
        if row["kind"] in traffic.CAST_BYTES:
            moved = traffic.CAST_BYTES[row["kind"]] * row["elements"] / known.cast[row["kind"]]
            yield _point(f"{row['kind']}, {row['elements'] / 1e6:.0f}M", row, row["seconds"] * 1e6, moved * 1e6, "µs")
    for section, rate in (("copy", known.copy), ("elementwise", known.elementwise)):
        for row in measured[section]:
            what = f"{row.get('what', section)}, {row['bytes'] / 1e6:.0f} MB"
            yield _point(what, row, row["seconds"] * 1e6, row["bytes"] / rate * 1e6, "µs")
    for row in measured["attention"]:
        for direction, times in (("forward", 1.0), ("backward", 2.5)):
            what = f"attention {direction}, {row['sequence']} of {row['head_dim']}"
            took = times * _attention_flops(row) / attention_rate(known, row["head_dim"], direction, row["sequence"])
            yield _point(what, row, row[direction] * 1e6, took * 1e6, "µs")
    for row in measured["steps"]:
        took = step(architecture(row), setting(row), known).seconds
        yield _point(f"step: {row['name']}", row, seconds_of(row) * 1e3, took * 1e3, "ms")
        if row.get("peak_gib"):
            peak = memory(architecture(row), setting(row)).gib
            yield _point(f"peak: {row['name']}", row, row["peak_gib"], peak, "GiB")


def _point(what: str, row: Row, measured: float, predicted: float, unit: str) -> Point:
    return Point(what, measured, predicted, unit, row["held"], row["source"])


def summary(points: Iterable[Point], name: str, chosen: Callable[[Point], bool]) -> str:
    """Median and largest error of some points."""
    off = [abs(point.error) for point in points if chosen(point)]
    return f"{name}: {len(off)} points, median {statistics.median(off):.1%}, largest {max(off):.1%}" if off else ""


def draw(points: list[Point]) -> str:
    """The points as lines, held ones marked, and the error of both groups."""
    lines = [
        f"{'held  ' if p.held else 'fitted'}  {p.what:44} {p.measured:10.2f} {p.predicted:10.2f} {p.unit:4}"
        f"{p.error:+8.1%}  {p.source}"
        for p in points
    ]
    for unit in ("µs", "ms", "GiB"):
        for held in (False, True):
            name = f"{'held out' if held else 'fitted'}, {unit}"
            lines.append(summary(points, name, lambda p, u=unit, h=held: p.unit == u and p.held == h))
    return "\n".join(line for line in lines if line)


def main(path: str, table: Path = TABLE) -> str:
    """Fit the measurements in a file, write the table, and return the errors as text."""
    measured = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
    known = fit(measured)
    table.write_text(json.dumps(write(known), indent=1) + "\n", encoding="utf-8")
    return draw(list(errors(measured, known)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fp8.cost.fit bench/results/rates.json")
    print(main(sys.argv[1]))
