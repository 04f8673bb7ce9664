"""Residual add and RMS norm, as the definition.

    h     = x + branch                          rounded to the type of x
    rstd  = 1 / sqrt(RN32(mean of h^2) + eps)   the mean in FP64; root and division IEEE, in FP32: [T]
    y     = RN32(h * rstd) * weight             FP32, then rounded to the values' type

    dx    = residual gradient + rstd * (weight * dy - n * mean(weight * dy * n)),   n = h * rstd
    dw    = sum over tokens of dy * n

The mean in FP64 makes y independent of the order of the sum (but for one row in 2^29 / K), so that y is equal in bytes
on every machine. Means in the backward are FP32 sums: their last bits depend on the order.

Source: Zhang and Sennrich, "Root mean square layer normalization", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..target import Codes, Target, quantized


def add(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else (x.float() + branch.float()).to(x.dtype)


def rstd_of(h: Tensor, eps: float) -> Tensor:
    mean = h.double().square().mean(1).float()
    root = (mean + eps).double().sqrt().float()  # torch's own FP32 root is not always the nearest
    return 1.0 / root


def values(h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm [T, K] of the residual stream h [T, K]."""
    return (h.float() * rstd[:, None] * weight.float()).to(dtype)


def norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, target: Target | None
) -> tuple[Tensor, Tensor, Tensor | Codes]:
    """`(h, rstd, y)`: y as values of `dtype`, or as the codes that `target` describes."""
    h = add(x, branch)
    rstd = rstd_of(h, eps)
    y = values(h, rstd, weight, dtype)
    return h, rstd, y if target is None else quantized(y, target, across=False)


def norm_across(
    h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype, target: Target, keys_t: Tensor | None
) -> Codes:
    """The transposed codes of the norm, made again from what its forward left."""
    return quantized(values(h, rstd, weight, dtype), target, down=False)


def norm_backward(
    dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(dx [T, K] of the type of h, dw [K] of that of the weight)`."""
    n = h.float() * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - n * (g * n).mean(1, keepdim=True))
    dx = dx if residual is None else residual.float() + dx
    return dx.to(h.dtype), (dy.float() * n).sum(0).to(weight.dtype)
