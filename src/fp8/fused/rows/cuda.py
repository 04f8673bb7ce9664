"""Rows to codes in CUDA C++, for the few rows of a decode step: a launch that costs its latency and no more.

What Triton's kernel beside this one cannot do: join the partitions of attention on the way (`joined_codes`), read the
norm's weight before the kernel before has ended, sum by fused FP64 operations, and share a long row among the blocks of
a cluster. `rows.cu` says how. Codes and scales are the reference's in bytes but for the gate's exponential, which is
the fast one, the instructions that Triton's takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import nvrtc
from ...quantize.record import Quantized
from ..both import readable
from .reference import ROW

if TYPE_CHECKING:
    from . import Into, Request

SOURCE = "fused/rows/rows.cu"
MOST_ROWS = 64
SHARED_BY = 8  # blocks of a row longer than `ALONE`, which has an exponential for each column
FEW = 16  # rows; where there are more, two blocks share one
ALONE = 8192
PRODUCERS = {"plain": 0, "norm": 1, "gated": 2, "joined": 3}
MODES = {"given": 0, "row": 1, "group": 2, "values": 3}


class Operands(ctypes.Structure):
    """`struct Operands` of rows.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "given", "codes", "scale")],
        ("stride_r", ctypes.c_int), ("stride_c", ctypes.c_int), ("eps", ctypes.c_float),
        ("stats", ctypes.c_void_p), ("lengths", ctypes.c_void_p), ("parts", ctypes.c_int),
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a decode step's attention leaves, a partition of the keys at a time.

    products   FP32 [S, KV, parts, GROUP, 128]: sums of weights times values
    stats      FP32 [S, KV, parts, GROUP, 2]: the reference of the weights' exponents, and their sum
    lengths    int32 [S]: keys; a sequence has ceil(length / size) partitions, size FEW up to a length of SHORT, then
               PART
    group      GROUP
    sizes      PART, FEW and SHORT by name
    """

    products: Tensor
    stats: Tensor
    lengths: Tensor
    group: int
    sizes: Mapping[str, int]

    @property
    def device(self) -> torch.device:
        return self.products.device

    @property
    def width(self) -> int:
        return self.products.shape[1] * self.group * 128

    def __len__(self) -> int:
        return len(self.lengths)


def why_not(request: Request) -> str | None:
    """Why the kernel does not take these rows, of those that the room takes at all; None when it does."""
    if request.rows > MOST_ROWS or request.width % 8:
        return f"it takes up to {MOST_ROWS} rows, of a multiple of 8 columns"
    if request.dtypes[0] != torch.bfloat16 or request.dtypes[-1] not in (torch.bfloat16, torch.float32):
        return "it takes BF16 rows, and a norm's weight in BF16 or FP32"
    return None if request.into is None or request.into.format.name == "e4m3" else "it makes E4M3"


def norm_codes(h: Tensor, weight: Tensor, eps: float, into: Into) -> Quantized:
    return _codes("norm", h, h.shape[1], into, readable(weight), eps)


def gated_codes(gate_up: Tensor, into: Into) -> Quantized:
    return _codes("gated", gate_up, gate_up.shape[1] // 2, into)


def row_codes(x: Tensor, into: Into) -> Quantized:
    return _codes("plain", x, x.shape[1], into)


def norm_values(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    _launch("norm", "values", h, h.shape[1], True, readable(weight), codes=y.data_ptr(), eps=eps)
    return y


def joined_codes(parts: Parts, into: Into) -> Quantized:
    """The codes of attention's result in BF16, [S, heads * 128]."""
    return _codes("joined", parts, parts.width, into)


def joined_values(parts: Parts) -> Tensor:
    """Attention's result in BF16, [S, heads * 128]."""
    y = torch.empty(len(parts), parts.width, dtype=torch.bfloat16, device=parts.device)
    _launch("joined", "values", parts, parts.width, True, None, codes=y.data_ptr())
    return y


def gated_values(gate_up: Tensor) -> Tensor:
    cols = gate_up.shape[1] // 2
    y = torch.empty(len(gate_up), cols, dtype=torch.bfloat16, device=gate_up.device)
    _launch("gated", "values", gate_up, cols, True, None, codes=y.data_ptr())
    return y


def _codes(
    producer: str, x: Tensor | Parts, cols: int, into: Into, weight: Tensor | None = None, eps: float = 0.0
) -> Quantized:
    rows, group = len(x), into.mode == "group"
    codes = torch.empty(rows, cols, dtype=into.format.dtype, device=x.device)
    across = -(-cols // 128) if group else 1
    scale = torch.empty(across, rows, device=x.device).t()  # groups lie column by column, as cuBLASLt reads them
    _launch(
        producer, str(into.mode), x, cols, into.power_of_two and into.scale is None, weight, codes=codes.data_ptr(),
        scale=scale.data_ptr(), given=None if into.scale is None else into.scale.data_ptr(), eps=eps,
        stride_r=scale.stride(0), stride_c=scale.stride(1),
    )  # fmt: skip
    return Quantized(codes, scale if group else scale.reshape(rows, 1), into.tile if group else ROW, into.format)


def _launch(
    producer: str, mode: str, x: Tensor | Parts, cols: int, power: bool, weight: Tensor | None, **operands: object
) -> None:
    if not len(x):
        return
    long = isinstance(x, Parts) or (cols > ALONE and producer != "norm")
    blocks = 1 if not long else SHARED_BY if isinstance(x, Parts) or len(x) <= FEW else 2
    constants = {
        "PRODUCER": PRODUCERS[producer], "MODE": MODES[mode], "POWER": int(power), "COLS": cols, "CLUSTER": blocks,
        "WARPS": min(16, -(-cols // ((256 if isinstance(x, Parts) else 512) * blocks))),
        "W32": int(weight is not None and weight.dtype == torch.float32),
    }  # fmt: skip
    if isinstance(x, Parts):
        constants |= {"GROUP": x.group, **x.sizes}
        operands |= {"stats": x.stats.data_ptr(), "lengths": x.lengths.data_ptr(), "parts": x.products.shape[2]}
        first = x.products
    else:
        first = readable(x)
    given = Operands(x=first.data_ptr(), weight=None if weight is None else weight.data_ptr(), **operands)
    nvrtc.launch(
        SOURCE, "rows", tuple(constants.items()), x.device, blocks * len(x), 32 * constants["WARPS"], given, early=True
    )
