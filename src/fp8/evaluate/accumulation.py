"""How far Hopper's short accumulator is off on the operands of a product: measured on a few rows, not guessed.

`fast` keeps 13 fraction bits over all of K and drops the rest towards zero (`matmul/emulate.py`). What is dropped has
the sign of the sum so far: where terms cancel, it cancels too; where they share a sign, the result shrinks, the more
the longer K is. No statistic of one operand tells which it will be, since the sign belongs to the product. So the
accumulator itself is asked: its model runs on some rows of both operands, beside the exact sum of the same codes, and

    bias  =  sum over outputs of (fast - exact) * sign(exact)  /  sum over outputs of |exact|

is the share by which results come out too small. Measured on 16 x 16 outputs of normal data, E4M3, by this file:

    K        zero-mean    both shifted by half their deviation         one sign
    4096     -0.02 %      -0.8 %                                       -7.0 %
    8192     -0.03 %      -1.8 %                                       -13.6 %
    14336    -0.06 %      -3.4 %                                       -21.0 %

Softmax weights against positive values: -2.4, -3.6, -5.4 %. Between zero-mean and the rest lies 1 %, where the warning
begins. It costs about a quarter of a second a product on a CPU, and reads its result back from a GPU: a thing for
probes, never for a training step.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..matmul.emulate import accumulate
from ..matmul.reference import parts, product_exact
from ..quantize import Quantized
from ..recipe import PRODUCTS, Recipe

DEEP = 4096  # K up to which `fast` is not asked about
ROWS = 16
WARN = -0.01


def deep_and_fast(recipe: Recipe, x: tuple[int, int], w: tuple[int, int]) -> list[str]:
    """The products of a layer with x [T, K] and w [N, K] that run `fast` over more than 4096 terms."""
    depths = dict(zip(PRODUCTS, (x[1], w[0], x[0]), strict=True))
    return [name for name, depth in depths.items() if depth > DEEP and getattr(recipe.accumulate, name) == "fast"]


def some_rows(q: Quantized) -> Tensor:
    """The codes of at most 16 rows, spread evenly: [rows, K]."""
    codes = q.matrix
    return codes.view(torch.uint8)[:: max(codes.shape[0] // ROWS, 1)][:ROWS].view(codes.dtype)


@torch.no_grad()
def fast_bias(a: Tensor, b: Tensor) -> float:
    """The bias of `fast` on codes a [M, K] and b [N, K], as a share of the sums (-0.07: 7 % too small).

    Scales are left out: `fast` has none that change along K. NaN where a code is.
    """
    exact = product_exact(parts(a), parts(b))
    fast = accumulate(a, b, promoted=False)
    total = exact.abs().sum()
    return float(((fast - exact) * exact.sign()).sum() / total) if total != 0 else 0.0


def warn_of_bias(layer: str, product: str, depth: int, bias: float) -> None:
    """Say which product loses how much, and what to do."""
    if bias < WARN:
        warnings.warn(
            f"{layer}: the terms of {product} share a sign on this data, and accumulate.{product}='fast' sums {depth} "
            f"of them in Hopper's short accumulator: results come out about {-bias:.0%} too small there. Use "
            "'promoted' for this layer (Recipe.replace, or overrides).",
            stacklevel=2,
        )
