"""The product of two FP8 matrices, as the definition.

    y [M, N] = a [M, K] · b [N, K]^T

**The sum.** `exact` adds the products of the codes without any rounding, in FP64, and rounds the sum once to FP32: the
same bits on every machine, with any number of threads, in any batch. That FP64 is exact needs an argument. E4M3 codes
are multiples of 2^-9 below 2^9, so products are multiples of 2^-18 below 2^18, and a sum of K = 2^17 of them has at
most 36 + 17 = 53 bits: nothing is lost, whatever the order. E5M2 spans 2^-16 to 2^16, which would be too wide, so an
E5M2 operand is split at magnitude 1 into two parts of narrower span (at and above 1: multiples of 2^-2; below 1:
multiples of 2^-16), each part's sum is exact. The sums of parts, and those of every 2^17 of a longer K, are added with
what each addition loses kept beside the total, and at the end the last bit is made odd where something is cut off, so
that the rounding to FP32 is the one of the exact sum. Two E5M2 operands make four parts.

`fp32` multiplies in FP32 with the library's own order of summation: faster, and not reproducible.

**The scales.** Two tensor scales: `y = RN32(acc * RN32(scale_a * scale_b))`. A row scale on either side: `RN32(RN32(acc
* scale_b) * scale_a)`, the order measured in cuBLASLt. Otherwise K is cut into blocks on which both scales are
constant, and `y = sum over blocks, ascending, in FP32, of (scale_a * scale_b) * partial`. With power-of-two scales the
order is the same to the bit. The bias is added in FP32, and one rounding gives the output type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..quantize.record import Quantized, spread
from ..tile import Tile

WIDEST_K = 1 << 17
Product = Callable[[Tensor, Tensor], Tensor]


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> Tensor:
    """`[M, N]` of `a [M, K]` and `b [N, K]`. `accumulate="fp32"` sums in FP32; any other word sums exactly."""
    if accumulate == "fp32":
        with torch.autocast(a.codes.device.type, enabled=False):
            total = scaled_sum(a, b, a.matrix.float(), b.matrix.float(), lambda x, y: x @ y.t())
    else:
        total = scaled_sum(a, b, parts(a.matrix), parts(b.matrix), product_exact)
    return finish(total, bias, out_dtype)


def scaled_sum(a: Quantized, b: Quantized, x: Tensor, y: Tensor, product: Product) -> Tensor:
    """The scaled sum over K in FP32. x and y are the codes as `product` wants them, K last; it gives the FP32 sum of
    one block."""
    if a.tile.constant_along_k and b.tile.constant_along_k:
        return apply_scales(product(x, y), a, b)
    total = torch.zeros(a.matrix.shape[0], b.matrix.shape[0], device=a.codes.device)
    for start, stop in k_blocks(a, b):
        partial = product(x[..., start:stop], y[..., start:stop])
        total += partial.mul_(alpha(scale_at(a, start), scale_at(b, start)))
    return total


def apply_scales(total: Tensor, a: Quantized, b: Quantized) -> Tensor:
    """The sum with scales that are constant along K, in the order of cuBLASLt: one scale each multiply first with each
    other; scales of rows multiply the sum one after the other, b's before a's."""
    if a.scale.numel() == b.scale.numel() == 1:
        return total * (a.scale * b.scale)
    return total * b.scale.t() * a.scale


def alpha(scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """The scale of a product, `[M or 1, N or 1]`, in FP32."""
    return scale_a * scale_b.t()


def k_blocks(a: Quantized, b: Quantized) -> list[tuple[int, int]]:
    """K cut where a scale of either operand changes."""
    k = a.matrix.shape[1]
    width = min(q.tile.shape(*q.matrix.shape)[1] for q in (a, b))
    return [(start, min(start + width, k)) for start in range(0, k, width)]


def scale_at(q: Quantized, column: int) -> Tensor:
    """The scales that hold at one column, `[rows, 1]` (or `[1, 1]`)."""
    rows, cols = q.matrix.shape
    scale = q.scale[:, column // q.tile.shape(rows, cols)[1]].unsqueeze(1)
    return spread(scale, Tile(q.tile.rows, 0), rows, 1)


def finish(total: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Bias in FP32, then one rounding to the output type."""
    return (total if bias is None else total + bias.float()).to(out_dtype)


# --------------------------------------------------------------------------- the exact sum


def parts(codes: Tensor) -> Tensor:
    """The codes [rows, K] in FP64, as `[1, rows, K]`; E5M2 as `[2, rows, K]`, large magnitudes and those below 1."""
    index = codes.contiguous().view(torch.uint8).flatten().int()
    tables = table(codes.dtype, codes.device)
    values = tables.new_empty(tables.shape[0], index.numel())
    for one, out in zip(tables, values, strict=True):
        torch.index_select(one, 0, index, out=out)
    return values.view(tables.shape[0], *codes.shape)


@cache
def table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of all 256 codes in FP64, `[parts, 256]`, each value in one part and 0 in the other: looking one up is
    faster than casting it."""
    x = torch.arange(256, dtype=torch.uint8, device=device).view(dtype).double()
    if dtype != torch.float8_e5m2:
        return x.unsqueeze(0)
    small = (x > -1) & (x < 1)
    return torch.stack([x.masked_fill(small, 0.0), x.masked_fill(~small, 0.0)])


def product_exact(x: Tensor, y: Tensor) -> Tensor:
    """The sum over K of the parts of two operands, `[parts, M, K]` and `[parts, N, K]`, rounded once to FP32."""
    pieces = [
        part_x @ part_y.t()
        for start in range(0, max(x.shape[2], 1), WIDEST_K)
        for part_x in x[..., start : start + WIDEST_K]
        for part_y in y[..., start : start + WIDEST_K]
    ]
    total, lost = pieces[0], None
    for piece in pieces[1:]:
        total, error = two_sum(total, piece)
        lost = error if lost is None else lost + error  # exact: few bits, far below the total
    if lost is not None:
        total = to_odd(total, lost) if len(pieces) == 2 else add_to_odd(total, lost)
    sums = total.float()
    if lost is not None and not sums.isfinite().all():  # an infinity met the zeros of the other operand's part
        sums = torch.where(sums.isfinite(), sums, (x.sum(0) @ y.sum(0).t()).float())
    return sums


def two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y in FP64, and exactly what its rounding lost (Knuth)."""
    total = x + y
    back = total - x
    error = y - back
    error += x - (total - back)
    return total, error


def add_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """x + y in FP64, rounded to odd: where bits were cut off, the last one kept is 1, so that no later rounding sees a
    tie that was none (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    return to_odd(*two_sum(x, y))


def to_odd(total: Tensor, error: Tensor) -> Tensor:
    """A rounded sum and what it lost (less than its last bit) as the sum rounded to odd."""
    inexact = error != 0
    if not inexact.any():
        return total
    bits = total.view(torch.int64)
    nudge = inexact & ((bits & 1) == 0) & total.isfinite()
    away = (error > 0) == (total > 0)
    return (bits + torch.where(away, 1, -1) * nudge).view(torch.float64)
