"""Into what a fused kernel writes its values: the codes of an operand of a product, in one orientation or in both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import why_not_cuda
from ..formats import Format, format_of
from ..quantize import reference
from ..tile import Tile

MODES = {"tensor": "measured", "row": "row", "1x128": "group"}


@dataclass(frozen=True)
class Target:
    """How the values [rows, cols] of a fused kernel are quantized.

    format, tile   as for `quantize`; tiles are "tensor", "row" and "1x128"
    power_of_two   the smallest power of two that fits, or amax / max
    scale          FP32 [1, 1]: quantize with this one (tile "tensor"); None: measure
    amax           FP32 [], with a given scale: raise this one instead of returning a new one
    """

    format: Format
    tile: Tile
    power_of_two: bool = True
    scale: Tensor | None = None
    amax: Tensor | None = None

    @property
    def mode(self) -> str:
        """The mode of the kernels: how the scale is found (`both.MODES`)."""
        return "given" if self.scale is not None else MODES[str(self.tile)]

    def with_scale(self, scale: Tensor | None) -> Target:
        return Target(self.format, self.tile, self.power_of_two, scale)


@dataclass(frozen=True)
class Codes:
    """What came out, as `run_quantize_both` gives it: what was not asked for is None.

    `keys_t` (int32 [cols], tile "row" only) holds the amaxes of the columns as FP32 bits with 0x00800000 added: from
    them, the transposed codes can be made later in one pass.
    """

    codes: Tensor | None
    scale: Tensor
    codes_t: Tensor | None
    scale_t: Tensor | None
    amax: Tensor
    keys_t: Tensor | None = None


def why_not_both(x: Tensor) -> str | None:
    """Why `both.cu` cannot read a matrix; None when it can."""
    if x.dtype != torch.bfloat16 or x.shape[0] % 16 or x.shape[1] % 16:
        return f"it takes BF16 in multiples of 16, not {str(x.dtype)[6:]} {tuple(x.shape)}"
    return why_not_cuda(x.device)


def quantized(x: Tensor, target: Target, down: bool = True, across: bool = True) -> Codes:
    """The reference: quantize a matrix of values that were made before."""
    codes, scale, codes_t, scale_t, amax = reference.quantize_both(
        x, target.scale, target.format, target.tile, target.power_of_two, None, amax=target.amax
    )
    keys_t = None
    if str(target.tile) == "row":
        finite = torch.where(x.isfinite(), x.float().abs(), 0.0)
        keys_t = finite.amax(0).view(torch.int32) + 0x00800000
    scale = scale if down or target.scale is not None else scale.new_empty(0, 0)
    return Codes(codes if down else None, scale, codes_t if across else None, scale_t if across else None, amax, keys_t)


# --------------------------------------------------------------------------- through an operator of torch
#
# Under torch.compile each operation is one opaque operator. It takes and returns tensors and plain data, none of them
# the same tensor twice: what is missing, or is another one, is empty.

Words = tuple[str, str, bool, Tensor | None]
Flat = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def to_words(target: Target) -> Words:
    return target.format.name, str(target.tile), target.power_of_two, target.scale


def of_words(format: str, tile: str, power_of_two: bool, scale: Tensor | None) -> Target:
    return Target(format_of(format), Tile.of(tile), power_of_two, scale)


def flat(out: Codes, target: Target) -> Flat:
    """The tensors of `out`, as an operator may return them."""
    spare = out.amax.new_empty(0)
    given, shared = target.scale is not None, str(target.tile) == "tensor"
    amax = out.amax.reshape(()).clone() if shared else spare
    each = (out.codes, None if given else out.scale, out.codes_t, None if shared else out.scale_t, amax, out.keys_t)
    return tuple(spare.clone() if t is None else t for t in each)  # type: ignore[return-value]


def of_flat(tensors: Flat, target: Target, down: bool = True, across: bool = True) -> Codes:
    """What `flat` was made of."""
    codes, scale, codes_t, scale_t, amax, keys_t = tensors
    shared = str(target.tile) == "tensor"
    scale = scale if target.scale is None else target.scale
    amax = amax if shared else scale
    turned = (codes_t, scale if shared else scale_t) if across else (None, None)
    return Codes(codes if down else None, scale, *turned, amax, keys_t if str(target.tile) == "row" else None)


def without_keys(tensors: Flat) -> Flat:
    """`flat` of transposed codes alone: the keys came in and do not go out."""
    return (*tensors[:5], tensors[4].new_empty(0))


def fake(like: Tensor, rows: int, cols: int, target: Target, down: bool = True, across: bool = True) -> Flat:
    """`flat` of a matrix [rows, cols], as shapes, types and strides alone."""
    spare = like.new_empty(0, dtype=torch.float32)
    codes = like.new_empty(rows, cols, dtype=target.format.dtype) if down else spare
    codes_t = like.new_empty(cols, rows, dtype=target.format.dtype) if across else spare
    shared = str(target.tile) == "tensor"
    measured = _fake_scale(like, target, rows, cols) if down else like.new_empty(0, 0, dtype=torch.float32)
    scale = spare if target.scale is not None else measured
    scale_t = spare if shared or not across else _fake_scale(like, target, cols, rows)
    amax = like.new_empty((), dtype=torch.float32) if shared else spare
    keys_t = like.new_empty(cols, dtype=torch.int32) if str(target.tile) == "row" else spare
    return tuple(t.clone() if t is spare else t for t in (codes, scale, codes_t, scale_t, amax, keys_t))  # type: ignore[return-value]


def _fake_scale(like: Tensor, target: Target, rows: int, cols: int) -> Tensor:
    shape = target.tile.scale_shape(rows, cols)
    if str(target.tile) == "1x128" and like.device.type == "cuda":
        return like.new_empty(shape[::-1], dtype=torch.float32).t()
    return like.new_empty(shape, dtype=torch.float32)
