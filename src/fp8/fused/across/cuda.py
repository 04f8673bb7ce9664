"""The transposed codes of a matrix, by `both.cu`: 3 bytes an element."""

from __future__ import annotations

from torch import Tensor

from ..both import Room, both, plain_source
from ..target import Codes, Target


def across(x: Tensor, target: Target) -> Codes:
    """`reference.across` of a CUDA matrix in BF16, in multiples of 16."""
    rows, cols = x.shape
    made = both(Room(x, rows, cols, target, down=False, known=True), plain_source(x), rows, cols).result
    assert isinstance(made, Codes)
    return made
