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
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import nvrtc
from ...quantize.record import Quantized

SOURCE = "matmul/skinny/skinny.cu"
MOST_ROWS = 16
MULTIPROCESSORS = 132  # for which units are sized: a constant, as bits must not depend on the machine's count
SHARED = 227 * 1024
MOST_PREPARED, LONGEST = 4, 8192  # rows and columns that each block may make codes of
Operand = Quantized | Tensor


class Operands(ctypes.Structure):
    """`struct Operands` of skinny.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "w", "scale_x", "scale_w", "bias", "residual", "out")],
        *[(name, ctypes.c_int) for name in ("rows", "cols", "depth")],
        *[(name, ctypes.c_int) for name in ("stride_xr", "stride_xk", "stride_wr", "stride_wk")],
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True)
class Plan:
    """Sixteens of rows a unit, warps that share K, steps in flight. Only `warps` enters the bits."""

    sixteens: int
    warps: int = 8
    stages: int = 4

    def shared(self, tokens: int, prepared: int = 0) -> int:
        """Bytes of shared memory: the warps' sums, the ring, and codes of `prepared` columns of four rows."""
        sums = 4 * self.warps * tokens * (16 * self.sixteens + 4)
        slots = 2 * self.sixteens + (0 if prepared else tokens // 8)
        codes = MOST_PREPARED * (prepared + 16) + 48 * self.warps + 16 if prepared else 0
        return sums + self.stages * slots * 32 * self.warps * 16 + codes


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
    fields, constants = {}, {"BF16": 1, "ALONG": 0, "ROW_X": 0, "ROW_W": 0, "PREPARED": 0}
    if isinstance(x, Quantized) and isinstance(w, Quantized):
        fields = {"stride_xr": x.scale.stride(0), "stride_xk": x.scale.stride(1), "scale_x": x.scale.data_ptr()}
        fields |= scales_of(w)
        constants |= {
            "BF16": 0, "ALONG": int(x.tile.cols > 0), "ROW_X": int(x.tile.rows == 1), "ROW_W": int(w.tile.rows == 1),
        }  # fmt: skip
    tokens = max(8, 1 << (len(a) - 1).bit_length())
    return _launch(a.contiguous(), b, tokens, out_dtype, bias, residual, fields, constants, use, early)


def prepared(
    x: Tensor, w: Quantized, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    norm: tuple[Tensor, float] | None = None, scale: Tensor | None = None, power_of_two: bool = True,
    use: Plan | None = None, early: bool = True,
) -> Tensor:  # fmt: skip
    """`skinny` of the codes of x, or of its RMS norm, in one launch, for at most four rows.

    x       BF16 [M, K], K up to `LONGEST`
    norm    its weight [K], BF16 or FP32, and epsilon
    scale   FP32 [1, 1]: the given scale of x; None: one a row is measured, a power of two or not

    The bits are those of `skinny` of the codes of `quantize` of the values of `fused/norm`. w has scales that are
    constant along K.
    """
    rows, depth = x.shape
    most = 1 << (rows - 1).bit_length()
    warps = (use or Plan(1)).warps
    fields = scales_of(w) | {"scale_x": None if scale is None else scale.data_ptr()}
    constants = {
        "BF16": 0, "ALONG": 0, "ROW_X": int(scale is None), "ROW_W": int(w.tile.rows == 1), "PREPARED": most,
        "NORM": int(norm is not None), "W32": 0, "POWER": int(power_of_two and scale is None),
        "VECTORS": -(-depth // (8 * 32 * warps)),
    }  # fmt: skip
    if norm is not None:
        fields |= {"norm": norm[0].data_ptr(), "eps": norm[1]}
        constants["W32"] = int(norm[0].dtype == torch.float32)
    return _launch(x.contiguous(), w.codes, 8, out_dtype, bias, residual, fields, constants, use, early)


def why_not_prepared(x: Tensor, w: Quantized) -> str | None:
    """Why `prepared` does not multiply these; None when it does."""
    if not 0 < x.shape[0] <= MOST_PREPARED or x.shape[1] > LONGEST or x.shape[1] % 16:
        return f"it takes 1 to {MOST_PREPARED} rows of up to {LONGEST} columns, in multiples of 16"
    if x.dtype != torch.bfloat16 or w.format.name != "e4m3" or not w.tile.constant_along_k:
        return "it takes BF16 rows, and E4M3 weights with a scale a row or one"
    return None


def scales_of(w: Quantized) -> dict[str, object]:
    return {"stride_wr": w.scale.stride(0), "stride_wk": w.scale.stride(1), "scale_w": w.scale.data_ptr()}


def _launch(
    x: Tensor, w: Tensor, tokens: int, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None,
    fields: Mapping[str, object], constants: Mapping[str, int], use: Plan | None, early: bool,
) -> Tensor:  # fmt: skip
    (rows, depth), cols = x.shape, w.shape[0]
    use = use or plan(cols, tokens)
    out = torch.empty(rows, cols, dtype=out_dtype, device=x.device)
    constants = {
        **constants, "R": use.sixteens, "TOKENS": tokens, "WARPS": use.warps, "STAGES": use.stages,
        "BIAS": 0 if bias is None else 1 if bias.dtype == torch.bfloat16 else 2,
        "OUT32": int(out_dtype == torch.float32), "RESIDUAL": int(residual is not None),
    }  # fmt: skip
    operands = Operands(
        x=x.data_ptr(), w=w.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(), out=out.data_ptr(),
        rows=rows, cols=cols, depth=depth, **fields,
    )  # fmt: skip
    blocks = min(-(-cols // (16 * use.sixteens)), torch.cuda.get_device_properties(x.device).multi_processor_count)
    nvrtc.launch(
        SOURCE, "skinny", tuple(constants.items()), x.device, blocks, 32 * use.warps, operands,
        shared=use.shared(tokens, depth if constants["PREPARED"] else 0), early=early,
    )  # fmt: skip
    return out
