"""The Hadamard transform, as the definition: a butterfly of log2(block) stages, in FP32.

Stage i adds and subtracts elements that lie 2^i apart, i = 0 first. The order matters to the bits, so kernels keep it.
One multiplication by 1 / sqrt(block), rounded to FP32, ends it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [R, K], K a multiple of `block`, a power of two; a fresh matrix of the type of x."""
    y, distance = x.float().reshape(-1, block), 1
    while distance < block:
        pairs = y.view(len(y), -1, 2, distance)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], 2).view(len(y), block)
        distance *= 2
    return (y * (1 / math.sqrt(block))).to(x.dtype).view(x.shape)
