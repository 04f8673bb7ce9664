"""Migration: an input channel that is large is divided by a factor, and its column of the weight multiplied by it.

    y = x W^T = (x / s) (s W)^T,        s_j  =  max|x_j|^alpha / max|w_j|^(1 - alpha)        (SmoothQuant)

The division goes into what made x: the weight of the norm before, or the rows of the layer before. alpha says how much
of the difficulty moves to the weight; it is searched for each group of layers that share an input, by the error that is
measured, and a group stays as it is unless its error falls by a hundredth.

**Factors are powers of two**, which E4M3 prefers for a reason that INT8 does not know. A float's error is relative: a
channel that is divided by two loses nothing and gains nothing as long as it stays within the 15 binades of normal
numbers. So migration can help only at the ends of the range, where whole binades count; and a power of two is folded
into BF16 weights without rounding any of them, so that the model in high precision keeps every bit.

Sources: SmoothQuant (arXiv:2211.10438), whose code sets alpha = 0.5 for all layers and does not measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.compressed_tensors import Scheme
from ..checkpoint.quantize import quantize_weight
from ..quantize import quantize
from ..tile import Tile

ALPHAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.99  # a migration must lower the error to this share of it; less is chance
MOST = 24  # binades that a channel is moved at most


def exponents(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """log2 of s, whole numbers around a median of 0, int64 [K]; 0 where a channel or its column is zero.

    >>> exponents(torch.tensor([1.0, 1.0, 64.0]), torch.ones(3), 0.5).tolist()
    [0, 0, 3]
    """
    alive = (x_amax > 0) & (w_amax > 0)
    x, w = (torch.where(alive, t, 1.0).double().log2() for t in (x_amax, w_amax))
    s = alpha * x - (1 - alpha) * w
    middle = s[alive].median() if bool(alive.any()) else 0.0
    return torch.where(alive, (s - middle).round().clamp(-MOST, MOST), 0.0).long()


def alike(channels: Tensor) -> Tensor:
    return channels


def searched(
    x: Tensor, weights: Sequence[Tensor], scheme: Scheme, x_amax: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] = alike, spread: Callable[[Tensor], Tensor] = alike,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The exponents of the channels that give layers with one input the smallest error, and what was measured.

    x        some rows of the input [R, K]; `x_amax` [K]: the largest magnitudes of all of it
    weights  [N, K] each
    gather   the largest of those of K columns that must share an exponent; `spread`: the way back

    What is told: `alpha` (None: nothing is moved), and the relative errors of the outputs `before` and `after`.
    """
    x_amax = gather(x.abs().amax(0) if x_amax is None else x_amax)
    w_amax = gather(torch.stack([w.abs().amax(0).float() for w in weights]).amax(0))
    tried = {None: torch.zeros_like(x_amax, dtype=torch.int64)}
    tried |= {alpha: exponents(x_amax, w_amax, alpha) for alpha in ALPHAS}
    exact = [x @ w.float().t() for w in weights]
    errors = {alpha: output_error(x, weights, exact, scheme, spread(move)) for alpha, move in tried.items()}
    alpha = min(errors, key=lambda a: errors[a])
    alpha = alpha if errors[alpha] < WORTH * errors[None] else None
    return tried[alpha], {"alpha": alpha, "before": errors[None], "after": errors[alpha]}


def output_error(x: Tensor, weights: Sequence[Tensor], exact: Sequence[Tensor], scheme: Scheme, move: Tensor) -> float:
    """The relative error, root of mean square over rows and layers, of quantized products after a migration."""
    factor = torch.exp2(move.float())
    x = rounded_input(x / factor, scheme)
    shares = [
        row_errors(x @ rounded_weight(w.float() * factor, scheme).t(), y) for w, y in zip(weights, exact, strict=True)
    ]
    return float(torch.cat(shares).square().mean().sqrt())


def row_errors(y: Tensor, exact: Tensor) -> Tensor:
    """The relative error of each row: what the next norm of a token will see."""
    return (y - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)


def rounded_input(x: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """x [R, K] as the scheme's served codes say it, FP32. A scheme with static inputs takes `scale`, or measures x."""
    if scheme.inputs == "none":
        return x
    tile = Tile(0, 0) if scheme.inputs == "static" else Tile(1, scheme.group)
    return quantize(x, "e4m3", tile, scheme.scale_rounding, scale=scale).dequantize(torch.float32)


def rounded_weight(weight: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """A weight [N, K] as its codes say it, FP32."""
    return quantize_weight(weight, scheme, scale).dequantize(torch.float32)
