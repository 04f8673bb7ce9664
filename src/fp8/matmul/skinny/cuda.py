"""The GPU's products of at most 16 rows: a stream of weights past the tensor core, started before their input is there.

What. `skinny.cu` says how. Beside the Triton kernel of this room it does three things that Triton cannot: each lane
reads from memory what it will itself multiply, so that nothing waits at a barrier; weights of the next product are
fetched while the one before still runs (programmatic dependent launch); and K is divided among the warps of one block,
so that no sums travel through memory. Codes become F16 numbers, exactly, and sums are FP32 throughout: closer to the
exact product than `promoted`, whose 128 products pass through an accumulator of 13 fraction bits.

Why at most 16 rows. x is read again for each unit of 32 rows of w: with 16 tokens that is half as much as w itself,
from the L2; with 64 it would be twice as much. `deterministic` engines may still ask for up to 64: a row's bits are
those that it has alone.

What was left out. A kernel of multiply-adds for a single row. It reads the same bytes; the tensor core does its work
here on seven empty columns, at no cost that memory would notice.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import nvrtc
from ...quantize.record import Quantized

SOURCE = "matmul/skinny/skinny.cu"
MOST_ROWS = 16
MULTIPROCESSORS = 132  # for which units are sized: a constant, as bits must not depend on the machine's count
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
    """Sixteens of rows a unit, warps that share K, steps in flight. Only `warps` enters the bits."""

    sixteens: int
    warps: int = 8
    stages: int = 4

    def shared(self, tokens: int) -> int:
        """Bytes of shared memory: the warps' sums, and the ring."""
        sums = 4 * self.warps * tokens * (16 * self.sixteens + 4)
        return sums + self.stages * (2 * self.sixteens + tokens // 8) * 32 * self.warps * 16


def busy(units: int) -> float:
    """The share of multiprocessors that have work, on average, when each does one unit after the other."""
    return units / (-(-units // MULTIPROCESSORS) * MULTIPROCESSORS)


def plan(cols: int, tokens: int = 8) -> Plan:
    """32 rows a unit, unless 16 divide the work better.

    >>> [plan(cols).sixteens for cols in (6144, 4096, 28672, 128256)]
    [1, 2, 2, 2]
    """
    wide = busy(-(-cols // 32)) >= busy(-(-cols // 16)) - 0.02
    sixteens = 2 if wide else 1
    stages = 6 if sixteens == 1 else 4
    while stages > 2 and Plan(sixteens, 8, stages).shared(tokens) > SHARED:
        stages -= 1
    return Plan(sixteens, 8, stages)


def why_not(x: Operand, w: Operand, most: int = MOST_ROWS) -> str | None:
    """Why the kernel does not multiply these, of those that the room takes at all; None when it does."""
    rows, depth = (x.codes if isinstance(x, Quantized) else x).shape
    if not 0 < rows <= most:
        return f"it takes 1 to {most} rows, not {rows}"
    return None if depth % 16 == 0 else "it takes K in multiples of 16"


def skinny(
    x: Operand, w: Operand, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    use: Plan | None = None, early: bool = True,
) -> Tensor:  # fmt: skip
    """`residual + RN(x w^T + bias)`, [M, N], for M up to 64, on CUDA; `use` and `early` are for measurements."""
    a, b = (q.codes if isinstance(q, Quantized) else q for q in (x, w))
    a = a.contiguous()
    (rows, depth), cols = a.shape, b.shape[0]
    tokens = max(8, 1 << (rows - 1).bit_length())
    use = use or plan(cols, tokens)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.device)
    fields = {"rows": rows, "cols": cols, "depth": depth}
    constants = {
        "R": use.sixteens, "TOKENS": tokens, "WARPS": use.warps, "STAGES": use.stages, "BF16": 1, "ALONG": 0,
        "BIAS": 0 if bias is None else 1 if bias.dtype == torch.bfloat16 else 2,
        "OUT32": int(out_dtype == torch.float32), "RESIDUAL": int(residual is not None), "ROW_X": 0, "ROW_W": 0,
    }  # fmt: skip
    if isinstance(x, Quantized) and isinstance(w, Quantized):
        fields |= dict(zip(("stride_xr", "stride_xk"), x.scale.stride(), strict=True), scale_x=x.scale.data_ptr())
        fields |= dict(zip(("stride_wr", "stride_wk"), w.scale.stride(), strict=True), scale_w=w.scale.data_ptr())
        constants |= {
            "BF16": 0, "ALONG": int(x.tile.cols > 0), "ROW_X": int(x.tile.rows == 1), "ROW_W": int(w.tile.rows == 1),
        }  # fmt: skip
    operands = Operands(
        x=a.data_ptr(), w=b.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(), out=out.data_ptr(), **fields,
    )  # fmt: skip
    blocks = min(-(-cols // (16 * use.sixteens)), torch.cuda.get_device_properties(a.device).multi_processor_count)
    nvrtc.launch(
        SOURCE, "skinny", tuple(constants.items()), a.device, blocks, 32 * use.warps, operands,
        shared=use.shared(tokens), early=early,
    )  # fmt: skip
    return out
