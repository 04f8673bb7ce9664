"""Seconds of one product [M, K] x [N, K]^T, from its shape and the kind of its operands.

A kernel cuts the output into tiles and hands them to the multiprocessors in waves. The last wave is rarely full, and
each tile loses time while its pipeline fills and its results are written, as much as `fill` steps along K:

    waves   = ceil( ceil(M / tm) * ceil(N / tn) * split / multiprocessors )
    compute = waves * multiprocessors * 2 tm tn (K / split + fill) / (peak * efficiency(tile))
    seconds = start + max(compute, bytes / bandwidth) + split's own bytes

and the library takes the tile, and the split of K, that are fastest. So does this: the least over a short list. That
gives the three effects that decide whether a small layer gains: a wave that is not full, a K too short to hide
filling, and a product so small that only starting and reading count (decoding: M = 16).

`peak`, `fill` and `start` are fitted for each kind (`fit.py`). Left out: the order in which tiles are walked (L2
reuse), and power: the same product runs up to a third faster on a cool GPU, which no function of its shape can know.
`sustained` in the table carries the average of that for a step.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

from .rates import Rates

# Tiles that cuBLASLt's kernels have on Hopper (their names show it), and how near each comes to the peak: a small tile
# reads its operands more often for each product.
TILES: tuple[tuple[int, int, float], ...] = (
    (128, 256, 1.0),
    (256, 128, 1.0),
    (192, 192, 1.0),
    (128, 192, 0.97),
    (128, 128, 0.9),
    (64, 128, 0.7),
    (64, 64, 0.5),
)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SHORTEST = 512  # K that a split leaves to each worker
OPERAND_BYTES = {"bf16": 2.0}  # others: one byte


def seconds(m: int, n: int, k: int, kind: str, rates: Rates) -> float:
    """Predicted seconds of a product of `kind` with BF16 output, timed alone.

    kind   "bf16", "tensor fast", "tensor promoted", "row fast", "row promoted", "1x128 128x128" or "1x128 1x128"
    """
    row = rates.gemm[kind]
    possible = ways(m, n, k, row.fill, rates.multiprocessors, rates.copy, rates.kernel)
    compute = min(work / row.peak + more for work, more in possible)
    return row.start + max(compute, reading(m, n, k, kind) / rates.copy)


def reading(m: int, n: int, k: int, kind: str) -> float:
    """Bytes of both operands and the output, each once."""
    return OPERAND_BYTES.get(kind, 1.0) * (float(m) * k + float(n) * k) + 2.0 * m * n


@cache
def ways(
    m: int, n: int, k: int, fill: float, at_once: int, copy: float, kernel: float
) -> tuple[tuple[float, float], ...]:
    """What each tile and split of K costs: FLOPs of full waves at peak efficiency, and seconds beside them for the
    partial sums of a split. Only those that no other one beats in both."""
    found = sorted(
        (_split_seconds(m, n, split, copy, kernel), _work(m, n, k, fill, tile, split, at_once))
        for tile, split in product(TILES, SPLITS)
        if split == 1 or k >= split * SHORTEST
    )
    best, kept = math.inf, []
    for more, work in found:
        if work < best:
            best = work
            kept.append((work, more))
    return tuple(kept)


def _work(m: int, n: int, k: int, fill: float, tile: tuple[int, int, float], split: int, at_once: int) -> float:
    rows, cols, efficiency = tile
    waves = math.ceil(math.ceil(m / rows) * math.ceil(n / cols) * split / at_once)
    return waves * at_once * 2.0 * rows * cols * (k / split + fill) / efficiency


def _split_seconds(m: int, n: int, split: int, copy: float, kernel: float) -> float:
    """Writing FP32 partial sums, and reading them in one more kernel."""
    return 0.0 if split == 1 else 4.0 * m * n * (split + 1) / copy + kernel


def kind_of(recipe_kind: str, accumulate: str) -> str:
    """The name of a kind: blocked ones are always promoted."""
    return recipe_kind if recipe_kind in ("bf16", "1x128 128x128", "1x128 1x128") else f"{recipe_kind} {accumulate}"
