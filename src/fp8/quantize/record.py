"""What quantizing gives: codes, the scales that bring them back, and which of them belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format
from ..tile import Tile


@dataclass(frozen=True)
class Statistics:
    """What quantizing did to a tensor. All are tensors of one element, so that asking costs no synchronization.

    amax          FP32, the largest finite magnitude of the input
    saturated     share of elements that were clipped to the largest code (0 to 1)
    flushed       share of elements that were not zero and became zero
    non_finite    how many elements were NaN or infinite
    """

    amax: Tensor
    saturated: Tensor
    flushed: Tensor
    non_finite: Tensor


@dataclass(frozen=True, eq=False)
class Quantized:
    """An FP8 tensor: `real = code * scale`.

    codes    torch.float8_e4m3fn or float8_e5m2, row-major, of the shape that was quantized
    scale    FP32, `tile.scale_shape(rows, cols)`; its strides are free (1x128 scales may lie column by column)
    tile     the elements that share a scale, in the tensor seen as [product of leading dimensions, last dimension]
    format   the row of the format table that the codes are in
    """

    codes: Tensor
    scale: Tensor
    tile: Tile
    format: Format
    statistics: Statistics | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def matrix(self) -> Tensor:
        """The codes as `[product of leading dimensions, last dimension]`."""
        return as_matrix(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scale.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`code * scale`, computed in FP32, then rounded to `dtype`. Exact in FP32 when the scale is a power of two."""
        codes = self.matrix
        return (codes.float() * spread(self.scale, self.tile, *codes.shape)).to(dtype).view(self.codes.shape)


def as_matrix(x: Tensor) -> Tensor:
    """A tensor as `[product of leading dimensions, last dimension]`; a scalar is 1 x 1."""
    if x.dim() == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if x.dim() > 2 and x.numel() else x.reshape(_rows(x), _cols(x))


def _cols(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def _rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def spread(scale: Tensor, tile: Tile, rows: int, cols: int) -> Tensor:
    """The scale of every element, `[rows, cols]` (or a shape that broadcasts to it)."""
    height, width = tile.shape(rows, cols)
    if scale.shape[0] > 1 and height > 1:
        scale = scale.repeat_interleave(height, 0)[:rows]
    if scale.shape[1] > 1 and width > 1:
        scale = scale.repeat_interleave(width, 1)[:, :cols]
    return scale


def room_for_scale(tile: Tile, rows: int, cols: int, device: torch.device) -> Tensor:
    """Room for the scales of a matrix; on a GPU those of 1x128 lie column by column, as cuBLASLt reads them."""
    down, across = tile.scale_shape(rows, cols)
    if str(tile) == "1x128" and device.type == "cuda":
        return torch.empty(across, down, dtype=torch.float32, device=device).t()
    return torch.empty(down, across, dtype=torch.float32, device=device)
