"""Gated and plain activations, as the definition.

    gated   x = [gate, up] side by side, [T, 2F]:   h = f(gate) * up       [T, F]
    plain   x [T, F]:                               h = f(x)

    backward   d gate = dh * up * f'(gate),  d up = dh * f(gate),  side by side as they came

f is silu, gelu (exact, by erf) or relu. Everything is computed in FP32 and rounded once, to the type of x. On the GPU
exp and the divisions of silu are the fast ones (2 units in the last place of FP32 each), erf is CUDA's (2 units): a
stored BF16 value is within one unit in its last place of the value in float64, wherever that is normal.

SwiGLU and GeGLU: Shazeer, "GLU variants improve transformer", 2020.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..target import Codes, Target, quantized

FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def slope(x: Tensor, function: str) -> Tensor:
    """The derivative of a function at x (FP32)."""
    if function == "relu":
        return (x > 0).float()
    if function == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def values(x: Tensor, function: str, gated: bool) -> Tensor:
    """h [T, F]."""
    f = FUNCTIONS[function]
    if not gated:
        return f(x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, 1)
    return (f(gate) * up).to(x.dtype)


def activation(x: Tensor, function: str, gated: bool, target: Target | None) -> Tensor | Codes:
    h = values(x, function, gated)
    return h if target is None else quantized(h, target, across=False)


def gradient(dh: Tensor, x: Tensor, function: str, gated: bool) -> Tensor:
    """The gradient of x, of its shape and type."""
    dh, wide = dh.float(), x.float()
    if not gated:
        return (dh * slope(wide, function)).to(x.dtype)
    gate, up = wide.chunk(2, 1)
    return torch.cat([dh * up * slope(gate, function), dh * FUNCTIONS[function](gate)], 1).to(x.dtype)


def activation_backward(
    dh: Tensor, x: Tensor, function: str, gated: bool, target: Target | None, again: Target | None = None,
    keys_t: Tensor | None = None,
) -> tuple[Tensor | Codes, Codes | None]:  # fmt: skip
    """The gradient of x, as values; or in both orientations of codes, and the transposed codes of h."""
    dx = gradient(dh, x, function, gated)
    if target is None or again is None:
        return dx, None
    return quantized(dx, target), quantized(values(x, function, gated), again, down=False)
