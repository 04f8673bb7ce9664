"""The transposed codes of a matrix, as the definition."""

from __future__ import annotations

from torch import Tensor

from ..target import Codes, Target, quantized


def across(x: Tensor, target: Target) -> Codes:
    return quantized(x, target, down=False)
