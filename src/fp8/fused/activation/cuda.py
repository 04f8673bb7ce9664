"""The GPU's activations, by `both.cu`: the forward writes h as codes; the backward the gradients of gate and up in both
orientations and, from the same read, the transposed codes of h that the weight gradient of the next product needs.

bytes for each element of h (gated, BF16): forward 5, backward 11; 9 and 17 where a scale is measured first: gate and up
are then read twice rather than written and read.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..both import Room, activation_source, both, one_pass
from ..target import Codes, Target

FUNCTIONS = {"silu": 0, "gelu": 1, "relu": 2}


def activation(x: Tensor, function: str, gated: bool, target: Target | None) -> Tensor | Codes:
    """`reference.activation` of a CUDA matrix."""
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    room = Room(x, rows, width, target, across=False)
    source = activation_source(None, x, width)
    return both(room, source, rows, width, FUNCTION=FUNCTIONS[function], GATED=int(gated)).result


def activation_backward(
    dh: Tensor, x: Tensor, function: str, gated: bool, target: Target | None, again: Target | None = None,
    keys_t: Tensor | None = None,
) -> tuple[Tensor | Codes, Codes | None]:  # fmt: skip
    """`reference.activation_backward` of CUDA matrices."""
    (rows, cols), width = x.shape, x.shape[1] // (2 if gated else 1)
    fill = partial(both, FUNCTION=FUNCTIONS[function], GATED=int(gated))
    room, source = Room(x, rows, cols, target), activation_source(dh, x, width)
    if again is None:
        return fill(room, source, rows, width).result, None
    other = Room(x, rows, width, again, down=False, known=True, keys_t=keys_t)
    if one_pass(room, other):
        fill(room, source, rows, width, other)
    else:  # the products around the activation have other tiles
        fill(room, source, rows, width)
        fill(other, activation_source(None, x, width), rows, width)
    made = other.result
    assert isinstance(made, Codes)
    return room.result, made
