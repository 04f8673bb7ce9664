"""Many matrices to codes, in both orientations, in place, in few launches: the weights of a model, once a step.

A `Cast` names one matrix and the tensors that its codes, transposed codes and scales go to. They are written where they
are, so that addresses stay what they were and a captured graph replays. `quantize_many` is the definition: a loop over
the reference. The Triton kernels equal it in bytes; they read a table of addresses that is made once and passed
back in (`prepared`) for as long as the addresses stay.

    tile       scale       launches
    tensor     given       1
    tensor     measured    2: partial maxima, then codes; 1 where the maximum is known already (`Cast.key`)
    128x128    measured    1
    row        measured    2, and a fill of the maxima
    1x128, 1x32            a matrix after the other, through `quantize_both`: no recipe has weights like these

Matrices of different types, and those whose sides are no multiples of the kernel's rectangle, have launches of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, choose, why_not_triton
from ..formats import Format
from ..tile import Tile
from . import reference, run_quantize_both

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.quantize.triton_many"),
    Backend("reference", "nothing", lambda x: None, "fp8.quantize.many"),
)
EMPTY = 0x00800000  # the key of a matrix without any finite magnitude but zero


@dataclass(frozen=True, eq=False)
class Cast:
    """One matrix, and where what is made of it goes. All on one device, contiguous.

    x         [rows, cols], FP32, BF16 or FP16
    codes     [rows, cols], codes_t [cols, rows], in the format's type: written
    scale     FP32, the tile's scale shape, written; scale_t the same of x.T, or None where it is `scale` transposed
    given     one FP32 number, the scale to use instead of measuring; it may be `scale` itself
    amax      one FP32 number, raised to the finite amax of x (a negative one is raised as well); None: nobody asks
    key       one int32, `EMPTY` + the bits of the finite amax of x, where it was measured already
    """

    x: Tensor
    codes: Tensor
    codes_t: Tensor
    scale: Tensor
    scale_t: Tensor | None = None
    given: Tensor | None = None
    amax: Tensor | None = None
    key: Tensor | None = None


def run_many(
    casts: Sequence[Cast],
    format: Format,
    tile: Tile,
    power_of_two: bool,
    prepared: Any = None,
    backend: str | None = None,
) -> Any:
    """`quantize_many` by the best backend. Returns what to pass as `prepared` the next time.

    `power_of_two` tells of given scales, too, that they are.
    """
    if not casts:
        return None
    if str(tile) in ("1x128", "1x32"):
        return _one_by_one(casts, format, tile, power_of_two, run_quantize_both)
    run = choose("quantize_many", BACKENDS, casts[0].x, backend).run
    return run(casts, format, tile, power_of_two, prepared)


def quantize_many(casts: Sequence[Cast], format: Format, tile: Tile, power_of_two: bool, prepared: Any = None) -> None:
    """The definition: `reference.quantize_both` of each x, copied to where it belongs. The amax is measured again even
    where a key is known."""
    _one_by_one(casts, format, tile, power_of_two, reference.quantize_both)


def _one_by_one(
    casts: Sequence[Cast], format: Format, tile: Tile, power_of_two: bool, quantize_both: Callable[..., Any]
) -> None:
    for cast in casts:
        given = None if cast.given is None else cast.given.reshape(1, 1).clone()
        codes, scale, codes_t, scale_t, amax = quantize_both(cast.x, given, format, tile, power_of_two, None)
        cast.codes.copy_(codes)
        cast.codes_t.copy_(codes_t)
        cast.scale.copy_(scale)
        if cast.scale_t is not None:
            cast.scale_t.copy_(scale_t)
        if cast.amax is not None:
            cast.amax.copy_(torch.maximum(cast.amax, amax.reshape(cast.amax.shape)))


def key_of(x: Tensor) -> Tensor:
    """The key (int32 [1]) of a matrix, as a kernel leaves it in `Cast.key`."""
    magnitude = x.float().abs()
    amax = torch.where(magnitude.isfinite(), magnitude, 0.0).amax() if x.numel() else magnitude.new_zeros(())
    return amax.view(1).view(torch.int32) + EMPTY
