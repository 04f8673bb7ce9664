"""How far a product may lie from the exact one: a bound for each element, computed from its own row and column.

What. `exact_product` is the real number that codes and scales stand for; `budget` bounds |y - exact| for a given way of
adding. A kernel whose error exceeds it has a defect; a wrong scale or a lost mantissa bit does exceed it.

The mathematics. *Roundings.* u = 2^-24 is FP32's relative rounding error. Every FP32 operation costs u times its
result: the sum itself, RN(scale_a * scale_b), their product, each addition of a chain or a block to the running total,
the bias; and the output type half its step, 2^-11 |y| in FP16 and 2^-8 |y| in BF16, at least half its smallest
subnormal.

*Truncations* (see `emulate.py`). Step j aligns 32 products and the running sum t to exponent E and cuts each below g =
2^(E - 13); the sum after it, t', is cut below h = 2^(E' - 13), E' its own exponent. No emulation is needed to bound
the exponents: with t exact and e the error so far,

    2^E <= max(2^(max_k e(a_k) + max_k e(b_k)), |t| + e)

For a step of n nonzero products whose magnitudes sum to A, nothing can exceed

    certain   e' = e + min(n g, A) + g [t != 0] + 2^-13 |t'|

and that is far above what happens, because cuts of opposite signs cancel. Let d be the number of positive less that of
negative products. d of the n cuts agree in sign and are charged in full; the cuts of t at their mean of half a grid.
What remains are n independent errors within +-g. By Hoeffding's inequality a sum of independent errors with ranges r_i
exceeds sqrt(ln(2 / q) / 2 sum r_i^2) with probability q at most. With q = 1e-9 shared by all M N outputs:

    likely    e = |sum (g d + (g sign(t) + h sign(t')) / 2)| + sqrt(ln(2 M N / 1e-9) / 2 sum (n (2g)^2 + g^2 + h^2))

`likely` assumes independence, so it is for data without structure, as in random tests; `certain` assumes nothing.

What was left out. NaN and infinities: compare those with the exact model. Overflow of the output type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantize.record import Quantized, spread
from .emulate import CHAIN, FRACTION_BITS, STEP, runs

ROUNDING = 2.0**-24 * 1.001  # FP32's relative error, with room for products of such errors
GRID = 2.0**-FRACTION_BITS
SHARE = 1e-9  # the probability that any element of one product exceeds `likely`
OUTPUT = {torch.float32: (0.0, 2.0**-150), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}


def exact_product(a: Quantized, b: Quantized, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T` (+ bias) of the dequantized numbers in FP64 (error near 1e-16 of the sum of magnitudes): [M, N]."""
    y = _real(a) @ _real(b).t()
    return y if bias is None else y + bias.double()


def budget(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype = torch.float32,
    accumulate: str = "exact",
    bias: Tensor | None = None,
    *,
    splits: int = 1,
    certain: bool = False,
) -> Tensor:
    """The bound on |y - exact_product| for `a [M, K]` and `b [N, K]`: FP64 [M, N].

    `accumulate` is "exact", "fp32", or "[hopper_]fast" or "[hopper_]promoted". The truncating models give the `likely`
    bound (see the essay) unless `certain`.
    """
    error = _Error.zero(a, b, certain)
    if accumulate in ("exact", "fp32"):
        total = _untruncated(error, a, b, accumulate == "fp32")
    else:
        total = _truncated(error, a, b, accumulate.endswith("promoted"), splits)
    inner = error.bound() + 2 * ROUNDING * total.abs()  # alpha, and its product with the sum
    exact = total
    if bias is not None:
        exact = total + bias.double()
        inner = inner + ROUNDING * (exact.abs() + inner)
    relative, tiniest = OUTPUT[out_dtype]
    return inner + relative * (exact.abs() + inner) + tiniest


@dataclass
class _Error:
    """What may have gone wrong so far: `sure` in full; `drift` with its sign; `ranges`, the sum of squared ranges."""

    certain: bool
    spread: float
    sure: Tensor
    drift: Tensor
    ranges: Tensor

    @staticmethod
    def zero(a: Quantized, b: Quantized, certain: bool) -> _Error:
        zero = torch.zeros(a.codes.shape[0], b.codes.shape[0], dtype=torch.float64, device=a.codes.device)
        return _Error(certain, math.log(2 * max(zero.numel(), 1) / SHARE) / 2, zero, zero, zero)

    def fresh(self) -> _Error:
        zero = torch.zeros_like(self.sure)
        return _Error(self.certain, self.spread, zero, zero, zero)

    def bound(self) -> Tensor:
        return self.sure + self.drift.abs() + (self.spread * self.ranges).sqrt()

    def add(self, other: _Error, scale: Tensor) -> None:
        self.sure = self.sure + other.sure * scale
        self.drift = self.drift + other.drift * scale
        self.ranges = self.ranges + other.ranges * scale**2


def _untruncated(error: _Error, a: Quantized, b: Quantized, fp32: bool) -> Tensor:
    """Blocks summed exactly (or in FP32, in any order) and rounded; the total, and its error into `error`."""
    total = torch.zeros_like(error.sure)
    for k in _blocks(a, b):
        x, y, scale = _values(a, k), _values(b, k), _scale(a, b, k)
        part, magnitude = (x @ y.t()) * scale, (x.abs() @ y.abs().t()) * scale
        total = total + part
        error.sure = error.sure + ROUNDING * (part.abs() + (total.abs() if k.start else 0.0))
        if fp32:
            error.sure = error.sure + ROUNDING * (k.stop - k.start) * magnitude
    return total


def _truncated(error: _Error, a: Quantized, b: Quantized, promoted: bool, splits: int) -> Tensor:
    """Chains, split-K workers and their FP32 sums; the total, and its error into `error`."""
    total = torch.zeros_like(error.sure)
    along = not (a.tile.constant_along_k and b.tile.constant_along_k)
    width = min(q.tile.cols or CHAIN for q in (a, b))
    for start, stop in runs(a.codes.shape[1], splits):
        worker = torch.zeros_like(total)
        length = width if promoted or along else stop - start
        for k in range(start, stop, length):
            part = slice(k, min(k + length, stop))
            chain, scale = error.fresh(), _scale(a, b, part)
            worker = worker + _chain(chain, a, b, part) * scale
            error.add(chain, scale)
            error.sure = error.sure + 2 * ROUNDING * worker.abs()
        total = total + worker
        error.sure = error.sure + ROUNDING * total.abs()
    return total


def _chain(error: _Error, a: Quantized, b: Quantized, part: slice) -> Tensor:
    """One chain of truncated steps over a part of K: its exact sum (codes, no scales), and its error into `error`."""
    total = torch.zeros_like(error.sure)
    for k in range(part.start, part.stop, STEP):
        step = slice(k, min(k + STEP, part.stop))
        x, y = _values(a, step), _values(b, step)
        after = total + x @ y.t()
        highest = _top(x, a.format.exponent_min)[:, None] * _top(y, b.format.exponent_min)
        reach = torch.maximum(highest, _binade(total.abs() + error.bound()))
        _cut(error, x, y, total, after, GRID * reach)
        total = after
    return total


def _cut(error: _Error, x: Tensor, y: Tensor, before: Tensor, after: Tensor, grid: Tensor) -> None:
    """The truncations of one step: of products, of the running sum before, and of the sum after."""
    terms = (x != 0).double() @ (y != 0).double().t()
    carried = grid * (before != 0)
    if error.certain:
        error.sure = error.sure + torch.minimum(terms * grid, x.abs() @ y.abs().t()) + carried
        error.sure = (error.sure + GRID * after.abs()) / (1 - GRID)
        return
    kept = GRID * _binade(after.abs() + error.bound())
    agreeing = x.sign() @ y.sign().t()
    error.drift = error.drift + agreeing * grid + (before.sign() * carried + after.sign() * kept) / 2
    error.ranges = error.ranges + terms * (2 * grid) ** 2 + carried**2 + kept**2


def _top(x: Tensor, lowest: int) -> Tensor:
    """2 to the largest alignment exponent of each row; 0 for a row of zeros."""
    exponent = (torch.frexp(x).exponent - 1).clamp_min(lowest)
    return torch.where(x == 0, 0.0, torch.exp2(exponent.double())).amax(1)


def _binade(x: Tensor) -> Tensor:
    """The power of two at or below x >= 0; 0 for 0."""
    return torch.where(x == 0, 0.0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1))


def _real(q: Quantized) -> Tensor:
    return q.codes.double() * spread(q.scale, q.tile, *q.codes.shape).double()


def _values(q: Quantized, k: slice) -> Tensor:
    return q.codes[:, k].double()


def _scale(a: Quantized, b: Quantized, k: slice) -> Tensor:
    """scale_a * scale_b over a part of K on which both are constant: FP64 [M, N], or what broadcasts to it."""
    left, right = (spread(q.scale, q.tile, *q.codes.shape).double() for q in (a, b))
    left, right = (s[:, k.start : k.start + 1] if s.shape[1] > 1 else s for s in (left, right))
    return left * right.t()


def _blocks(a: Quantized, b: Quantized) -> list[slice]:
    depth = a.codes.shape[1]
    width = min(q.tile.shape(*q.codes.shape)[1] for q in (a, b))
    return [slice(k, min(k + width, depth)) for k in range(0, depth, width)]
