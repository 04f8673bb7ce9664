"""The GPU's activations, by `both.cu`: the forward writes h as codes; the backward the gradients of gate and up in both
orientations and, from the same read, the transposed codes of h that the weight gradient of the next product needs.

bytes for each element of h (gated, BF16): forward 5, backward 11; 9 and 17 where a scale is measured first: gate and up
are then read twice rather than written and read.
"""

from __future__ import annotations

from torch import Tensor

from ..both import Room, activation_source, both
from ..target import Codes, Target

FUNCTIONS = {"silu": 0, "gelu": 1, "relu": 2}


def activation(x: Tensor, function: str, gated: bool, target: Target | None) -> Tensor | Codes:
    """`reference.activation` of a CUDA matrix."""
    x = x.contiguous()
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    room = Room(x, rows, width, target, across=False)
    source = activation_source(None, x, width)
    return both(room, source, rows, width, FUNCTION=FUNCTIONS[function], GATED=int(gated)).result


def activation_backward(
    dh: Tensor, x: Tensor, function: str, gated: bool, target: Target | None, again: Target | None = None,
    keys_t: Tensor | None = None,
) -> tuple[Tensor | Codes, Codes | None]:  # fmt: skip
    """`reference.activation_backward` of CUDA matrices."""
    dh, x = dh.contiguous(), x.contiguous()
    (rows, cols), width = x.shape, x.shape[1] // (2 if gated else 1)
    room = Room(x, rows, cols, target)
    other = None if again is None else Room(x, rows, width, again, down=False, known=True, keys_t=keys_t)
    source = activation_source(dh, x, width)
    both(room, source, rows, width, other, FUNCTION=FUNCTIONS[function], GATED=int(gated))
    made = None if other is None else other.result
    assert made is None or isinstance(made, Codes)
    return room.result, made
