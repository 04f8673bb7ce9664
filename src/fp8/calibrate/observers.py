"""Counting magnitudes, exactly, and choosing from the counts what the largest code shall stand for.

Keys, values and activations are rounded to BF16 before they are quantized, and BF16 has 32,768 magnitudes, in order of
their bits. So a row of 32,768 counters holds every magnitude that occurred, without bins to choose and without loss:
the maximum, any percentile, and the share that a scale would clip are read from it exactly, after one pass.

    max          the largest magnitude seen
    percentile   the smallest magnitude that `percentile` % of all elements do not exceed
    mse          what gives the smallest squared error on the E4M3 grid (`grid.py`), never more than that of `max`
    kl           what keeps most of the distribution in the codes, by Kullback and Leibler (`grid.py`)
    auto         of these four, what has the smallest squared error on held-out text

Scales are powers of two unless told otherwise, so an observer matters only where it moves the scale by a binade. E4M3
holds 15 binades of normal numbers: clipping buys less than it does on an integer grid, where every halving of the range
is a bit for all elements. So `max` is hard to beat, and `auto` says where it was, and by how much.

**Guarded.** A percentile, or a divergence, weighs an element by how rare it is, and would clip what carries the output:
with outlier channels 99.99 % costs up to fifteen times the squared error of `max`, on a real model's inputs a thousand
times (docs/log.md). So a choice is taken back to `max`, group by group, where it costs more than `max` on the very text
that it was made on. `guarded=False` takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, suggest
from ..quantize import quantize
from .grid import E4M3_MAX, best, divergence, squared_error

MAGNITUDES = 0x7F80  # BF16 bits below infinity
OBSERVERS = ("max", "percentile", "mse", "kl", "auto")
COSTS = {"mse": squared_error, "kl": divergence}
SLAB = 1 << 20  # columns that are counted at once
WORTH = 0.999  # the share of the error of max that another observer must fall below to win


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

    def occurred(self, group: int) -> tuple[Tensor, Tensor]:
        """The magnitudes that occurred in a group, FP32 ascending, and how often."""
        bits = self.counts[group].nonzero().flatten()
        return magnitude(bits), self.counts[group, bits]

    def __len__(self) -> int:
        return self.counts.shape[0]


def magnitude(bits: Tensor) -> Tensor:
    """The BF16 magnitudes with these bits, as FP32."""
    return bits.to(torch.int16).view(torch.bfloat16).float()


def one_observer(observer: str) -> None:
    """Refuse an observer that is unknown."""
    if observer not in OBSERVERS:
        raise ConfigError(f"there is no observer {observer!r}. {suggest(observer, OBSERVERS)}")


def observe(seen: Magnitudes, observer: str, percentile: float, rounding: str = "power_of_two") -> Tensor:
    """What the largest code shall stand for, FP32 [groups], unguarded; `auto` is `choose`'s."""
    one_observer(observer)
    if observer in COSTS:
        return E4M3_MAX * scales_of(seen, observer, percentile, rounding, guarded=False)
    return seen.amax() if observer == "max" else seen.percentile(percentile)


def scales_of(
    seen: Magnitudes, observer: str, percentile: float, rounding: str = "power_of_two", guarded: bool = True
) -> Tensor:
    """The scale (it dequantizes) of each group, FP32 [groups]."""
    largest = scales_for(seen.amax(), rounding)
    if observer in COSTS:
        pairs = zip(range(len(seen)), largest, strict=True)
        chosen = torch.stack([best(*seen.occurred(g), scale, rounding, COSTS[observer]) for g, scale in pairs])
    else:
        chosen = scales_for(observe(seen, observer, percentile), rounding)
    if not guarded or torch.equal(chosen, largest):
        return chosen
    return torch.where(expected_error(seen, chosen) <= expected_error(seen, largest), chosen, largest)


def scales_for(amax: Tensor, rounding: str) -> Tensor:
    """The scales, as `fp8.quantize` gives them, of groups with these largest magnitudes, FP32 [groups]."""
    return quantize(amax[:, None], "e4m3", "row", rounding).scale.flatten()


def expected_error(seen: Magnitudes, scales: Tensor) -> Tensor:
    """The sum of squared errors of each group with its scale, FP64 [groups]."""
    pairs = zip(range(len(seen)), scales.view(-1, 1), strict=True)
    return torch.cat([squared_error(*seen.occurred(group), scale) for group, scale in pairs])


def choose(
    seen: Magnitudes, check: Magnitudes, percentile: float, rounding: str = "power_of_two"
) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """`auto`: `(scales [groups], the observer of each group, each observer's squared error on `check` [groups])`.

    The four are not guarded: `check` judges them. One that saves less than a thousandth of the error of `max` does not
    win: on other text again it would clip for nothing.
    """
    scales = {name: scales_of(seen, name, percentile, rounding, guarded=False) for name in OBSERVERS[:-1]}
    errors = {name: expected_error(check, each) for name, each in scales.items()}
    least, winner = torch.stack(list(errors.values())).min(0)
    winner = torch.where(least < WORTH * errors["max"], winner, 0)
    return torch.stack(list(scales.values())).gather(0, winner[None])[0], [OBSERVERS[i] for i in winner], errors


def saturated(seen: Magnitudes, scale: Tensor) -> Tensor:
    """The share of each group's elements that these scales (they dequantize) would clip."""
    return seen.above(scale * E4M3_MAX)
