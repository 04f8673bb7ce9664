"""The demo's table, once as data and from that on the screen, in the report and in the README.

It is made from `demo.json` alone: the first arm is in high precision, each further one in FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ..evaluate import difference, shares

LIMIT = 0.5  # percent
NONE = "–"
Arm = dict[str, Any]


class Row(NamedTuple):
    """What is told, and a cell for each arm."""

    label: str
    cells: list[str]


def rows(results: dict[str, Any]) -> list[Row]:
    """The table, a row for each thing that is told."""
    high, *low = results["arms"]
    name, weights, cache = high_name(results), low[0]["weights"], low[0]["cache"]
    told = [
        Row("final validation loss, nats a token", [f"{a['validation_loss']:.4f}" for a in (high, *low)]),
        each("against high precision", low, lambda a: f"{loss_difference(a, high):+.2f} %"),
        Row("perplexity", [f"{a['perplexity']:.3f}" for a in (high, *low)]),
        each("loss of the checkpoint, written and read again", low, lambda a: f"{a['reloaded_loss']:.4f}"),
        Row(f"steps to a training loss of {results['target_loss']:.2f}", [steps(a) for a in (high, *low)]),
        Row(f"gradient variance, {name} = 1", ["1", *(f"{a['gradient']['ratio']:.3f}" for a in low)]),
        each("error of one gradient", low, lambda a: f"{100 * a['gradient']['error']:.1f} %"),
        beside("weights of the FP8 layers", weights["fp8_bytes_in_bf16"], low, lambda a: a["weights"]["fp8_nbytes"]),
        beside("weights of the whole checkpoint", weights["bytes_in_bf16"], low, lambda a: a["weights"]["nbytes"]),
        beside(f"KV cache of {cache['tokens']} tokens", cache["bytes_in_bf16"], low, lambda a: a["cache"]["bytes"]),
        each("saturated: x, w, grad", low, lambda a: percents(mean_shares(a, "saturated"))),
        each("flushed to zero: x, w, grad", low, lambda a: percents(mean_shares(a, "flushed"))),
        Row("FP8 products a step", ["0", *(products(a) for a in low)]),
    ]  # fmt: skip
    if results["settings"]["device"].startswith("cuda"):
        told.append(Row("tokens a second, training", [f"{a['tokens_per_second']:,.0f}" for a in (high, *low)]))
    return told


def heads(results: dict[str, Any]) -> list[str]:
    """The columns' names."""
    return [high_name(results), *(f"FP8 {arm['name']}" for arm in results["arms"][1:])]


def high_name(results: dict[str, Any]) -> str:
    return results["settings"]["precision"].upper()


def loss_difference(arm: Arm, high: Arm) -> float:
    """The final validation loss against that of high precision, in percent."""
    return difference(arm["validation_loss"], high["validation_loss"])


def verdict(results: dict[str, Any]) -> str:
    """One sentence an FP8 arm: how far it is off, and whether that is within the limit."""
    high, *low = results["arms"]
    told = []
    for arm in low:
        off = loss_difference(arm, high)
        side = "above" if off > 0 else "below"
        within = "within" if abs(off) <= LIMIT else "NOT within"
        told.append(
            f"FP8 {arm['name']} ends {abs(off):.2f} % {side} {high_name(results)} ({within} {LIMIT} % of its loss)."
        )
    return " ".join(told)


def each(label: str, low: list[Arm], cell: Callable[[Arm], str]) -> Row:
    """A row that has no meaning in high precision."""
    return Row(label, [NONE, *(cell(arm) for arm in low)])


def beside(label: str, in_bf16: int, low: list[Arm], of: Callable[[Arm], int]) -> Row:
    """Bytes in BF16, and in FP8 with their share of it."""
    return Row(
        f"{label}, BF16 and FP8",
        [size(in_bf16), *(f"{size(of(arm))} ({100 * of(arm) / in_bf16:.0f} %)" for arm in low)],
    )


def size(count: int) -> str:
    """Bytes with the unit that reads well, decimal: 1.06 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count} B"


def steps(arm: Arm) -> str:
    return "not reached" if arm["steps_to_target"] is None else str(arm["steps_to_target"])


def mean_shares(arm: Arm, what: str) -> dict[str, float]:
    """A share by role, over all probes of the run."""
    seen = [shares(probe["layers"], what) for probe in arm["probes"]]
    return {role: sum(one[role] for one in seen) / len(seen) for role in seen[0]} if seen else {}


def percents(by_role: dict[str, float]) -> str:
    return ", ".join(percent(share) for share in by_role.values()) + " %" if by_role else NONE


def percent(share: float) -> str:
    """A share as a percentage: three decimals below 1 %, and 0 only where there was none."""
    return (
        "0"
        if share == 0
        else "<0.001"
        if share < 1e-5
        else f"{100 * share:.3f}"
        if share < 0.01
        else f"{100 * share:.1f}"
    )


def products(arm: Arm) -> str:
    counts = [count for layer in arm["products"].values() for count in layer.values()]
    return f"{sum(counts)} in {len(arm['products'])} layers"


# --------------------------------------------------------------------------- drawings


def drawing(results: dict[str, Any]) -> Table:
    """The table for a terminal."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("")
    for head in heads(results):
        out.add_column(head, justify="right", no_wrap=True)
    for row in rows(results):
        out.add_row(row.label, *row.cells)
    return out


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown, with the line that says what it was measured on."""
    lines = [
        ("", *heads(results)),
        ("---", *("---:" for _ in heads(results))),
        *((r.label, *r.cells) for r in rows(results)),
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{caption(results)}"


def threads(count: int) -> str:
    """
    >>> threads(1), threads(2)
    ('1 thread', '2 threads')
    """
    return f"{count} thread" + ("" if count == 1 else "s")


def caption(results: dict[str, Any]) -> str:
    """Model, data, machine, versions and command."""
    where, s = results["machine"], results["settings"]
    tokens = s["sequence_length"] * s["batch_size"] * s["gradient_accumulation"]
    since = " since it was resumed" if results.get("resumed") else ""
    memory = f", {results['peak_memory'] / 1e9:.1f} GB of memory" if results["peak_memory"] else ""
    return (
        f"A decoder of {results['parameters'] / 1e6:.1f} million parameters, {s['steps']} steps of {tokens:,} bytes of "
        f"Moby-Dick. {where['device']}, {threads(where['threads'])}, torch {where['torch']}, fp8 {where['fp8']}: "
        f"`{results['command']}`, {results['seconds']:.0f} s{since}{memory}."
    )
