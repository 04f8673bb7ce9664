"""The transposed codes of a matrix alone, with a scale that is known: the second half of `quantize_both`, later."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, choose
from ..target import Codes, Target, fake, flat, of_flat, of_words, to_words, why_not_both

BACKENDS = (
    Backend("cuda", "a Hopper GPU and NVRTC", why_not_both, "fp8.fused.across.cuda"),
    Backend("reference", "nothing", lambda x: None, "fp8.fused.across.reference"),
)


def across(x: Tensor, target: Target) -> Codes:
    """The codes [K, N] of the transpose of x [N, K], contiguous; `target.scale` is given, its tile is "tensor"."""
    assert target.scale is not None
    if torch.compiler.is_compiling():
        return of_flat(torch.ops.fp8.across(x, *to_words(target)), target, down=False)
    return choose("across", BACKENDS, x).run(x, target)


@torch.library.custom_op("fp8::across", mutates_args=())
def _across(
    x: Tensor, format: str, tile: str, power_of_two: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = of_words(format, tile, power_of_two, scale)
    return flat(across(x, target), target)


@_across.register_fake
def _(x, format, tile, power_of_two, scale):  # type: ignore[no-untyped-def]
    return fake(x, x.shape[0], x.shape[1], of_words(format, tile, power_of_two, scale), down=False)
