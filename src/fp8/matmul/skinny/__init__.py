"""Products of few rows, as decode makes them: `y [M, N] = x [M, K] · w [N, K]^T` with M up to 64, bias and residual.

Such a product is as fast as its weight can be read; everything is arranged around that (`triton.py`). It is a door of
its own, not a backend of `fp8.matmul`: there a row's bits must not depend on the size of its batch, and cuBLASLt, which
takes larger ones, adds in another order. Here they do not depend on M from 1 to 16 (`cuda.py`, FP32 sums), nor from 17
to 64 (`triton.py`, promoted).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends import Backend, choose, function, why_not_cuda, why_not_triton
from ...quantize.record import Quantized

__all__ = ["BACKENDS", "MOST_ROWS", "skinny", "why_not"]

MOST_ROWS = 64
Operand = Quantized | Tensor  # E4M3 codes, or BF16
TILES = {("row", "row"), ("row", "tensor"), ("tensor", "row"), ("tensor", "tensor"), ("1x128", "128x128")}


@dataclass(frozen=True)
class Request:
    """What a backend is asked."""

    device: torch.device
    x: Operand
    w: Operand


def why_not(x: Operand, w: Operand) -> str | None:
    """Why the kernels do not multiply these; None when they do."""
    a, b = (q.codes if isinstance(q, Quantized) else q for q in (x, w))
    if not 0 < a.shape[0] <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {a.shape[0]}"
    if a.shape[1] % 16 or not b.is_contiguous():
        return "it takes K in multiples of 16, and a contiguous weight"
    if isinstance(x, Quantized) and isinstance(w, Quantized):
        if (x.format.name, w.format.name) != ("e4m3", "e4m3"):
            return "it multiplies E4M3 by E4M3"
        return None if (str(x.tile), str(w.tile)) in TILES else f"it has no scales in tiles {x.tile} and {w.tile}"
    if isinstance(x, Tensor) and isinstance(w, Tensor) and x.dtype == w.dtype == torch.bfloat16:
        return None
    return "it multiplies codes by codes, or BF16 by BF16"


def _cuda(request: Request) -> str | None:
    x, w = request.x, request.w
    return why_not_cuda(request.device) or why_not(x, w) or function("fp8.matmul.skinny.cuda", "why_not")(x, w)


BACKENDS = (
    Backend("cuda", "a Hopper GPU and NVRTC; M up to 16", _cuda, "fp8.matmul.skinny.cuda"),
    Backend(
        "triton", "a Hopper GPU and Triton", lambda r: why_not_triton(r.device) or why_not(r.x, r.w),
        "fp8.matmul.skinny.triton",
    ),
    Backend("reference", "nothing", lambda r: None, "fp8.matmul.skinny.reference"),
)  # fmt: skip


def skinny(
    x: Operand,
    w: Operand,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + RN(x w^T + bias)`, `[M, N]` of `out_dtype`.

    x, w       both quantized in E4M3 (tiles "row" and "tensor", or "1x128" and "128x128"), or both BF16
    bias       [N], added in FP32 before the product's rounding
    residual   [M, N] of `out_dtype`, added after it, and rounded again

    The sum of an FP8 product is promoted, FP32 every 128 of K, or FP32 throughout where M is 16 or less.
    """
    device = x.codes.device if isinstance(x, Quantized) else x.device
    return choose("skinny", BACKENDS, Request(device, x, w)).run(x, w, out_dtype, bias, residual)
