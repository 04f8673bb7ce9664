"""A row in one launch to what the next product reads, for serving: norm, gate, or nothing, then codes and their scales.

`fused/norm` and `fused/activation` make, for training, both orientations and what a backward needs. A served step needs
neither; it has few rows, and each launch that it saves is two microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backends import Backend, choose, function, why_not_cuda, why_not_triton
from ...formats import Format
from ...quantize.record import Quantized
from ...tile import Tile

__all__ = [
    "BACKENDS", "Into", "add_norm_codes", "gated_codes", "gated_values", "norm_codes", "norm_values", "row_codes",
]  # fmt: skip

LONGEST = 16384  # columns that stay in registers


@dataclass(frozen=True)
class Into:
    """How a row is quantized: tiles "row" or "1x128", measured; or "tensor" with a given scale, FP32 [1, 1]."""

    format: Format
    tile: Tile
    power_of_two: bool = True
    scale: Tensor | None = None

    @property
    def mode(self) -> str | None:
        """The kernel's mode; None: it has none for this."""
        if self.scale is not None:
            return "given"
        return {"row": "row", "1x128": "group"}.get(str(self.tile))

    @property
    def joinable(self) -> bool:
        """Whether `cuda.joined_codes` makes such codes."""
        return self.mode is not None and self.format.name == "e4m3"


@dataclass(frozen=True)
class Request:
    """What a backend is asked."""

    device: torch.device
    rows: int
    width: int
    into: Into | None
    dtypes: tuple[torch.dtype, ...]  # of the rows, and of a norm's weight


def why_not(request: Request) -> str | None:
    """Why the kernels do not take a row; None when it does."""
    if request.width > LONGEST or (request.into is not None and request.into.mode is None):
        return f"it takes rows up to {LONGEST} and scales of rows, groups of 128, or given ones"
    return None


def _cuda(request: Request) -> str | None:
    reason = why_not_cuda(request.device) or why_not(request)
    return reason or function("fp8.fused.rows.cuda", "why_not")(request)


BACKENDS = (
    Backend("cuda", "a Hopper GPU and NVRTC; up to 64 rows", _cuda, "fp8.fused.rows.cuda"),
    Backend(
        "triton", "a Hopper GPU and Triton", lambda r: why_not_triton(r.device) or why_not(r), "fp8.fused.rows.triton"
    ),
    Backend("reference", "nothing", lambda request: None, "fp8.fused.rows.reference"),
)


def norm_codes(h: Tensor, weight: Tensor, eps: float, into: Into) -> Quantized:
    """The codes of the RMS norm, in BF16, of each row of h [T, K]."""
    return _choose("norm_codes", h, h.shape[1], into, weight)(h, weight, eps, into)


def add_norm_codes(h: Tensor, y: Tensor, weight: Tensor, eps: float, into: Into) -> tuple[Tensor, Quantized]:
    """h + y [T, K] in BF16, and the codes of its RMS norm: for many rows, whose product does not add h itself."""
    request = Request(h.device, len(h), h.shape[1], into, (h.dtype, weight.dtype))
    return choose("add_norm_codes", BACKENDS[1:], request).run(h, y, weight, eps, into)


def norm_values(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of each row of h [T, K], BF16."""
    return _choose("norm_values", h, h.shape[1], None, weight)(h, weight, eps)


def gated_codes(gate_up: Tensor, into: Into) -> Quantized:
    """The codes of silu(gate) * up, in BF16; both lie side by side, [T, 2 K]."""
    return _choose("gated_codes", gate_up, gate_up.shape[1] // 2, into)(gate_up, into)


def gated_values(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, BF16 [T, K]; both lie side by side, [T, 2 K]."""
    return _choose("gated_values", gate_up, gate_up.shape[1] // 2, None)(gate_up)


def row_codes(x: Tensor, into: Into) -> Quantized:
    """The codes of x [T, K]."""
    return _choose("row_codes", x, x.shape[1], into)(x, into)


def _choose(
    operation: str, x: Tensor, width: int, into: Into | None, weight: Tensor | None = None
) -> Callable[..., Any]:
    dtypes = (x.dtype,) if weight is None else (x.dtype, weight.dtype)
    return choose(operation, BACKENDS, Request(x.device, len(x), width, into, dtypes)).run
