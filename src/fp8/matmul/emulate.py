"""Hopper's FP8 accumulator, bit for bit, in plain torch.

What. A Hopper tensor core does not add products in FP32. It adds 32 of them at a time into an accumulator that keeps
13 fraction bits and drops the rest. On zero-mean data nobody notices; where all terms share a sign, the dropped bits
share it too, and the sum drifts towards zero (7 % at K = 4096). This file computes that sum exactly as the hardware
does, so that a laptop can show what a training step or a served token would contain.

The mathematics. One step takes 32 products p_k = a_k b_k and the running total t:

    e_k = e(a_k) + e(b_k)          exponents of the factors; a subnormal factor counts as its format's smallest normal
    E   = max(e_k over p_k != 0, exponent of t)          the common alignment
    s   = sum_k trunc(p_k / g) + trunc(t / g)            g = 2^(E - 13): towards zero, then added exactly
    t'  = trunc13(s g)                                   13 fraction bits below its own exponent; an exact zero is +0

|p_k| < 2^(E + 2), so every term of s is an integer below 2^15 and s itself is below 2^21: integer arithmetic, exact in
any order, and `trunc` is the float-to-integer conversion. With its 13 fraction bits t is an FP32 number at all times,
and trunc13 is a mask on its bits.

From steps to a matrix product:

    fast        one chain of steps over all of K, from +0
    promoted    a new chain every 128 of K; the chains' results are added in FP32, ascending, round to nearest
    split K     the 128-wide slices of K are dealt to S workers in contiguous runs of ceil(slices / S); each worker sums
                its run as above, and the S results are added in FP32 in order
    blocks      with scales along K, each block's chain is scaled and folded into an FP32 total (`Fold`)

then the scales in cuBLASLt's order (`apply_scales` and `Fold`), the bias in FP32, and one rounding to the output type.

What was shown, on an H200 with cuBLASLt 13.1, over whole outputs: `docs/numerics.md` has the list.

A NaN code makes its whole row or column NaN. E5M2's infinities follow IEEE: Inf * 0 and Inf - Inf are NaN. NaN payloads
are not modelled: compare NaN with NaN.

Memory layout. Operands are turned to [K, M] and [K, N], so that a step is 32 planes of [m, n]: the broadcast products
stream along n, and the reduction over planes vectorizes. Outputs are cut into tiles (`AREA`) to keep those planes in a
CPU's cache, or below some 300 MiB on a GPU.

What was left out. Whether cuBLASLt splits K, and into how many runs, is a heuristic of library, GPU and workspace, not
arithmetic. It did so for few outputs and K above 4096 only; `splits` says how many, and by default there is one.
Accumulators of other chips. Speed beyond what tests need.

Source: Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (ACM TACO 2026, arXiv:2512.07004) for the
aligned, truncated sum; the `mmaemu` package for Hopper's constants and its split K. The tests hold this file to that
package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import format_of
from ..quantize.record import Quantized
from .reference import add_to_odd, apply_scales, finish

STEP = 32  # products the tensor core adds at once
CHAIN = 128  # of K between two moves to FP32 when promoted; also the width of a split's slice
FRACTION_BITS = 13
AREA = {"cpu": 1 << 15, "cuda": 1 << 20}  # outputs computed together

_LOWEST = -28  # twice E5M2's smallest normal exponent: no product is aligned lower
_ZERO = -64  # exponent of a zero factor: below every sum of two real ones, and two of them fit in int8


@dataclass(frozen=True)
class Fold:
    """How one block's partial sum p enters the FP32 total: t + p * (scale_a * scale_b).

    `fused`: one rounding for multiply and add. `order`: which product is rounded first: "pair" is
    p * RN(scale_a * scale_b), "a" is RN(p * scale_a) * scale_b, "b" is RN(p * scale_b) * scale_a. With power-of-two
    scales every choice gives the same bits. `of` tells what cuBLASLt does.
    """

    fused: bool = True
    order: Literal["pair", "a", "b"] = "pair"

    @staticmethod
    def of(a: Quantized, b: Quantized) -> Fold:
        """Measured: always fused; 1x128 scales on both sides multiply a's first, a 128x128 one on either the pair."""
        return Fold(order="a" if a.tile.rows == b.tile.rows == 1 else "pair")


@dataclass(frozen=True)
class _Factor:
    """One operand, K first: finite values, and each value's alignment exponent."""

    values: Tensor  # [K, rows] FP32
    exponents: Tensor  # [K, rows] int8

    @staticmethod
    def of(codes: Tensor) -> _Factor:
        values = codes.t().float().nan_to_num(0.0, 0.0, 0.0)
        values = pad(values, (0, 0, 0, -values.shape[0] % STEP)).contiguous()
        lowest = format_of(codes.dtype).exponent_min
        exponents = (torch.frexp(values).exponent - 1).clamp_min(lowest)
        return _Factor(values, exponents.masked_fill(values == 0, _ZERO).to(torch.int8))

    def rows(self, part: slice) -> _Factor:
        return _Factor(self.values[:, part], self.exponents[:, part])


def accumulate(codes_a: Tensor, codes_b: Tensor, promoted: bool, splits: int = 1) -> Tensor:
    """The accumulator after all of K, before any scale.

    `codes_a` [M, K] and `codes_b` [N, K] are E4M3 or E5M2 tensors on one device, K last; K is padded with zeros to a
    multiple of 32. Returns FP32 [M, N]. `splits` is the number of split-K workers.
    """
    total = _over_tiles(codes_a, codes_b, lambda a, b, _m, _n: _summed(a, b, promoted, splits))
    return total + _non_finite(codes_a, codes_b)


def accumulate_blocks(a: Quantized, b: Quantized, fold: Fold | None = None, splits: int = 1) -> Tensor:
    """The sum over K of scaled blocks, for operands of which at least one has scales along K.

    A block is 128 of K, or 32 where a tile is 1x32. Returns FP32 [M, N], scales applied.
    """
    width = min(q.tile.cols or CHAIN for q in (a, b))
    scale_a, scale_b = _scales(a, width), _scales(b, width)

    def summed(fa: _Factor, fb: _Factor, m: slice, n: slice) -> Tensor:
        return _folded(fa, fb, scale_a[:, m, None], scale_b[:, None, n], width, fold or Fold.of(a, b), splits)

    return _over_tiles(a.codes, b.codes, summed) + _non_finite(a.codes, b.codes)


def matmul(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype,
    accumulate: str,
    bias: Tensor | None,
    *,
    splits: int = 1,
    fold: Fold | None = None,
) -> Tensor:
    """`a [M, K] @ b [N, K].T` as Hopper computes it; `accumulate` is "hopper_fast" or "hopper_promoted".

    Scales along K are always promoted, as in cuBLASLt. `splits`: the workers of split K. Returns `out_dtype` [M, N].
    """
    if a.tile.constant_along_k and b.tile.constant_along_k:
        total = _accumulate(a.codes, b.codes, accumulate == "hopper_promoted", splits)
        total = apply_scales(total, a, b)
    else:
        total = accumulate_blocks(a, b, fold, splits)
    return finish(total, bias, out_dtype)


_accumulate = accumulate  # `matmul` has an argument of that name


def fused_multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """RN32(x * y + z), one rounding, for FP32 tensors: in FP64 the product is exact, and the sum is rounded to odd."""
    return add_to_odd(x.double() * y.double(), z.double()).float()


def _over_tiles(codes_a: Tensor, codes_b: Tensor, compute) -> Tensor:
    """`compute(factor_a, factor_b, rows, columns)` on each tile of the output; +0 where K is empty."""
    out = torch.zeros(codes_a.shape[0], codes_b.shape[0], dtype=torch.float32, device=codes_a.device)
    if codes_a.shape[1] == 0:
        return out
    a, b = _Factor.of(codes_a), _Factor.of(codes_b)
    for m, n in _tiles(out.shape[0], out.shape[1], AREA[out.device.type]):
        out[m, n] = compute(a.rows(m), b.rows(n), m, n)
    return out


def _tiles(rows: int, cols: int, area: int) -> Iterator[tuple[slice, slice]]:
    width = min(cols, max(256, int(area**0.5)))
    height = max(1, area // max(width, 1))
    for m in range(0, rows, height):
        for n in range(0, cols, max(width, 1)):
            yield slice(m, m + height), slice(n, n + width)


def _summed(a: _Factor, b: _Factor, promoted: bool, splits: int) -> Tensor:
    """A tile of `accumulate`: the workers' sums, added in order."""
    depth, total = a.values.shape[0], _zeros(a, b)
    for start, stop in runs(depth, splits):
        length, worker = CHAIN if promoted else stop - start, _zeros(a, b)
        for k in range(start, stop, length):
            worker += _chain(a, b, k, min(k + length, stop))
        total += worker
    return total


def runs(depth: int, splits: int) -> list[tuple[int, int]]:
    """Each worker's run of K: whole 128-wide slices, contiguous; workers left without a slice are dropped."""
    slices = -(-depth // CHAIN)
    run = -(-slices // splits) * CHAIN
    return [(start, min(start + run, depth)) for start in range(0, depth, run)]


def _folded(a: _Factor, b: _Factor, scale_a: Tensor, scale_b: Tensor, width: int, fold: Fold, splits: int) -> Tensor:
    """A tile of `accumulate_blocks`: `scale_a` [blocks, m, 1], `scale_b` [blocks, 1, n]."""
    depth, total = a.values.shape[0], _zeros(a, b)
    for start, stop in runs(depth, splits):
        worker = _zeros(a, b)
        for k in range(start, stop, width):
            part = _chain(a, b, k, min(k + width, stop))
            worker = _fold(worker, part, scale_a[k // width], scale_b[k // width], fold)
        total += worker
    return total


def _fold(total: Tensor, part: Tensor, scale_a: Tensor, scale_b: Tensor, fold: Fold) -> Tensor:
    if fold.order == "pair":
        first, second = part, scale_a * scale_b
    else:
        near, far = (scale_a, scale_b) if fold.order == "a" else (scale_b, scale_a)
        first, second = part * near, far
    return fused_multiply_add(first, second, total) if fold.fused else total + first * second


def _chain(a: _Factor, b: _Factor, start: int, stop: int) -> Tensor:
    """One chain of steps from +0 over K in [start, stop): FP32 [m, n]."""
    total = _zeros(a, b)
    for k in range(start, stop, STEP):
        total = _step(total, a, b, slice(k, k + STEP))
    return total


def _zeros(a: _Factor, b: _Factor) -> Tensor:
    return a.values.new_zeros(a.values.shape[1], b.values.shape[1])


def _step(total: Tensor, a: _Factor, b: _Factor, k: slice) -> Tensor:
    """32 products and the total, aligned, truncated, added, truncated."""
    aligned = (a.exponents[k, :, None] + b.exponents[k, None, :]).amax(0).to(torch.int32).clamp_min(_LOWEST)
    own = ((total.view(torch.int32) >> 23) & 0xFF) - 127
    top = torch.maximum(aligned, own)
    per_unit, unit = _power_of_two(FRACTION_BITS - top), _power_of_two(top - FRACTION_BITS)
    products = (a.values[k, :, None] * b.values[k, None, :]).mul_(per_unit).to(torch.int32)  # towards zero
    units = products.sum(0, dtype=torch.int32) + (total * per_unit).to(torch.int32)
    kept = (units.float() * unit).view(torch.int32) & -(1 << (23 - FRACTION_BITS))
    return kept.view(torch.float32)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _scales(q: Quantized, width: int) -> Tensor:
    """A scale for each block of `width` along K and each row: FP32 [blocks, rows], ready to index by block."""
    rows, depth = q.codes.shape
    height, wide = q.tile.shape(rows, depth)
    blocks = -(-depth // width)
    across = torch.arange(blocks, device=q.scale.device) * width // wide
    down = torch.arange(rows, device=q.scale.device) // height
    return q.scale[down][:, across].t().contiguous()


def _non_finite(codes_a: Tensor, codes_b: Tensor) -> Tensor:
    """What to add to the finite sum: 0, or the infinity or NaN that IEEE gives: FP32 [M, N], or a single zero.

    Counts the terms of each kind by products of small integers: exact, and never a multiplication by infinity.
    """
    a, b = codes_a.double(), codes_b.double()  # which torch.autocast leaves alone
    if a.isfinite().all() and b.isfinite().all():
        return torch.zeros((), device=a.device)
    (infinite_a, finite_a), (infinite_b, finite_b) = _signs(a), _signs(b)
    net = infinite_a @ (finite_b + infinite_b).t() + finite_a @ infinite_b.t()
    count = infinite_a.abs() @ (finite_b + infinite_b).abs().t() + finite_a.abs() @ infinite_b.abs().t()
    invalid = infinite_a.abs() @ (b == 0).double().t() + (a == 0).double() @ infinite_b.abs().t()
    invalid = (invalid > 0) | (net.abs() < count) | a.isnan().any(1)[:, None] | b.isnan().any(1)[None, :]
    infinite = torch.where(count > 0, net * torch.inf, 0.0).nan_to_num(0.0, torch.inf, -torch.inf)
    return infinite.masked_fill(invalid, torch.nan).float()


def _signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of the infinite, and of the finite, elements; 0 elsewhere."""
    sign = x.nan_to_num(0.0, 1.0, -1.0).sign()
    return torch.where(x.isinf(), sign, 0.0), torch.where(x.isfinite(), sign, 0.0)
