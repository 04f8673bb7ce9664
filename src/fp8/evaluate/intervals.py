"""How sure a measured value is: 95 % intervals for means over text, for proportions, for rank correlations, and for the
difference of two models on the same items. Everything can be recomputed from the records that an evaluation keeps.

**A mean over text** (`ratio_mean`). The loss is a ratio: nats summed over windows, divided by tokens summed over
windows. Tokens of a window depend on each other, so a window is the unit. Neighbouring windows depend on each other
too (the same article goes on), so the variance is the long-run one: with residuals e_i = L_i - mean * n_i of k windows,

    V  =  k / (k - 1) * ( sum e_i^2  +  2 sum over l = 1..m of (1 - l / (m + 1)) * sum e_i e_(i+l) )  /  (sum n_i)^2

with Bartlett's weights and m = floor(4 (k / 100)^(2/9)) (Newey and West, Econometrica 1987; Review of Economic Studies
1994), and never less than the l = 0 term alone. The ratio of that term to V is how many independent windows the k are
worth: the effective size, which gives Student's t its degrees of freedom. It was preferred to a block bootstrap because
it draws nothing, so that two people get the same digits, and because with few windows a bootstrap is too narrow.
The paired difference of two models is the same estimator on L_i(model) - L_i(base).

**A proportion**: Wilson's interval (Journal of the American Statistical Association, 1927). **The difference of two
paired proportions**: with b items that only the base got right and c that only the model did, of n,

    difference  =  (c - b) / n,      interval  =  (c - b) / (n + 2)  +-  z sqrt( (p + q - (q - p)^2) / (n + 2) ),
    p = (b + 1) / (n + 2),  q = (c + 1) / (n + 2)

(Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
2012), whose coverage holds for small n and does not collapse to zero width when b = c = 0, as the interval conditional
on b + c does: that ten items came out alike does not show that all would. McNemar's exact p stands beside it.

**A rank correlation**, and the difference of two: percentiles of a paired bootstrap over items, seed 0.

Two models that are one function, which equal records to the last bit show, differ by exactly 0, interval [0, 0].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z95 = 1.959964
# Student's t, two-sided 95 %, by degrees of freedom from 0 to 9; beyond, a series is right to 4 digits.
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95 % interval (infinite where one unit cannot tell).

    units       how many windows or items it was computed from
    effective   how many independent ones they are worth
    """

    value: float
    low: float
    high: float
    standard_error: float
    units: int
    effective: float

    def to_dict(self) -> dict[str, Any]:
        """JSON has no infinity: it becomes None."""
        return {key: finite(value) for key, value in asdict(self).items()}

    def map(self, monotone: Any) -> Estimate:
        """The estimate of an increasing function of the value; the standard error by its slope (delta method)."""
        step = max(abs(self.value), 1.0) * 1e-6
        slope = (monotone(self.value + step) - monotone(self.value - step)) / (2 * step)
        low, high = (monotone(end) if math.isfinite(end) else end for end in (self.low, self.high))
        return Estimate(monotone(self.value), low, high, slope * self.standard_error, self.units, self.effective)

    def negated(self) -> Estimate:
        return Estimate(0.0 - self.value, 0.0 - self.high, 0.0 - self.low, self.standard_error, self.units,
                        self.effective)  # fmt: skip


def exactly_zero(units: int) -> Estimate:
    """What a function differs from itself by."""
    return Estimate(0.0, 0.0, 0.0, 0.0, units, float(units))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def t95(freedom: float) -> float:
    """Student's t for a two-sided 95 % interval.

    >>> round(t95(4), 3), round(t95(30), 3), round(t95(1e9), 3)
    (2.776, 2.042, 1.96)
    """
    if freedom < len(T95):
        return T95[max(int(freedom), 0)]
    z, v = Z95, freedom
    return (z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3))  # fmt: skip


# --------------------------------------------------------------------------- means over text


def ratio_mean(totals: Sequence[float], weights: Sequence[float], *, in_order: bool = True) -> Estimate:
    """The weighted mean sum(totals) / sum(weights), with the interval that the top of this file derives.

    totals, weights   of each window, in the order of the text: nats and tokens
    in_order          False: the units are independent items, and have no neighbours
    """
    x, n = np.asarray(totals, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    k, mean = len(x), float(x.sum() / n.sum())
    if k < 2:
        return Estimate(mean, -math.inf, math.inf, math.inf, k, float(k))
    e = x - mean * n
    alone, with_neighbours = long_run(e, lags(k) if in_order else 0)
    standard_error = math.sqrt(with_neighbours * k / (k - 1)) / float(n.sum())
    effective = k * (alone / with_neighbours) if with_neighbours else float(k)
    half = t95(effective - 1) * standard_error if standard_error else 0.0
    return Estimate(mean, mean - half, mean + half, standard_error, k, effective)


def lags(windows: int) -> int:
    """How many neighbours a window is taken to depend on (Newey and West, 1994)."""
    return min(int(4 * (windows / 100) ** (2 / 9)), windows - 1)


def long_run(e: np.ndarray, neighbours: int) -> tuple[float, float]:
    """The sum of squares of residuals alone, and with the products of neighbours."""
    alone = float((e * e).sum())
    products = sum((1 - lag / (neighbours + 1)) * float((e[:-lag] * e[lag:]).sum()) for lag in range(1, neighbours + 1))
    return alone, max(alone + 2 * products, alone)


# --------------------------------------------------------------------------- proportions


def proportion(right: Sequence[int]) -> Estimate:
    """The share of items that are right, with Wilson's interval. The standard error is that of (k + 1) / (n + 2), which
    is not zero where all or none are right.

    >>> half = proportion([1, 0] * 50)
    >>> round(half.low, 3), round(half.high, 3)
    (0.404, 0.596)
    """
    n, k = len(right), sum(right)
    p, square = k / n, Z95**2
    middle = (p + square / (2 * n)) / (1 + square / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
    kept = (k + 1) / (n + 2)
    return Estimate(p, min(middle - half, p), max(middle + half, p), math.sqrt(kept * (1 - kept) / n), n, float(n))


def paired_difference(base: Sequence[int], model: Sequence[int]) -> Estimate:
    """The model's share of right items minus the base's, item by item the same questions (Bonett and Price)."""
    n, lost, won = len(base), *discordant(base, model)
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    error = math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    middle, value = q - p, (won - lost) / n
    low, high = min(middle - Z95 * error, value), max(middle + Z95 * error, value)
    return Estimate(value, max(low, -1.0), min(high, 1.0), error, n, float(n))


def discordant(base: Sequence[int], model: Sequence[int]) -> tuple[int, int]:
    """How many items only the base got right, and how many only the model."""
    pairs = list(zip(base, model, strict=True))
    return pairs.count((1, 0)), pairs.count((0, 1))


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact two-sided p: how likely a split at least so uneven is when both models are equally good.

    >>> mcnemar(0, 0), mcnemar(1, 9)
    (1.0, 0.021484375)
    """
    n, least = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


# --------------------------------------------------------------------------- rank correlations


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1; equal values share the mean of theirs.

    >>> ranks(np.array([10.0, 30.0, 10.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[where].astype(np.float64)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's, of ranks; 0 where one side never changes."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def bootstrap_spearman(scores: Sequence[float], *cosines: Sequence[float]) -> Estimate:
    """The correlation of one model's cosines with the scores, or with two models the second's minus the first's."""
    gold, given = np.asarray(scores), [np.asarray(c) for c in cosines]
    n, generator = len(gold), np.random.default_rng(0)

    def value(rows: Any) -> float:
        each = [spearman(c[rows], gold[rows]) for c in given]
        return each[0] if len(each) == 1 else each[1] - each[0]

    drawn = np.array([value(generator.integers(0, n, n)) for _ in range(RESAMPLES)])
    whole = value(slice(None))
    low, high = (float(end) for end in np.percentile(drawn, [2.5, 97.5]))
    return Estimate(whole, min(low, whole), max(high, whole), float(drawn.std(ddof=1)), n, float(n))
