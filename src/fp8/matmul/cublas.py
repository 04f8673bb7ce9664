"""The product on Hopper's tensor cores, by cuBLASLt through torch.

What. `a [M, K] @ b [N, K].T` for the pairs of formats and tiles that cuBLASLt takes on Hopper; `why_not` says for which
others it does not, and the caller then goes to our own kernel.

    tiles                    through                          accumulation
    tensor x tensor          torch._scaled_mm                 fast, promoted
    row x row, row x tensor  torch._scaled_mm                 fast, promoted; the one scale is repeated for each row
    1x128 x 128x128          torch.nn.functional.scaled_mm    promoted
    128x128 x 1x128          torch.nn.functional.scaled_mm    promoted
    1x128 x 1x128            torch.nn.functional.scaled_mm    promoted

Memory layout. Hopper reads both operands with K last: `a` row-major and `b.T` column-major, which is `b` as it is
stored. Scales multiply (`real = code * scale`) on both sides. Row scales are [M, 1] and [1, N]. With scales along K,

    1x128      [M, K/128] lying column by column: strides (1, M)
    128x128    [L, N/128] lying column by column, L = K/128 rounded up to a multiple of 4; what is added is never used

That multiple of 4 is why `_scaled_mm` is not used here: it does not ask for the padding that cuBLASLt reads past, and
is silently wrong where K/128 is no multiple of 4.

Any shape. cuBLASLt wants K and N in multiples of 16 (128 under square tiles, and K under 1x128), and M in multiples of
8 with scales along K. Where a shape is not, codes are padded with zeros (and scales with ones) and the result is cut.
A zero adds nothing: the sum's bits do not change, unless the larger shape makes cuBLASLt choose another split of K.

The bias. The contract is `RN(acc * alpha)`, then the bias in FP32, then one rounding. cuBLASLt's own epilogue takes
the bias only in the output type, and its roundings are not documented; so with a bias the product is asked for in FP32
and the bias is added by a kernel of its own. That costs an extra pass; the layers of Llama-like models have no bias.

Nothing here reads a value from the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantize.record import Quantized
from ..tile import Tile
from .reference import finish

if TYPE_CHECKING:
    from . import Request

ROW, BLOCK, SQUARE, MX = Tile.of("row"), Tile.of("1x128"), Tile.of("128x128"), Tile.of("1x32")


def why_not(request: Request) -> str | None:
    """Why cuBLASLt cannot compute this product on Hopper; None when it can."""
    a, b = request.tile_a, request.tile_b
    if request.format_a == request.format_b == "e5m2":
        return "cuBLASLt multiplies no two E5M2 operands: at least one must be E4M3"
    if MX in (a, b):
        return "cuBLASLt takes 1x32 scales on Blackwell only"
    if a.constant_along_k and b.constant_along_k:
        return None
    if (a, b) not in ((BLOCK, SQUARE), (SQUARE, BLOCK), (BLOCK, BLOCK)):
        need = "it needs 1x128 on at least one side and scales along K on both"
        return f"cuBLASLt does not combine the tiles {a} and {b}: {need}"
    if "e5m2" in (request.format_a, request.format_b):
        return "torch passes cuBLASLt only E4M3 operands with scales along K"
    if request.accumulate == "fast":
        return "cuBLASLt always promotes with scales along K: ask for accumulate='promoted'"
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return (
            f"torch {torch.__version__} has no torch.nn.functional.scaled_mm, which scales along K need (torch >= 2.10)"
        )
    return None


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, accumulate: str, bias: Tensor | None) -> Tensor:
    """`a [M, K] @ b [N, K].T`, both row-major CUDA tensors. Returns `out_dtype` [M, N], contiguous."""
    (rows, depth), cols = a.codes.shape, b.codes.shape[0]
    if rows == 0 or cols == 0 or depth == 0:
        return finish(torch.zeros(rows, cols, device=a.codes.device), bias, out_dtype)
    product = _constant if a.tile.constant_along_k else _blocked
    y = product(a, b, out_dtype if bias is None else torch.float32, accumulate == "fast")
    y = y if y.shape == (rows, cols) else y[:rows, :cols].contiguous()
    return y if bias is None else finish(y, bias, out_dtype)


def _constant(a: Quantized, b: Quantized, dtype: torch.dtype, fast: bool) -> Tensor:
    """Scales that leave the sum: one for each operand, or one for each row of both."""
    left, right = _padded(a.codes, 1, 16), _padded(b.codes, 16, 16)
    scale_a, scale_b = a.scale, b.scale
    if ROW in (a.tile, b.tile):
        scale_a, scale_b = _one_each(scale_a, left.shape[0]), _one_each(scale_b, right.shape[0]).t()
    scale_a, scale_b = _aligned(scale_a), _aligned(scale_b)
    return torch._scaled_mm(  # type: ignore[attr-defined]
        left, right.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
    )


def _blocked(a: Quantized, b: Quantized, dtype: torch.dtype, fast: bool) -> Tensor:
    """Scales along K on both sides."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    assert not fast
    recipes = {BLOCK: ScalingType.BlockWise1x128, SQUARE: ScalingType.BlockWise128x128}
    left = _padded(a.codes, 128 if a.tile == SQUARE else 8, 128)
    right = _padded(b.codes, 128 if b.tile == SQUARE else 16, 128)
    return scaled_mm(
        left,
        right.t(),
        _along_k(a, left.shape[0]),
        recipes[a.tile],
        _along_k(b, right.shape[0]),
        recipes[b.tile],
        swizzle_a=SwizzleType.NO_SWIZZLE,
        swizzle_b=SwizzleType.NO_SWIZZLE,
        output_dtype=dtype,
    )


def _padded(codes: Tensor, row_multiple: int, col_multiple: int) -> Tensor:
    """The codes, row-major, with zeros up to the multiples; the tensor itself where nothing is missing."""
    missing_rows, missing_cols = -codes.shape[0] % row_multiple, -codes.shape[1] % col_multiple
    if missing_rows == missing_cols == 0:
        return codes.contiguous()
    return pad(codes.view(torch.uint8), (0, missing_cols, 0, missing_rows)).view(codes.dtype)


def _aligned(scale: Tensor) -> Tensor:
    """The scale at an address that is a multiple of 16: cuBLASLt refuses others. A compiled graph hands on one number
    out of a buffer where eager mode would have copied it."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def _one_each(scale: Tensor, rows: int) -> Tensor:
    """[rows, 1], contiguous: a scale for each row, ones for rows that were added."""
    return (scale.expand(rows, 1) if scale.shape[0] == 1 else _ones_below(scale, rows)).contiguous()


def _along_k(q: Quantized, rows: int) -> Tensor:
    """The scales in cuBLASLt's layout: [rows, K/128] with strides (1, rows), or [L, rows/128] with strides (1, L)."""
    scale = _ones_below(q.scale.t(), -(-q.scale.shape[1] // 4) * 4) if q.tile == SQUARE else _ones_below(q.scale, rows)
    return scale.t().contiguous().t().as_strided(scale.shape, (1, scale.shape[0]))  # also where there is one column


def _ones_below(scale: Tensor, rows: int) -> Tensor:
    """The matrix with rows of ones added up to `rows`; itself where none are missing."""
    missing = rows - scale.shape[0]
    return scale if missing == 0 else pad(scale, (0, 0, 0, missing), value=1.0)
