"""What a scale costs on the E4M3 grid, computed from exact counts of magnitudes; and the best scale for either cost.

    squared error   sum over magnitudes m of  count(m) * (m - code(m / s) * s)^2
    divergence      KL(P || Q), P being the magnitudes seen and Q all that their codes still say of them

Codes are the quantizer's own, so rounding, subnormals and saturation count as they will happen. Signs do not matter:
the grid is symmetric.

**Divergence, in a form that suits a floating-point grid.** The published ones (TensorRT, modelopt) merge a histogram's
bins into 128 equal steps; E4M3 has no equal steps. Here every code has a cell, the magnitudes that round to it; the
lowest begins at zero, and the last reaches up to the largest magnitude seen. Whoever reads codes knows how often each
occurs, P(c), and nothing of what lies within a cell of width W(c), so Q is flat there. Then

    KL(P || Q)  =  sum of p log p  -  sum over codes of P(c) log(P(c) / W(c))  +  (terms without s)

and the scale with the smallest sum of P(c) log(W(c) / P(c)) is the best: it needs no smoothing and no bins to choose.
Clipping widens the last cell, underflow the lowest; between them lies what the scale decides. It weighs an element by
how improbable its magnitude was and not by its size, so it clips large and rare elements that squared error keeps.

**Candidates.** A scale above that of `max` has no code for more, and fewer for small magnitudes, so candidates lie
below: with powers of two, each binade, where the squared error is equal but for what is clipped and what underflows;
with free scales eight a binade, since then the grid shifts under the data. Equal costs take the largest scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import format_of
from ..quantize import quantize

E4M3_MAX = format_of("e4m3").max
BINADES = 15  # of normal numbers in E4M3
STEPS = {"power_of_two": 1, "none": 8}  # candidates a binade
SMALLEST = 2.0**-126

Cost = Callable[[Tensor, Tensor, Tensor], Tensor]


def candidates(largest: Tensor, rounding: str) -> Tensor:
    """The scale of `max` (0-dim, FP32) and those below it, FP32 [C], descending."""
    steps = torch.arange(BINADES * STEPS[rounding] + 1) / STEPS[rounding]
    scales = (largest.double() * 2.0 ** -steps.double()).float()
    return scales[scales >= SMALLEST] if float(largest) >= SMALLEST else largest.view(1)


def best(magnitudes: Tensor, counts: Tensor, largest: Tensor, rounding: str, cost: Cost) -> Tensor:
    """The candidate of the smallest cost, 0-dim FP32; `largest` where there is nothing to decide on."""
    scales = candidates(largest, rounding)
    if not int(counts.sum()) or float(magnitudes[-1]) == 0:
        return largest
    return scales[int(cost(magnitudes, counts, scales).argmin())]


def squared_error(magnitudes: Tensor, counts: Tensor, scales: Tensor) -> Tensor:
    """The sum of squared errors of each scale, FP64 [C], of magnitudes [P] (FP32) that occurred `counts` [P] times."""
    rows = magnitudes.expand(len(scales), -1)
    rounded = quantize(rows, "e4m3", "row", scale=scales[:, None]).dequantize(torch.float32)
    return ((rounded.double() - magnitudes.double()).square() * counts).sum(1)


def divergence(magnitudes: Tensor, counts: Tensor, scales: Tensor) -> Tensor:
    """`sum of P(c) log(W(c) / P(c))` of each scale, FP64 [C], in nats: KL(P || Q) up to what no scale changes."""
    rows = magnitudes.expand(len(scales), -1)
    codes = quantize(rows, "e4m3", "row", scale=scales[:, None]).codes.view(torch.uint8).long()
    held = torch.zeros(len(scales), 127, dtype=torch.float64)
    held.scatter_add_(1, codes, counts.double().expand(len(scales), -1).contiguous())
    share = held / counts.sum()
    upper = edges() * scales.double()[:, None]
    upper[:, -1] = upper[:, -1].clamp(min=float(magnitudes[-1]))
    width = upper.diff(dim=1, prepend=torch.zeros(len(scales), 1, dtype=torch.float64))
    return torch.where(share > 0, share * (width / share.clamp(min=1e-300)).log(), 0.0).sum(1)


def edges() -> Tensor:
    """The upper edge of each positive code's cell at scale 1, FP64 [127]; the last stands for what still rounds to it.

    >>> edges()[:2].tolist(), edges()[-2:].tolist()
    ([0.0009765625, 0.0029296875], [432.0, 464.0])
    """
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    last = 2 * values[-1] - (values[-1] + values[-2]) / 2
    return torch.cat([(values[1:] + values[:-1]) / 2, last.view(1)])
