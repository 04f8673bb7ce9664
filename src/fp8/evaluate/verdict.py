"""Is a model as good as its base? Four answers, from the paired interval of what it loses.

    within          the whole interval of the loss lies at or below the limit: at most so much worse
    worse           the whole interval lies above the limit
    inconclusive    the interval crosses it: more items would tell
    uninformative   the base does not beat chance by five standard errors, so that nothing could be lost here

The limit is half a point: 0.5 percentage points of an accuracy, 0.005 of a rank correlation, 0.5 % of a perplexity. The
loss is what the model is worse by, so that a model that is better is `within`.
"""

from __future__ import annotations

from .intervals import Estimate

LIMIT = 0.5
SIGMAS = 5.0
WITHIN, WORSE, INCONCLUSIVE, UNINFORMATIVE = "within", "worse", "inconclusive", "uninformative"


def verdict(loss: Estimate, informative: bool, limit: float = LIMIT) -> str:
    """The answer for a paired loss in points (or percent), positive where the model is worse than its base."""
    if not informative:
        return UNINFORMATIVE
    if loss.high <= limit:
        return WITHIN
    return WORSE if loss.low > limit else INCONCLUSIVE


def beats_chance(advantage: float, standard_error: float) -> bool:
    """Whether the base's advantage over chance is at least five standard errors; `advantage` is positive when better.

    >>> beats_chance(0.30, 0.05), beats_chance(0.0, 0.0)
    (True, False)
    """
    return advantage > 0 and advantage >= SIGMAS * standard_error
