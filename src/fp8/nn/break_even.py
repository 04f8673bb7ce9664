"""When is an FP8 layer faster than BF16? A model of one layer's training step, from measured rates.

BF16 multiplies three times. FP8 multiplies three times at a higher rate, and also reads x, w and grad and writes their
codes in two orientations: 4 bytes an element for cast and transpose, 2 more where the amax must be found first. The
layer pays when

    6 M N K / bf16  >  2 M N K (1 / fast + 2 / promoted)  +  bytes / bandwidth  +  launches

Rates are medians measured on one H200 (torch 2.11, cuBLASLt 13.1; see `docs/log.md`); a ratio decides, so other Hopper
GPUs behave alike. The rule is a pure function of shape and device: it never times anything, so that a model converts
the same way twice.
"""

from __future__ import annotations

from torch import nn

from ..backends import why_not_hopper
from ..recipe import Recipe

BF16 = 660e12
FAST = 1300e12
PROMOTED = 1250e12
BLOCKED = 1100e12
BANDWIDTH = 3.6e12
LAUNCH = 5e-6


def gain(module: nn.Module, recipe: Recipe, tokens: int) -> tuple[float, str]:
    """Predicted BF16 time over FP8 time of one layer's forward and backward on `tokens` rows, and what to say of it."""
    weight = next((p for p in module.parameters() if p.dim() >= 2), None)
    if weight is None:
        return 0.0, "it has no weight matrix"
    reason = why_not_hopper(weight.device)
    if reason is not None:
        return 0.0, f"not faster: {reason}"
    ratio = predict(tokens, weight.shape[0], weight[0].numel(), recipe)
    word = "faster" if ratio > 1 else "not faster"
    return ratio, f"{word}: {ratio:.2f} times BF16 predicted at {tokens} rows"


def predict(m: int, n: int, k: int, recipe: Recipe) -> float:
    """The predicted speed-up of a layer [m, k] x [n, k]."""
    high = 6.0 * m * n * k / BF16 + 3 * LAUNCH
    rates = [
        BLOCKED if recipe.blocked(product) else FAST if getattr(recipe.accumulate, product) == "fast" else PROMOTED
        for product in ("forward", "grad_x", "grad_w")
    ]
    elements = float(m) * k + float(n) * k + float(m) * n
    each = 4 if recipe.delayed or not recipe.x.tile.constant_along_k else 6
    low = sum(2.0 * m * n * k / rate for rate in rates) + each * elements / BANDWIDTH + 9 * LAUNCH
    return high / low
