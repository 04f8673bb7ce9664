"""Rows to codes, as the definition: the values of `fused/norm` or `fused/activation` in BF16, then `quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quantize import run_quantize
from ...quantize.record import Quantized
from ...tile import Tile
from ..activation import reference as activation
from ..norm import reference as norm

ROW = Tile(1, 0)

if TYPE_CHECKING:
    from . import Into


def norm_codes(h: Tensor, weight: Tensor, eps: float, into: Into) -> Quantized:
    return row_codes(norm_values(h, weight, eps), into)


def norm_values(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.values(h, norm.rstd_of(h, eps), weight, torch.bfloat16)


def add_norm_codes(h: Tensor, y: Tensor, weight: Tensor, eps: float, into: Into) -> tuple[Tensor, Quantized]:
    total = h + y
    return total, norm_codes(total, weight, eps, into)


def gated_codes(gate_up: Tensor, into: Into) -> Quantized:
    return row_codes(activation.values(gate_up, "silu", True), into)


def gated_values(gate_up: Tensor) -> Tensor:
    return activation.values(gate_up, "silu", True)


def row_codes(x: Tensor, into: Into) -> Quantized:
    given = None if into.scale is None else into.scale.expand(x.shape[0], 1).contiguous()
    tile = into.tile if given is None else ROW
    codes, scale, _ = run_quantize(x.contiguous(), given, into.format, tile, into.power_of_two and given is None)
    return Quantized(codes, scale, tile, into.format)
