"""Perplexity of a real text by position, with keys and values in several caches, all else in BF16.

A window of T tokens begins with an empty cache, and the loss at position p is that of p tokens of context. Windows do
not overlap, so every arm is charged the same mixture of short and long contexts; `edges` cut the positions into
buckets. An arm is held against the BF16 cache window by window (`intervals.ratio_mean`): the text's own spread cancels,
and what is left is the cache. `null` is BF16 once more with other chunks, whose sums run in another order: smaller
differences than its own mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ...evaluate.intervals import Estimate, ratio_mean
from .caches import CONTROL, HIGH, KINDS, Calibration, arms
from .forced import Forced, forced

NULL = "bf16, other chunks"
PAIRS = (("e5m2", "e4m3"), ("e4m3, full keys", "e4m3"), ("e4m3, key offsets", "e4m3"), ("e4m3, static", "e4m3"))


def buckets(length: int) -> list[int]:
    """Where buckets of positions begin, and the end: powers of two from 128.

    >>> buckets(1024)
    [0, 128, 256, 512, 1024]
    """
    return [0, *(1 << i for i in range(7, 40) if 1 << i < length), length]


def percent(nats: Estimate) -> Estimate:
    """A difference of losses, in nats a token, as a rise of perplexity in percent."""
    return nats.map(lambda d: 100 * math.expm1(d))


def rise(base: Forced, arm: Forced, start: int, stop: int) -> Estimate:
    """By how many percent an arm's perplexity is above the base's, over the targets of some positions."""
    off = (arm.losses.double() - base.losses.double())[:, start:stop]
    return percent(ratio_mean(off.sum(1).tolist(), [stop - start] * len(off)))


def agrees(base: Forced, arm: Forced, start: int, stop: int) -> Estimate:
    """The share of positions at which both find the same token likeliest."""
    same = (arm.best == base.best)[:, start:stop].sum(1).tolist()
    return ratio_mean([float(n) for n in same], [stop - start] * len(same))


def told(base: Forced, arm: Forced, edges: Sequence[int]) -> dict[str, Any]:
    """What is told of an arm: whole windows, then buckets."""
    whole, length = arm.losses.double().sum(1).tolist(), edges[-1]
    loss = ratio_mean(whole, [length] * len(whole))
    rows = [
        {"from": a, "to": b, "rise_percent": rise(base, arm, a, b).to_dict(), "agrees": agrees(base, arm, a, b).value}
        for a, b in pairwise(edges)
    ]
    return {
        "perplexity": loss.map(math.exp).to_dict(), "rise_percent": rise(base, arm, 0, length).to_dict(),
        "agrees": agrees(base, arm, 0, length).to_dict(), "clipped": arm.clipped, "buckets": rows,
        "nats": [round(x, 5) for x in whole],
    }  # fmt: skip


def perplexity(
    model: Any,
    rows: Tensor,
    calibration_texts: Tensor,
    *,
    kinds: Sequence[str] | None = None,
    chunk: int = 512,
    at_once: int = 1 << 13,
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Force windows, tokens [windows, T + 1], through a served model with each kind of cache ("bf16" among them), and,
    where all kinds are asked for, the null."""  # fmt: skip
    calibration = Calibration.of(model, calibration_texts)
    found: dict[str, Forced] = {}
    for name, arm in arms(model, calibration, kinds).items():
        found[name] = forced(arm, rows, at_once=at_once, chunk=chunk)
        say(f"{name}: perplexity {math.exp(float(found[name].losses.mean())):.4f}")
    if kinds is None or len(kinds) == len(KINDS):
        plain = arms(model, calibration, [HIGH])[HIGH]
        found[NULL] = forced(plain, rows, at_once=at_once // 2, chunk=max(1, chunk // 2))
    edges = buckets(rows.shape[1] - 1)
    against = {f"{a} against {b}": told(found[b], found[a], edges) for a, b in PAIRS if {a, b} <= found.keys()}
    for row in against.values():
        del row["nats"]
    return {
        "window": rows.shape[1] - 1, "windows": len(rows), "chunk": chunk, "control": CONTROL,
        "arms": {name: told(found[HIGH], arm, edges) for name, arm in found.items()}, "pairs": against,
    }  # fmt: skip
