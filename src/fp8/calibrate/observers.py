"""Counting magnitudes, exactly, and choosing from the counts what the largest code shall stand for.

Keys, values and activations are rounded to BF16 before they are quantized, and BF16 has 32,768 magnitudes, in order of
their bits. So a row of 32,768 counters holds every magnitude that occurred, without bins to choose and without loss:
the maximum, any percentile, and the share that a scale would clip are read from it exactly, after one pass.

    max          the largest magnitude seen
    percentile   the smallest magnitude that `percentile` % of all elements do not exceed

Scales are powers of two unless told otherwise, so an observer matters only where it moves the scale by a binade. E4M3
holds 15 binades of normal numbers: clipping buys less than it does on an integer grid, where every halving of the range
is a bit for all elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, suggest
from ..formats import format_of

MAGNITUDES = 0x7F80  # BF16 bits below infinity
OBSERVERS = ("max", "percentile")
SLAB = 1 << 20  # columns that are counted at once
E4M3_MAX = format_of("e4m3").max


class Magnitudes:
    """How often each BF16 magnitude occurred in each of some groups (heads, or one for a whole tensor).

    >>> seen = Magnitudes(1)
    >>> seen.add(torch.tensor([[1.0, -2.0, 3.0]]))
    >>> seen.amax().tolist(), seen.percentile(50.0).tolist(), seen.above(torch.tensor([2.0])).tolist()
    ([3.0], [2.0], [0.3333333432674408])
    """

    def __init__(self, groups: int) -> None:
        self.counts = torch.zeros(groups, MAGNITUDES, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count x [groups, any]. Raises `DataError` where it is not finite."""
        for part in x.split(SLAB, 1):
            self._add(part)

    def _add(self, x: Tensor) -> None:
        bits = x.detach().to(torch.bfloat16).contiguous().view(torch.int16).long() & 0x7FFF
        if int(bits.max()) >= MAGNITUDES:
            raise DataError(
                "activations are not finite: the model overflows on this text. Calibrate it in another type."
            )
        groups = self.counts.shape[0]
        place = bits + torch.arange(groups, device=bits.device)[:, None] * MAGNITUDES
        self.counts += torch.bincount(place.flatten(), minlength=groups * MAGNITUDES).view(groups, MAGNITUDES).cpu()

    def amax(self) -> Tensor:
        """The largest magnitude of each group, FP32 [groups]; 0 where there was nothing."""
        seen = self.counts > 0
        last = MAGNITUDES - 1 - seen.flip(1).int().argmax(1)
        return magnitude(torch.where(seen.any(1), last, 0))

    def percentile(self, percent: float) -> Tensor:
        """The smallest magnitude that `percent` % of a group's elements do not exceed, FP32 [groups]."""
        below = self.counts.cumsum(1).double()
        need = below[:, -1:] * (percent / 100)
        return magnitude((below >= need).int().argmax(1))

    def above(self, limit: Tensor) -> Tensor:
        """The share of each group's elements whose magnitude exceeds `limit` [groups]."""
        over = (magnitude(torch.arange(MAGNITUDES)) > limit.double()[:, None]) * self.counts
        return over.sum(1) / self.counts.sum(1).clamp(min=1)

    def __len__(self) -> int:
        return self.counts.shape[0]


def magnitude(bits: Tensor) -> Tensor:
    """The BF16 magnitudes with these bits, as FP32."""
    return bits.to(torch.int16).view(torch.bfloat16).float()


def one_observer(observer: str) -> None:
    """Refuse an observer that is unknown."""
    if observer not in OBSERVERS:
        raise ConfigError(f"there is no observer {observer!r}. {suggest(observer, OBSERVERS)}")


def observe(seen: Magnitudes, observer: str, percentile: float) -> Tensor:
    """What the largest code shall stand for, FP32 [groups]."""
    one_observer(observer)
    return seen.amax() if observer == "max" else seen.percentile(percentile)


def saturated(seen: Magnitudes, scale: Tensor) -> Tensor:
    """The share of each group's elements that these scales (they dequantize) would clip."""
    return seen.above(scale * E4M3_MAX)
