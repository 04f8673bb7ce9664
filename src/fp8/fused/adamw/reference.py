"""AdamW for many parameters, as the definition: plain torch, one parameter after the other.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. In this order, everything that is not marked FP64
in FP32, each operation rounded to nearest by itself (no fused multiply and add):

    t                the step of this parameter, one more than before
    step_size        lr / (1 - beta1^t)                FP64, then rounded; powers by repeated squaring
    inv_root         1 / sqrt(1 - beta2^t)             FP64, then rounded
    decay            1 - lr * weight_decay             FP64, then rounded
    g                gradient * (1 / grad_scale)       the quotient FP32; without a grad_scale the gradient
    m                m + (g - m) * c1                  c1 = 1 - beta1, FP64, then rounded
    v                v * beta2 + (c2 * g) * g          c2 = 1 - beta2, FP64, then rounded
    p                p * decay - step_size * (m / (sqrt(v) * inv_root + eps))

p is the FP32 master where the parameter is BF16 or FP16, which then receives it rounded to nearest; and the parameter
itself where that is FP32. The update uses m and v before they are rounded to what is kept (`moments.py`).

A step with `found_inf` changes nothing, the count of steps included; what the weights' codes need is done all the same.

**What follows the update** (`Slot.after`): the codes of the new parameter, both orientations, by the bytes of
`quantize_both`; or, where its scale must be measured first, only the key of its amax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...formats import Format
from ...quantize import many
from ...quantize.many import Cast, key_of
from ...tile import Tile
from . import moments


@dataclass(frozen=True, eq=False)
class After:
    """What to make of a parameter once it is updated: the codes of `cast.x`, a view of the whole parameter; or, with a
    `cast.key` to write, only the key."""

    cast: Cast
    format: Format
    tile: Tile
    power_of_two: bool


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter, its gradient, its state (`step`, moments, `master`), its number, and what follows. All changed in
    place."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    number: int
    after: After | None = None


@dataclass(frozen=True, eq=False)
class Settings:
    """What a group of parameters has in common. `lr` may be a tensor of one element, which is read on the device; so
    are `found_inf` and `grad_scale`."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments: str
    stochastic: bool
    seed: int
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


def adamw(slots: Sequence[Slot], settings: Settings, prepared: Any = None) -> None:
    """One step for all of them."""
    skip = settings.found_inf is not None and bool(settings.found_inf)
    for slot in slots:
        if not skip:
            _update(slot, settings)
        if slot.after is not None:
            _follow(slot.after)


def _update(slot: Slot, settings: Settings) -> None:
    state = slot.state
    state["step"] += 1
    step = int(state["step"])
    step_size, inv_root, decay = corrections(step, settings)
    c1, c2 = (single(1.0 - beta) for beta in settings.betas)
    g = slot.grad.float()
    if settings.grad_scale is not None:
        g = g * (1.0 / settings.grad_scale.float().reshape(())).to(g.device)
    m, v = (moments.read(state, name) for name in moments.NAMES)
    m = m + (g - m) * c1
    v = v * single(settings.betas[1]) + (g * c2) * g
    p = state.get("master", slot.parameter)
    p.copy_(p * decay - (m / (moments.root(v) * inv_root + single(settings.eps))) * step_size)
    if p is not slot.parameter:
        slot.parameter.copy_(p)
    rounded = settings.stochastic and settings.moments != "fp32"
    drawn = moments.words(g.numel(), settings.seed, slot.number, step) if rounded else (None, None)
    for name, value, word in zip(moments.NAMES, (m, v), drawn, strict=True):
        moments.write(state, name, value, None if word is None else word.to(value.device))


def corrections(step: int, settings: Settings) -> tuple[float, float, float]:
    """`step_size`, `inv_root` and `decay` of a step, as FP32 numbers."""
    (beta1, beta2), lr = (pair(beta) for beta in settings.betas), pair(float(settings.lr))
    first, second = 1.0 - raised(beta1, step), 1.0 - raised(beta2, step)
    return single(lr / first), single(1.0 / math.sqrt(second)), single(1.0 - lr * pair(settings.weight_decay))


def raised(base: float, exponent: int) -> float:
    """base^exponent by repeated squaring, from the lowest bit."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def single(number: float) -> float:
    """The nearest FP32 number."""
    return torch.tensor(number, dtype=torch.float32, device="cpu").item()


def halves(number: float) -> tuple[float, float]:
    """An FP64 number as two FP32 ones, which is how it comes to a kernel: 48 of its bits."""
    high = single(number)
    return high, single(number - high)


def pair(number: float) -> float:
    """The sum of `halves`, in FP64."""
    return sum(halves(number))


def _follow(after: After) -> None:
    if after.cast.key is not None:
        after.cast.key.copy_(key_of(after.cast.x))
    else:
        many.quantize_many([after.cast], after.format, after.tile, after.power_of_two)
