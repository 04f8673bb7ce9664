"""The product of two FP8 matrices, as the definition.

    y [M, N] = a [M, K] · b [N, K]^T

**The sum.** `exact` adds the products of the codes without any rounding, in FP64, and rounds the sum once to FP32: the same
bits on every machine, with any number of threads, in any batch. That FP64 is exact needs an argument. E4M3 codes are
multiples of 2^-9 below 2^9, so products are multiples of 2^-18 below 2^18, and a sum of K = 2^17 of them has at most
36 + 17 = 53 bits: nothing is lost, whatever the order. E5M2 spans 2^-16 to 2^16, which would be too wide, so an E5M2
operand is split at magnitude 1 into two parts of narrower span (at and above 1: multiples of 2^-2; below 1: multiples of 2^-16),
each part's sum is exact, and the parts are added with their last bit made odd where something was cut off, so that the
final rounding to FP32 is the one of the exact sum. Two E5M2 operands make four parts.

`fp32` multiplies in FP32 with the library's own order of summation: faster, and not reproducible.

**The scales.** Where both tiles are constant along K, `y = RN32(acc * RN32(scale_a * scale_b))`. Otherwise K is cut into blocks on
which both scales are constant and `y = sum over blocks, ascending, in FP32, of (scale_a * scale_b) * partial`. The bias is added in FP32,
and one rounding gives the output type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.record import Quantized, spread
from ..tile import Tile

WIDEST_K = 1 << 17


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> Tensor:
    """`[M, N]` of `a [M, K]` and `b [N, K]`. `accumulate="fp32"` sums in FP32; any other word sums exactly."""
    product = product_fp32 if accumulate == "fp32" else product_exact
    return finish(scaled_sum(a, b, product), bias, out_dtype)


def scaled_sum(a: Quantized, b: Quantized, product) -> Tensor:  # type: ignore[no-untyped-def]
    """The scaled sum over K in FP32; `product(codes_a, codes_b)` gives the FP32 sum of one block of K."""
    if a.tile.constant_along_k and b.tile.constant_along_k:
        return product(a.matrix, b.matrix) * alpha(a.scale, b.scale)
    total = torch.zeros(a.matrix.shape[0], b.matrix.shape[0], device=a.codes.device)
    for start, stop in k_blocks(a, b):
        partial = product(a.matrix[:, start:stop], b.matrix[:, start:stop])
        total += partial * alpha(scale_at(a, start), scale_at(b, start))
    return total


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


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().t()


def product_exact(a: Tensor, b: Tensor) -> Tensor:
    """The exact sum of products of codes, rounded once to FP32. K beyond 2^17 is summed exactly in parts."""
    if a.shape[1] <= WIDEST_K:
        return exact_sum(a, b).float()
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], WIDEST_K):
        total = add_to_odd(total, exact_sum(a[:, start : start + WIDEST_K], b[:, start : start + WIDEST_K]))
    return total.float()


def exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum in FP64: exact for E4M3 x E4M3, and for E5M2 as good as exact for any later rounding to 51 bits or fewer."""
    total = None
    for part_a in parts(a):
        for part_b in parts(b):
            partial = part_a @ part_b.t()
            total = partial if total is None else add_to_odd(total, partial)
    assert total is not None
    return total


def parts(codes: Tensor) -> list[Tensor]:
    """The codes in FP64; E5M2 as its large values and its small ones, each zero where the other is not."""
    x = codes.double()
    if codes.dtype != torch.float8_e5m2:
        return [x]
    small = x.abs() < 1
    return [torch.where(small, 0.0, x), torch.where(small, x, 0.0)]


def add_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """x + y in FP64, rounded to odd: where bits were cut off, the last one kept is 1, so that no later rounding sees a tie
    that was none (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    odd = torch.where((error != 0) & even & total.isfinite(), bits + torch.where(away, 1, -1), bits)
    return odd.view(torch.float64)
