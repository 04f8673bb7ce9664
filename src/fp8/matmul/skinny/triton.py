"""The GPU's products of few rows: W is read once, as fast as memory gives it, and the tensor core does the rest.

What. With M tokens a product does 2 M operations for a byte of W, and a GPU could do hundreds. So nothing counts but
bytes in flight. W is the side of the tensor core's instruction that has 64 rows, tokens are the other one, filled up to
16, 32 or 64: both operands are FP8 and go from memory to shared memory to the tensor core, and no register ever holds
a weight. (A kernel of multiply-adds has to convert each code first: at 4 TB/s that alone fills the ALUs.)

The mathematics, `promoted`: 128 of K at a time are multiplied from zero and added to an FP32 accumulator;

    row and tensor scales   acc += p;  y = RN(RN(acc * scale_w) * scale_x), or acc * RN(scale_x * scale_w)
    1x128 with 128x128      acc = fma(p, RN(scale_x * scale_w), acc)
    BF16                    the tensor core's own FP32 accumulator

then the bias, one rounding, the residual, another. An element's sum does not depend on M.

Split K. A narrow W has too few pieces of 64 rows to keep all multiprocessors busy, so K is cut as well, in `splits`
stretches that depend on N and K alone. Each program leaves its FP32 piece in memory; the last to arrive at a piece (a
ticket) adds all of them in ascending order, whichever was last, and puts the ticket back to zero. Tickets are one
buffer a device: products that run at the same time on two streams would mix them up. Engines use one.

What was left out. Fused quantization of x: its scale must be known before the first product, and x is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_launch
from ...quantize.record import Quantized
from ...triton_launch import ask_for, enter
from ..triton import _scale_at

PROGRAMS = 512  # about four a multiprocessor
LEAST = 4  # blocks of K a program, at least
TICKETS = 1 << 14
ASKED = tl.constexpr(8)  # lines of each row of W that are asked for before x is there
Operand = Quantized | Tensor


@dataclass(frozen=True)
class Plan:
    """Rows of W a program, columns of K a turn, stretches of K, warps, stages."""

    rows: int
    depth: int
    splits: int
    warps: int
    stages: int


def plan(cols: int, depth: int, fp8: bool) -> Plan:
    """From N and K alone: a row's bits depend on it.

    >>> plan(6144, 4096, True).splits, plan(28672, 4096, True).splits, plan(4096, 14336, True).splits
    (4, 1, 8)
    """
    block = 128 if fp8 else 64
    pieces, blocks = -(-cols // 64), -(-depth // block)
    most = max(1, min(PROGRAMS // pieces, blocks // LEAST))
    splits = max(s for s in range(1, most + 1) if blocks % s == 0)
    return Plan(64, block, splits, 4, 5)


@triton.jit
def _scaled(acc, scale_x, scale_w, n, m, start, TILE_X: tl.constexpr, TILE_W: tl.constexpr):
    """An accumulator [rows of W, tokens] with scales that are constant along K, in the order of the definition."""
    if TILE_X == 0 and TILE_W == 0:
        return acc * (tl.load(scale_x) * tl.load(scale_w))
    else:
        sw = tl.load(scale_w + n)[:, None] if TILE_W == 1 else tl.load(scale_w)
        sx = tl.load(scale_x + m)[None, :] if TILE_X == 1 else tl.load(scale_x)
        return acc * sw * sx


@triton.jit(do_not_specialize=["M"])
def skinny_rows(
    x_ptr, w_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, piece_ptr, ticket_ptr,
    M, N, K, stride_xr, stride_xk, stride_wr, stride_wk, span,
    FP8: tl.constexpr, TILE_X: tl.constexpr, TILE_W: tl.constexpr, ALONG: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DEPTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of w over `span` columns of K from program_id(1) * span on."""
    tile, split = tl.program_id(0), tl.program_id(1)
    first = split * span
    n, t = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    row, m = n % N, t % M
    k = first + tl.arange(0, DEPTH)
    w_at = w_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + m[:, None] * K + k[None, :]
    if AHEAD:
        LINE: tl.constexpr = 128 if FP8 else 64
        lines = first + tl.arange(0, ASKED) * LINE
        ask_for(w_ptr, row.to(tl.int64)[:, None] * K + tl.minimum(lines, K - LINE)[None, :], AHEAD)
        enter(AHEAD)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(first, tl.minimum(first + span, K), DEPTH):
        if WHOLE:
            w, x = tl.load(w_at, eviction_policy="evict_first"), tl.load(x_at)
        else:
            inside = (start + tl.arange(0, DEPTH) < K)[None, :]
            w, x = tl.load(w_at, mask=inside, other=0.0), tl.load(x_at, mask=inside, other=0.0)
        if not FP8:
            acc = tl.dot(w, x.T, acc)
        elif ALONG == 0:
            acc = acc + tl.dot(w, x.T)
        else:
            part = tl.dot(w, x.T)
            sw = _scale_at(scale_w_ptr, row, tile * ROWS, start, stride_wr, stride_wk, TILE_W, ALONG)
            sx = _scale_at(scale_x_ptr, m, 0, start, stride_xr, stride_xk, TILE_X, ALONG)
            acc = tl.fma(part, tl.broadcast_to((sx * sw)[None, :], (ROWS, TOKENS)), acc)
        w_at += DEPTH
        x_at += DEPTH
    last = True
    if SPLITS > 1:
        inner = tl.arange(0, ROWS)[:, None] * TOKENS + t[None, :]
        tl.store(piece_ptr + (tile * SPLITS + split) * (ROWS * TOKENS) + inner, acc)
        tl.debug_barrier()  # all of the program's stores come before its ticket
        last = tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            for s in range(SPLITS):
                acc += tl.load(piece_ptr + (tile * SPLITS + s) * (ROWS * TOKENS) + inner, cache_modifier=".cg")
            tl.store(ticket_ptr + tile, 0)
    if last:
        if FP8 and ALONG == 0:
            acc = _scaled(acc, scale_x_ptr, scale_w_ptr, row, m, 0, TILE_X, TILE_W)
        if BIAS:
            acc = acc + tl.load(bias_ptr + row).to(tl.float32)[:, None]
        at = t[None, :] * N + n[:, None]
        inside = (t < M)[None, :] & (n < N)[:, None]
        y = acc.to(out_ptr.dtype.element_ty)
        if RESIDUAL:
            there = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y = (there + y.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=inside)


def skinny(
    x: Operand, w: Operand, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    use: Plan | None = None,
) -> Tensor:  # fmt: skip
    """`reference.skinny` on CUDA. `use` replaces the plan, for measurements."""
    fp8 = isinstance(x, Quantized)
    a, b = (q.codes if isinstance(q, Quantized) else q for q in (x, w))
    (rows, depth), cols = a.shape, b.shape[0]
    use = use or plan(cols, depth, fp8)
    tokens = max(16, triton.next_power_of_2(rows))
    pieces, blocks = triton.cdiv(cols, use.rows), triton.cdiv(depth, use.depth)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.device)
    room, tickets = out, out
    if use.splits > 1:
        room = torch.empty(pieces * use.splits * use.rows * tokens, dtype=torch.float32, device=a.device)
        tickets = tickets_of(a.device)
    scales = (x.scale, w.scale) if isinstance(x, Quantized) and isinstance(w, Quantized) else (out, out)
    tile_x, tile_w = (q.tile.rows if isinstance(q, Quantized) else 0 for q in (x, w))
    skinny_rows[(pieces, use.splits)](
        a.contiguous(), b, out, *scales, out if bias is None else bias, out if residual is None else residual,
        room, tickets, rows, cols, depth, *scales[0].stride(), *scales[1].stride(),
        triton.cdiv(blocks, use.splits) * use.depth,
        FP8=fp8, TILE_X=tile_x, TILE_W=tile_w, ALONG=x.tile.cols if isinstance(x, Quantized) else 0,
        BIAS=bias is not None, RESIDUAL=residual is not None, SPLITS=use.splits,
        WHOLE=depth % use.depth == 0, ROWS=use.rows, TOKENS=tokens, DEPTH=use.depth, AHEAD=triton_launch.LAUNCH,
        launch_pdl=triton_launch.LAUNCH, num_warps=use.warps, num_stages=use.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@cache
def tickets_of(device: torch.device) -> Tensor:
    """Zeros, and zeros again after each launch."""
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)
