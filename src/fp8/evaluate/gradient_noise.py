"""What FP8 adds to the noise of the gradient, measured at the same weights on the same micro-batches.

A gradient is noisy before any rounding: each micro-batch gives another one, and the spread between them is what sets
how far a step can be trusted. Rounding in FP8 adds to that spread. With g_i the gradient of micro-batch i of M, all
parameters laid one after the other, and g their mean,

    variance  =  sum over i of |g_i - g|^2 / (M - 1) / elements

is the unbiased variance of a gradient element. It is computed twice: with the layers' FP8 products, and with the same
layers in high precision (`fp8.autocast(enabled=False)`). The ratio is 1 where rounding is lost in the noise of
sampling. Beside it:

    error     =  root of ( sum of |g_i(FP8) - g_i(high)|^2 / sum of |g_i(high)|^2 )

the relative error of one micro-batch's gradient, which shows that FP8 was at work at all.

Nothing of the model changes: the layers run in evaluation mode, in which delayed scaling notes nothing, and gradients
are dropped. Sums are kept in FP32 by element and in FP64 over elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn import autocast

Loss = Callable[[Tensor], Tensor]
Gradient = list[Tensor]


@dataclass(frozen=True)
class GradientNoise:
    """Variances of a gradient element, and the relative error of a gradient (a number, not percent)."""

    variance_high: float
    variance_fp8: float
    error: float
    batches: int

    @property
    def ratio(self) -> float:
        """FP8 over high precision."""
        return self.variance_fp8 / self.variance_high

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"ratio": self.ratio}


class Spread:
    """The sums that a variance needs."""

    def __init__(self) -> None:
        self.total: Gradient = []
        self.squares, self.count = 0.0, 0

    def add(self, gradient: Gradient) -> None:
        self.total = [t + g for t, g in zip(self.total, gradient, strict=True)] if self.total else gradient
        self.squares += squared(gradient)
        self.count += 1

    @property
    def variance(self) -> float:
        elements = sum(t.numel() for t in self.total)
        return max(self.squares - squared(self.total) / self.count, 0.0) / (self.count - 1) / elements


def gradient_noise(model: nn.Module, loss: Loss, batches: Sequence[Tensor]) -> GradientNoise:
    """The noise of the gradient of `loss(rows)` over micro-batches; raises `ConfigError` for fewer than two."""
    if len(batches) < 2:
        raise ConfigError(f"a variance needs at least 2 micro-batches, not {len(batches)}.")
    high, low, error = Spread(), Spread(), 0.0
    was = model.training
    model.eval()
    for rows in batches:
        with autocast(enabled=False):
            exact = gradient_of(model, loss(rows))
        rounded = gradient_of(model, loss(rows))
        error += squared([a - b for a, b in zip(rounded, exact, strict=True)])
        high.add(exact)
        low.add(rounded)
    model.train(was)
    return GradientNoise(high.variance, low.variance, (error / high.squares) ** 0.5, len(batches))


def gradient_of(model: nn.Module, loss: Tensor) -> Gradient:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [g.detach().float() for g in torch.autograd.grad(loss, parameters)]


def squared(gradient: Gradient) -> float:
    return sum(float(g.double().square().sum()) for g in gradient)
