"""INT8 W8A8, the scheme that FP8 is held against: `y = x W^T + b` on whole numbers in [-127, 127].

    scale = amax / 127, one a row of x (a token) and one a row of W (a channel); 1 for a row of zeros
    code  = x / scale, rounded to nearest even
    y     = RN(RN32(RN32(sum of codes * scale of x) * scale of W) + b)

The sum is exact: INT32 on tensor cores, FP64 elsewhere, to the same number. Only for comparison: nothing here is fused,
and no file holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INT8_MAX = 127.0
ROWS = 32  # torch's integer product takes more than 16 rows, and multiples of 8 elsewhere


class Int8Linear(nn.Module):
    """x [..., K] to y [..., N], in the type of x."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantizes `weight` [N, K]."""
        super().__init__()
        codes, scale = int8_rows(weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """What the codes stand for; some models ask a layer for the type and place of its weight."""
        return self.codes.float() * self.scale

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of y, where it is not that of x."""
        codes, scale = int8_rows(x.reshape(-1, x.shape[-1]))
        y = int8_product(codes, self.codes).float() * scale * self.scale.t()
        y = y if self.bias is None else y + self.bias.float()
        return y.to(dtype or x.dtype).view(*x.shape[:-1], y.shape[-1])


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes `[R, K]`, rounded to nearest even, and FP32 scales `[R, 1]` of a matrix; a row of zeros has scale 1.

    >>> codes, scale = int8_rows(torch.tensor([[127.0, 0.5, -63.5]]))
    >>> codes.tolist(), scale.tolist()
    ([[127, 0, -64]], [[1.0]])
    """
    amax = x.float().abs().amax(1, keepdim=True)
    scale = torch.where(amax > 0, amax / INT8_MAX, torch.ones_like(amax))
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, K] @ b [N, K].T` of codes, exact: INT32 on a GPU, where K and N are multiples of 8, else FP64."""
    if a.device.type != "cuda" or b.shape[0] % 8 or b.shape[1] % 8:
        return a.double() @ b.double().t()
    rows = a.shape[0]
    full = a if rows >= ROWS else nn.functional.pad(a, (0, 0, 0, ROWS - rows))
    return torch._int_mm(full, b.t())[:rows]
