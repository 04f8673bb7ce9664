"""The four studies as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

Plain = Mapping[str, Any]


def table(*columns: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", no_wrap=True)
    return out


def spread(estimate: Plain, form: str = "{:.1%}") -> str:
    """A value and its interval.

    >>> spread({"value": 0.5, "low": 0.4, "high": 0.6})
    '50.0% (40.0% to 60.0%)'
    """
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    ends = "one window" if low is None else f"{form.format(low)} to {form.format(high)}"
    return f"{form.format(value)} ({ends})"


def agreement(told: Plain) -> Table:
    out = table("greedy, against BF16", "first difference: median", "mean", "never differ", "equal tokens",
                "first token equal")  # fmt: skip
    for name, arm in told["arms"].items():
        places = [spread(arm[f"first_difference_{which}"], "{:.1f}") for which in ("median", "mean")]
        shares = [spread(arm[which]) for which in ("never_differ", "equal_tokens", "first_token_equal")]
        out.add_row(name, *places, *shares)
    return out


def perplexity(told: Plain) -> Table:
    edges = [f"{row['from']}+" for row in next(iter(told["arms"].values()))["buckets"]]
    out = table(f"{told['windows']} windows of {told['window']}", "perplexity", "against BF16 cache", "same top token",
                *edges)  # fmt: skip
    for name, arm in told["arms"].items():
        each = [f"{row['rise_percent']['value']:+.2f} %" for row in arm["buckets"]]
        share = f"{arm['agrees']['value']:.1%}"
        out.add_row(name, f"{arm['perplexity']['value']:.3f}", spread(arm["rise_percent"], "{:+.2f} %"), share, *each)
    for name, pair in told["pairs"].items():
        each = [f"{row['rise_percent']['value']:+.2f} %" for row in pair["buckets"]]
        out.add_row(name, "", spread(pair["rise_percent"], "{:+.2f} %"), f"{pair['agrees']['value']:.1%}", *each)
    return out


def needles(told: Plain) -> Table:
    lengths = told["retrieval"]["lengths"]
    out = table(f"needles found, of {told['retrieval']['prompts']}", *lengths, f"difference at {list(lengths)[-1]}")
    last = list(lengths.values())[-1]
    for name in last:
        cells = [spread(lengths[length][name]["found"]) for length in lengths]
        out.add_row(name, *cells, spread(last[name]["difference"], "{:+.1%}"))
    return out


def long_keys(told: Plain) -> Table:
    out = table("keys, cache", "format: median, max", "kernel: median, max", "total: median, max",
                "format / budget: median, max", "of the kernel's bound")  # fmt: skip
    for count, kinds in told["keys"].items():
        for name, row in kinds.items():
            cells = [f"{row[what]['median']:.2%}, {row[what]['max']:.2%}" for what in ("format", "kernel", "total")]
            ratio = f"{row['of_budget']['median']:.2f}, {row['of_budget']['max']:.2f}"
            out.add_row(f"{int(count):,} {name}", *cells, ratio, f"{row['bound_share']:.2f}")
    return out
