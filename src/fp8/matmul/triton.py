"""Our own FP8 product in Triton, for what cuBLASLt refuses on Hopper.

What. E5M2 x E5M2, 1x32 scales, and every pair of tiles that cuBLASLt does not combine (128x128 with 128x128, a row
with 1x128, ...). Plain rather than fastest: one program computes a 128 x 128 piece of the output with 8 warps, walking
over K.

The mathematics. Each turn of the loop multiplies BLOCK_K of K on the tensor cores, from zero, and adds the result to an
FP32 accumulator held in registers, which is what `promoted` means. BLOCK_K is 128, or 32 where a tile is 1x32. Then

    scales constant along K   acc = acc + p                        RN(acc * RN(scale_a * scale_b)); rows: b's, then a's
    scales along K            acc = fma(p, RN(scale_a * scale_b), acc)
    fast                      the tensor core's own accumulator runs over all of K (constant scales only)

and the bias is added in FP32 before the one rounding to the output type. The compiler is kept from contracting a
multiply and an add on its own (`enable_fp_fusion=False`): where they are fused, the source says so. So the bits are
those of `emulate.py` with `Fold(fused=True)`.

Memory layout. `a` [M, K] and `b` [N, K] row-major: both tiles are loaded with K contiguous, as the tensor core reads
FP8 from shared memory, and b's is transposed by its descriptor only. Rows beyond M or N are read from valid rows again
(modulo) and never stored; only a ragged end of K is masked. Programs that share rows of `a` run together (GROUP), so
that L2 serves them. A scale lies at [row // tile_rows, k // tile_cols] with free strides.

What was left out. TMA, persistence and fused epilogues: large products of ordinary tiles go to cuBLASLt. Pieces of
128 x 256: with an accumulator outside the tensor core they spill registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize.record import Quantized
from ..tile import Tile
from .reference import finish

if TYPE_CHECKING:
    from . import Request

MX = Tile.of("1x32")


def why_not(request: Request) -> str | None:
    """Why this kernel does not compute the product; None when it does."""
    constant = request.tile_a.constant_along_k and request.tile_b.constant_along_k
    if request.accumulate == "fast" and not constant:
        return "scales along K are always promoted: ask for accumulate='promoted'"
    return None


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> Tensor:
    """`a [M, K] @ b [N, K].T`, both row-major. Returns `out_dtype` [M, N], contiguous."""
    (rows, depth), cols = a.codes.shape, b.codes.shape[0]
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.codes.device)
    if rows == 0 or cols == 0:
        return out
    if depth == 0:
        return finish(out.float().zero_(), bias, out_dtype)
    block_m, block_n, block_k, warps, stages = pieces(rows, MX in (a.tile, b.tile))
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(cols, block_n),)
    _matmul_kernel[grid](
        a.codes.contiguous(),
        b.codes.contiguous(),
        out,
        a.scale,
        b.scale,
        out if bias is None else bias.contiguous(),
        rows,
        cols,
        depth,
        *_steps(a),
        *_steps(b),
        TILE_A=a.tile.rows,
        TILE_B=b.tile.rows,
        ALONG_A=a.tile.cols,
        ALONG_B=b.tile.cols,
        FAST=accumulate == "fast",
        BIAS=bias is not None,
        WHOLE_K=depth % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=warps,  # type: ignore[call-arg]
        num_stages=stages,  # type: ignore[call-arg]
        enable_fp_fusion=False,  # type: ignore[call-arg]
    )
    return out


def pieces(rows: int, mx: bool) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), from the shape alone.

    Never fewer than 64 rows: below, Triton leaves the warpgroup instruction for an older one with another accumulator,
    and a row's bits would depend on the size of its batch.
    """
    block_k, stages = (32, 6) if mx else (128, 4)
    if rows <= 64:
        return 64, 128, block_k, 4, stages
    return 128, 128, block_k, 8, stages


def _steps(q: Quantized) -> tuple[int, int]:
    """The strides of the scales; 0 along a dimension that has one scale."""
    down, across = q.scale.stride()
    return (0 if q.tile.rows == 0 else down), (0 if q.tile.cols == 0 else across)


@triton.jit
def _scale_at(scale, rows, start, k, stride_row, stride_k, TILE: tl.constexpr, ALONG: tl.constexpr):
    """The scales of a piece at column k: FP32 [rows] where each row has its own, else one: a piece is in one tile."""
    across = (k // ALONG) * stride_k if ALONG > 0 else 0
    if TILE == 1:
        return tl.load(scale + rows * stride_row + across)
    elif TILE == 0:
        return tl.load(scale + across)
    else:
        return tl.load(scale + start // TILE * stride_row + across)


@triton.jit
def _pair(sa, sb, TILE_A: tl.constexpr, TILE_B: tl.constexpr):
    """RN(scale_a * scale_b), in the least shape that broadcasts to the piece."""
    if TILE_A == 1 and TILE_B == 1:
        return sa[:, None] * sb[None, :]
    elif TILE_A == 1:
        return (sa * sb)[:, None]
    elif TILE_B == 1:
        return (sa * sb)[None, :]
    else:
        return sa * sb


@triton.jit
def _matmul_kernel(
    a,
    b,
    out,
    scale_a,
    scale_b,
    bias,
    M,
    N,
    K,
    stride_sa,
    stride_sak,
    stride_sb,
    stride_sbk,
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    ALONG_A: tl.constexpr,
    ALONG_B: tl.constexpr,
    FAST: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Which piece of the output: GROUP rows of pieces at a time, column by column.
    program = tl.program_id(0)
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    m0 = (first + program % (GROUP * across) % height) * BLOCK_M
    n0 = program % (GROUP * across) // height * BLOCK_N

    rows = (m0 + tl.arange(0, BLOCK_M)) % M
    cols = (n0 + tl.arange(0, BLOCK_N)) % N
    depth = tl.arange(0, BLOCK_K)
    a_at = a + rows.to(tl.int64)[:, None] * K + depth[None, :]
    b_at = b + cols.to(tl.int64)[:, None] * K + depth[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if WHOLE_K:
            left, right = tl.load(a_at), tl.load(b_at)
        else:
            inside = depth[None, :] < K - k
            left, right = tl.load(a_at, mask=inside, other=0.0), tl.load(b_at, mask=inside, other=0.0)
        if FAST:
            acc = tl.dot(left, right.T, acc)
        elif ALONG_A == 0 and ALONG_B == 0:
            acc = acc + tl.dot(left, right.T)
        else:
            part = tl.dot(left, right.T)
            sa = _scale_at(scale_a, rows, m0, k, stride_sa, stride_sak, TILE_A, ALONG_A)
            sb = _scale_at(scale_b, cols, n0, k, stride_sb, stride_sbk, TILE_B, ALONG_B)
            pair = tl.broadcast_to(_pair(sa, sb, TILE_A, TILE_B), (BLOCK_M, BLOCK_N))
            acc = tl.fma(part, pair, acc)
        a_at += BLOCK_K
        b_at += BLOCK_K

    if ALONG_A == 0 and ALONG_B == 0:
        sa = _scale_at(scale_a, rows, m0, 0, stride_sa, stride_sak, TILE_A, ALONG_A)
        sb = _scale_at(scale_b, cols, n0, 0, stride_sb, stride_sbk, TILE_B, ALONG_B)
        if TILE_A == 1 or TILE_B == 1:
            acc = acc * (sb[None, :] if TILE_B == 1 else sb)
            acc = acc * (sa[:, None] if TILE_A == 1 else sa)
        else:
            acc = acc * (sa * sb)
    if BIAS:
        acc = acc + tl.load(bias + cols).to(tl.float32)[None, :]
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)
