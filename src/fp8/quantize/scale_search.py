"""The scale of each channel that errs least: `searched_scales`.

The grid of E4M3 is relative, so a scale moves no value to a finer or coarser part of it, on average. A channel is no
average: of its few hundred weights the largest carry the error, and within a binade those above 1.75 are met more
closely than those above 1. Moving all of them by a fraction of a binade, a channel of 576 Gaussian weights loses a
sixth of its squared error, one of 1536 a tenth, for nothing: an FP32 scale is what every reader takes.

    scale  =  amax / 448 * 2^(k / 16)        k = -6 .. 16, the first of the best

Below amax / 448 the largest weights are clipped, which may pay; two binades are not looked at, for they differ only in
what is subnormal. **The same scales everywhere**: candidates are one product each, and errors are counted in whole
numbers of 20 bits, so that their squares are summed exactly, in any order.

A model may gain more by it than that: under powers of two all channels have one grid, and a scale drawn at random for
each was better already (`docs/log.md`, which does not say why).

Nothing is asked of text. Rounding with compensation has the same to gain (`docs/log.md`), since it chooses codes under
the scales that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import format_of
from ..quantize.reference import nearest

E4M3 = format_of("e4m3")
STEPS = range(-6, 17)  # sixteenths of a binade
FACTORS = tuple(2.0 ** (k / 16) / 448 for k in STEPS)
BITS = 20  # of an error: 2 * 20 + log2(131072 columns) = 57 < 63
LONGEST = 1 << 17


def searched_scales(weight: Tensor) -> Tensor:
    """FP32 [N, 1] for a weight [N, K], on its device; 1 for a row of zeros. Values that are not finite count as 0."""
    assert weight.shape[1] <= LONGEST
    w = weight.float()
    w = torch.where(w.isfinite(), w, 0.0)
    amax = w.abs().amax(1, keepdim=True)
    amax = torch.where(amax > 0, amax, 448.0)
    best, least = amax * FACTORS[0], None
    for factor in FACTORS:
        scale = (amax * factor).clamp(2.0**-126, 2.0**126)
        error = squared_error(w, scale, amax)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best = torch.where(better, scale, best)
        least = error if least is None else torch.where(better, error, least)
    return torch.where(w.abs().amax(1, keepdim=True) > 0, best, 1.0)


def squared_error(w: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    """The squared error of each row [N, 1] in units of its own: int64, exact."""
    off = nearest(w / scale, E4M3).float() * scale - w
    return (off / amax * 2.0**BITS).round().long().square().sum(1, keepdim=True)
