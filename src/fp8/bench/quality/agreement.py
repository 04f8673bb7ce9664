"""Greedy answers in FP8 beside those in BF16: how long they are the same, and how much of them is.

The same prompts, passages of a real text, are answered greedily by the engine. Once two answers differ in a token they
go on from different texts, so what counts is where they part first; the share of equal tokens, place by place, is told
as well. A tie of two tokens is broken by the last bit of a sum, and sums on a GPU depend on how many sequences run
together: so BF16 answers twice, the second time in other company, and the other arms are to be held against that, too.

Intervals: percentiles of a bootstrap over prompts, seed 0; Wilson's for the share of answers that never part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...evaluate.intervals import RESAMPLES, Estimate, proportion
from .answers import answers
from .caches import HIGH, Calibration, arms

AGAIN = "BF16, in other company"
ARMS = {  # name: (quantization of the weights and activations, cache)
    "BF16": (None, HIGH),
    AGAIN: (None, HIGH),
    "FP8 KV": (None, "e4m3"),
    "FP8 KV, full keys": (None, "e4m3, full keys"),
    "FP8 KV, full keys, offsets": (None, "e4m3, full keys, offsets"),
    "E5M2 KV": (None, "e5m2"),
    "FP8": ("fp8", HIGH),
    "FP8 + FP8 KV": ("fp8", "e4m3"),
}


def bootstrap(values: Sequence[float], statistic: Callable[..., Any] = np.mean) -> Estimate:
    """A statistic of independent items (it takes `axis`), with the percentiles of a bootstrap, seed 0.

    >>> bootstrap([1.0, 1.0, 1.0]).low
    1.0
    """
    x, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    drawn = statistic(x[generator.integers(0, len(x), (RESAMPLES, len(x)))], axis=1)
    whole = float(statistic(x, axis=0))
    low, high = (float(end) for end in np.percentile(drawn, [2.5, 97.5]))
    return Estimate(whole, min(low, whole), max(high, whole), float(drawn.std(ddof=1)), len(x), float(len(x)))


def parted(base: Sequence[int], other: Sequence[int]) -> int:
    """At which place two answers differ first; their length where they never do.

    >>> parted([3, 4, 5], [3, 4, 6]), parted([3, 4], [3, 4])
    (2, 2)
    """
    return next((i for i, (a, b) in enumerate(zip(base, other, strict=True)) if a != b), len(base))


def compared(base: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What is told of an arm's answers beside the base's."""
    places = [parted(a, b) for a, b in zip(base, other, strict=True)]
    equal = [float(np.mean([x == y for x, y in zip(a, b, strict=True)])) for a, b in zip(base, other, strict=True)]
    first = [int(a[0] == b[0]) for a, b in zip(base, other, strict=True)]
    return {
        "first_difference_mean": bootstrap(places).to_dict(),
        "first_difference_median": bootstrap(places, np.median).to_dict(),
        "never_differ": proportion([int(p == len(a)) for p, a in zip(places, base, strict=True)]).to_dict(),
        "equal_tokens": bootstrap(equal).to_dict(),
        "first_token_equal": proportion(first).to_dict(),
        "places": places,
    }


def agreement(
    load: Callable[[str | None], Any],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    calibration_texts: Any,
    *,
    together: int = 64,
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Answer the prompts in every arm.

    load                gives a served model, in BF16 (None) or quantized ("fp8")
    calibration_texts   tokens [B, T], for offsets and scales
    """  # fmt: skip
    found: dict[str, list[list[int]]] = {}
    for weights in dict.fromkeys(weights for weights, _ in ARMS.values()):
        model = load(weights)
        cached = arms(model, Calibration.of(model, calibration_texts))
        for name, (own, cache) in ARMS.items():
            if own == weights:
                company = max(1, together // 9) if name == AGAIN else together
                found[name] = answers(cached[cache], prompts, tokens, together=company)
                say(f"{name}: {len(prompts)} answers of {tokens} tokens")
    base = found["BF16"]
    return {
        "prompts": len(prompts), "prompt_tokens": len(prompts[0]), "answer_tokens": tokens, "together": together,
        "arms": {name: compared(base, found[name]) for name in ARMS if name != "BF16"},
    }  # fmt: skip
