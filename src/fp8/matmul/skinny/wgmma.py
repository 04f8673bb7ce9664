"""The GPU's FP8 products of 17 to 64 rows: every multiprocessor keeps its slice of x and sends its slice of w past it.

What. `wgmma.cu` says how. At so many rows x is as much of a burden as w: Triton's kernel of this room reads it again
for every 64 rows of w, which at 64 tokens is as much as w itself, and leaves the sums of its splits in memory. Here the
blocks of a cluster divide K, each reads its slice of x once, and they hand each other their sums through shared memory.

The mathematics are `promoted`, as in `triton.py`: 128 of K at a time from zero, then FP32 sums, those of a slice of K
first. How K is sliced depends on N and K, never on M.

What was left out: scales along K and BF16, which Triton's kernel has; and N that is no multiple of 64.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import nvrtc
from ...quantize.record import Quantized

SOURCE = "matmul/skinny/wgmma.cu"
ROWS = range(17, 65)
BLOCKS = 128  # of 132 multiprocessors: those that whole clusters of four and of eight find room on
SHARED = 227 * 1024
Operand = Quantized | Tensor


class Operands(ctypes.Structure):
    """`struct Operands` of wgmma.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "w", "scale_x", "scale_w", "bias", "residual", "out")],
        *[(name, ctypes.c_int) for name in ("rows", "cols", "depth")],
    )


@dataclass(frozen=True)
class Plan:
    """Slices of K (blocks of a cluster), warpgroups a block, steps in flight. Only `slices` enters the bits."""

    slices: int
    groups: int
    stages: int = 8

    def shared(self, tokens: int, depth: int) -> int:
        """Bytes of shared memory: a slice of x, a tile of sums and a ring of steps for each warpgroup."""
        return tokens * depth // self.slices + self.groups * (4 * tokens * 68 + self.stages * 64 * 128)

    def rounds(self, cols: int) -> int:
        """Tiles of 64 rows that a warpgroup has, one after the other."""
        return -(-cols // (64 * self.groups * (BLOCKS // self.slices)))

    def busy(self, cols: int) -> float:
        """The share of `BLOCKS` that have work, on average."""
        return cols / 64 / (self.rounds(cols) * self.groups * (BLOCKS // self.slices))


def plan(cols: int, depth: int, tokens: int = 64) -> Plan | None:
    """The slices and warpgroups that keep most multiprocessors busy, of those for which there is room; None: no room.

    >>> [(p.slices, p.groups) for n, k in ((6144, 4096), (28672, 4096), (4096, 14336)) if (p := plan(n, k))]
    [(4, 3), (4, 2), (8, 2)]
    """
    fit = [
        p for s in (4, 8, 2) for g in (2, 3, 4, 1)
        if depth % (128 * s) == 0 and (p := Plan(s, g, 3)).shared(max(ROWS), depth) <= SHARED
    ]  # fmt: skip
    if not fit:
        return None
    best = max(fit, key=lambda p: round(p.busy(cols), 2))
    stages = (SHARED - best.shared(tokens, depth)) // (best.groups * 64 * 128) + 3
    return Plan(best.slices, best.groups, min(8, stages))


def why_not(x: Operand, w: Operand) -> str | None:
    """Why the kernel does not multiply these, of those that the room takes at all; None when it does."""
    if not (isinstance(x, Quantized) and isinstance(w, Quantized)) or x.tile.cols:
        return "it multiplies codes with scales that are constant along K"
    (rows, depth), cols = x.codes.shape, w.codes.shape[0]
    if rows not in ROWS:
        return f"it takes {ROWS.start} to {ROWS.stop - 1} rows, not {rows}"
    if cols % 64 or plan(cols, depth) is None:
        return "it takes N in multiples of 64, K in multiples of 256, and K up to some 20 000"
    return None


def skinny(
    x: Quantized, w: Quantized, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    use: Plan | None = None, early: bool = True,
) -> Tensor:  # fmt: skip
    """`residual + RN(x w^T + bias)`, [M, N], on CUDA; `use` and `early` are for measurements."""
    (rows, depth), cols = x.codes.shape, w.codes.shape[0]
    codes, tokens = x.codes.contiguous(), max(8, 1 << (rows - 1).bit_length())
    use = use or plan(cols, depth, tokens)
    assert use is not None
    out = torch.empty(rows, cols, dtype=out_dtype, device=codes.device)
    constants = {
        "TOKENS": tokens, "GROUPS": use.groups, "STAGES": use.stages, "CLUSTER": use.slices,
        "BIAS": 0 if bias is None else 1 if bias.dtype == torch.bfloat16 else 2,
        "OUT32": int(out_dtype == torch.float32), "RESIDUAL": int(residual is not None),
        "ROW_X": int(x.tile.rows == 1), "ROW_W": int(w.tile.rows == 1),
    }  # fmt: skip
    operands = Operands(
        x=codes.data_ptr(), w=w.codes.data_ptr(), scale_x=x.scale.data_ptr(), scale_w=w.scale.data_ptr(),
        bias=None if bias is None else bias.data_ptr(), residual=None if residual is None else residual.data_ptr(),
        out=out.data_ptr(), rows=rows, cols=cols, depth=depth,
    )  # fmt: skip
    clusters = min(BLOCKS // use.slices, -(-cols // (64 * use.groups)))
    nvrtc.launch(
        SOURCE, "skinny", tuple(constants.items()), codes.device, clusters * use.slices, 128 * use.groups, operands,
        shared=use.shared(tokens, depth), early=early,
    )  # fmt: skip
    return out
