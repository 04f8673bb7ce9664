"""The GPU's products of at most 16 rows: a stream of weights past the tensor core, started before their input is there.

What. `skinny.cu` says how. Beside the Triton kernel of this room it does three things that Triton cannot: each lane
reads from memory what it will itself multiply, so that nothing waits at a barrier; weights of the next product are
fetched while the one before still runs (programmatic dependent launch); and K is divided among the warps of one block,
so that no sums travel through memory. Codes become F16 numbers, exactly, and sums are FP32 throughout: closer to the
exact product than `promoted`, whose 128 products pass through an accumulator of 13 fraction bits.

Why at most 16 rows. A lane holds the sums of all tokens, and x passes through every multiprocessor: with 64 tokens it
would be as much as w itself.

What was left out. A kernel of multiply-adds for a single row: it reads the same bytes; the tensor core does its work
here on seven empty columns, at no cost that memory would notice. And a product that makes the codes of its rows itself,
as every block would: on an H200 that took 2.5 us more, as much as a launch of its own (`fused/rows`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import nvrtc
from ...quantize.record import Quantized

SOURCE = "matmul/skinny/skinny.cu"
MOST_ROWS = 16
MULTIPROCESSORS = 132  # for which units are sized: a constant, as plans must not depend on the machine's count
SHARED = 227 * 1024
Operand = Quantized | Tensor


class Operands(ctypes.Structure):
    """`struct Operands` of skinny.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "w", "scale_x", "scale_w", "bias", "residual", "out")],
        *[(name, ctypes.c_int) for name in ("rows", "cols", "depth")],
        *[(name, ctypes.c_int) for name in ("stride_xr", "stride_xk", "stride_wr", "stride_wk")],
    )


@dataclass(frozen=True)
class Plan:
    """Sixteens of rows a unit, warps that share K, steps in flight, whether x is kept. Only `warps` enters the bits."""

    sixteens: int
    warps: int = 16
    stages: int = 3
    keep: bool = False

    def shared(self, tokens: int, depth: int) -> int:
        """Bytes of shared memory, for rows of `depth` bytes: the warps' sums, and the rings of w and of x."""
        sums = 4 * self.warps // 2 * tokens * (16 * self.sixteens + 4)
        slots = self.stages * 2 * self.sixteens
        slots += (-(-depth // (64 * self.warps)) if self.keep else self.stages) * (tokens // 8)
        return sums + slots * 32 * self.warps * 16


def busy(units: int) -> float:
    """The share of multiprocessors that have work, on average, when each does one unit after the other."""
    return units / (-(-units // MULTIPROCESSORS) * MULTIPROCESSORS)


def plan(cols: int, depth: int, tokens: int = 8) -> Plan:
    """For a weight of `cols` rows of `depth` bytes.

    Units of 32 rows, unless 48 or 16 divide the work better by a tenth; then three steps in flight, or two where there
    is no room, with x kept where a multiprocessor reads it more than once.

    >>> [plan(cols, 4096).sixteens for cols in (6144, 4096, 28672, 1024)]
    [3, 2, 2, 1]
    """
    sixteens = max((2, 3, 1), key=lambda r: round(busy(-(-cols // (16 * r))), 1))
    again = -(-cols // (16 * sixteens)) > MULTIPROCESSORS
    plans = [Plan(sixteens, stages=stages, keep=keep) for keep in (True, False) for stages in (3, 2)]
    return next(p for p in plans if p.keep <= (again and p.stages > 2) and p.shared(tokens, depth) <= SHARED)


def why_not(x: Operand, w: Operand) -> str | None:
    """Why the kernel does not multiply these, of those that the room takes at all; None when it does."""
    rows, depth = (x.codes if isinstance(x, Quantized) else x).shape
    if not 0 < rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    return None if depth % 16 == 0 else "it takes K in multiples of 16"


def skinny(
    x: Operand, w: Operand, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    use: Plan | None = None, early: bool = True,
) -> Tensor:  # fmt: skip
    """`residual + RN(x w^T + bias)`, [M, N], on CUDA; `use` and `early` are for measurements."""
    a, b = (q.codes if isinstance(q, Quantized) else q for q in (x, w))
    (rows, depth), cols = a.shape, b.shape[0]
    a, tokens = a.contiguous(), 8 if rows <= 8 else 16
    size = b.element_size()
    use = use or plan(cols, depth * size, tokens)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.device)
    scales, constants = scales_of(x, w)
    constants |= {
        "R": use.sixteens, "TOKENS": tokens, "WARPS": use.warps, "STAGES": use.stages, "KEEP": int(use.keep),
        "BIAS": 0 if bias is None else 1 if bias.dtype == torch.bfloat16 else 2,
        "OUT32": int(out_dtype == torch.float32), "RESIDUAL": int(residual is not None),
    }  # fmt: skip
    operands = Operands(
        x=a.data_ptr(), w=b.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(), out=out.data_ptr(),
        rows=rows, cols=cols, depth=depth, **scales,
    )  # fmt: skip
    blocks = min(-(-cols // (16 * use.sixteens)), torch.cuda.get_device_properties(a.device).multi_processor_count)
    nvrtc.launch(
        SOURCE, "skinny", tuple(constants.items()), a.device, blocks, 32 * use.warps, operands,
        shared=use.shared(tokens, depth * size), early=early,
    )  # fmt: skip
    return out


def scales_of(x: Operand, w: Operand) -> tuple[Mapping[str, int], dict[str, int]]:
    """Where the scales of both lie, and what is compiled in for them."""
    if not (isinstance(x, Quantized) and isinstance(w, Quantized)):
        return {}, {"BF16": 1, "ALONG": 0, "ROW_X": 0, "ROW_W": 0}
    where = {"scale_x": x.scale.data_ptr(), "stride_xr": x.scale.stride(0), "stride_xk": x.scale.stride(1)}
    where |= {"scale_w": w.scale.data_ptr(), "stride_wr": w.scale.stride(0), "stride_wk": w.scale.stride(1)}
    along, row_x, row_w = x.tile.cols > 0, x.tile.rows == 1, w.tile.rows == 1
    return where, {"BF16": 0, "ALONG": int(along), "ROW_X": int(row_x), "ROW_W": int(row_w)}
