"""Rounding that makes up for its own errors: the second-order method of GPTQ, on the FP8 grid.

Rounding each weight to the nearest code is best for the weight, not for the layer: what counts is `y = x W^T`, and
where two inputs move together, an error in one weight can be made up for in the other.

**What is minimized.** X [T, K] are the layer's inputs as they are served (`sequential.py`), W [N, K] the weight, W^
the decoded codes. With H = X^T X, each row of W adds `(w - w^) H (w - w^)^T` to the squared error of the outputs: N
problems that share one H, which is all that the text leaves behind.

**The method.** Columns are rounded one after the other. An error e made in column j is made up for, as well as the
columns that are still free allow, by moving those; the best move is a row of the Cholesky factor of the inverse,
H^-1 = U^T U with U upper triangular: column k > j loses `e U[j, k] / U[j, j]`. One factorization serves all rows.
`carry` is U with its rows divided by their diagonal. (Frantar et al., "GPTQ", 2022; Hassibi & Stork, "Optimal brain
surgeon", 1993. Rounding so is Babai's nearest plane: Chen et al., "The geometry of LLM quantization", 2025.)

**Which order.** Late columns find few that could still make up for them. `order="activation"` begins with the largest
inputs, diag(H) descending, ties by index; `"index"` goes from left to right. Scales are those of the scheme and are
fixed before: what carries a weight beyond the largest code is clipped, and the error carried on like any other.

**What W should be.** The served layer sees rounded inputs X, and layers before it have rounded already; the model that
it should be like saw others, X'. So the weight to be rounded may first be regressed onto the outputs that it should
give, Y = X' W^T: W* = W + W (X' - X)^T X (H + damping)^-1. Then |Y - X W^^T|^2 = |X (W* - W^)^T|^2 + what no weight can
change, so that rounding W* with H is the whole problem. It is `target="output"` and no default: the regression fits
K numbers a row to the text, errors included, and on a small text it lost more than it won (`docs/log.md`). Hence a
damping of its own, `regression`, ten times that of rounding. `target="stream"` asks more of the last layer of a block,
whose outputs are added to the hidden states: it should give what these lack behind the block, E = h' - h, whichever
layer before it was the cause: W* = W + E^T X (H + damping)^-1.

**Damping.** `damping` times the mean of diag(H) is added to its diagonal: what few rows of text say of K inputs is
noise below that. A dead input (its row of H is zero) is left with the damping alone: it takes nothing, gives nothing,
and its weights are rounded to nearest. Without any statistics all of them are: H = 0 and H = identity give plain codes,
to the bit.

**The same codes on every device.** Factor and regression come from LAPACK, in FP64 and always on the CPU: H has a
condition of up to K / damping, 10^5 and more, which FP32 would not survive; and a GPU's solver sums in another order.
They are then rounded to FP32, and from there on (`sweep`) every bit is defined. Within a block of 128 columns there are
only elementwise IEEE operations in a fixed order: a product, then a sum, in two operators that nothing contracts to a
fused one. What a block carries to later blocks is a matrix product, whose order of summation is nobody's promise; so
its operands are first rounded to whole numbers of 22 bits, errors by row and `carry` by column. Sums of 128 such
products stay below 2^53, FP64 holds them exactly, and exact sums have no order. Law: 0 codes differ between CPU and
GPU, given weights, scales and statistics.

Left out: searching the scale together with the codes (one searched before, `Options(scales="search")`, leaves nothing
to speak of: `docs/log.md`), and descent on codes after the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, suggest
from ..formats import format_of
from ..quantize.reference import nearest

DAMPING, REGRESSION = 0.1, 1.0
ORDERS = ("activation", "index")
BLOCK = 128  # columns between two exact products
BITS = 22  # of their operands: 2 * 22 + log2(128) = 51 < 53
E4M3 = format_of("e4m3")


@dataclass(frozen=True)
class Moments:
    """What text leaves behind of a layer: FP64, on the CPU.

    hessian    X^T X [K, K] of the inputs as served
    drift      (X' - X)^T X [K, K], X' being the inputs in high precision
    lack       E^T X [N, K], E being what the outputs lack; it takes the place of W drift

    Without either, the weight itself is rounded.
    """

    hessian: Tensor
    drift: Tensor | None = None
    lack: Tensor | None = None


@dataclass(frozen=True)
class Factor:
    """The order of columns, int64 [K], and what an error in one does to the later ones: FP32 [K, K], in that order,
    upper triangular, with ones on its diagonal."""

    order: Tensor
    carry: Tensor


def one_order(order: str) -> None:
    """Refuse an order that is unknown."""
    if order not in ORDERS:
        raise ConfigError(f"order cannot be {order!r}. {suggest(order, ORDERS)}")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with `damping` times its mean diagonal added to its diagonal; the identity where H is zero.

    Raises `DataError` where it is not finite.
    """
    mean = float(hessian.diagonal().mean())
    if not bool(hessian.isfinite().all()):
        raise DataError("activations are not finite: the model overflows on this text. Calibrate it in another type.")
    return hessian + (damping * mean or float(mean == 0)) * torch.eye(len(hessian), dtype=hessian.dtype)


def factor(hessian: Tensor, damping: float = DAMPING, order: str = "activation") -> Factor:
    """The factor of H [K, K], FP64 on the CPU. Raises `DataError` where H is singular in spite of the damping."""
    one_order(order)
    columns = torch.arange(len(hessian))
    if order == "activation":
        columns = hessian.diagonal().argsort(descending=True, stable=True)
    full = damped(hessian, damping)[columns][:, columns]
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
        upper = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise DataError(
            f"the inputs' second moments cannot be inverted with damping {damping}: raise the damping, or calibrate on "
            "more text."
        ) from None
    return Factor(columns, (upper / upper.diagonal()[:, None]).float())


def regressed(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """W* [N, K], FP32: the weight that, on the inputs as served, comes nearest to the outputs in high precision."""
    if moments.drift is None and moments.lack is None:
        return weight.float()
    lacks = weight.double() @ moments.drift if moments.lack is None else moments.lack  # type: ignore[operator]
    root = torch.linalg.cholesky(damped(moments.hessian, damping))
    return (weight.double() + torch.cholesky_solve(lacks.t(), root).t()).float()


def sweep(weight: Tensor, scale: Tensor, factor: Factor) -> Tensor:
    """E4M3 codes [N, K] of a weight FP32 [N, K], errors carried on; on any device, with the same bits.

    `scale` FP32, [N, K] or what broadcasts to it, dequantizes.
    """
    device = weight.device
    order, carry = factor.order.to(device), factor.carry.to(device)
    w = weight.float()[:, order].t().contiguous()  # [K, N]: a column of the weight lies together
    s = scale.expand(weight.shape)[:, order].t()
    carried, codes = torch.zeros_like(w), torch.empty(w.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(w), BLOCK):
        block = slice(first, first + BLOCK)
        errors = _sweep_block(w[block], s[block], carry[block, block], carried[block], codes[block])
        rest = slice(first + BLOCK, None)
        carried[rest] = (carried[rest].double() + exact_product(carry[block, rest].t(), errors)).float()
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous().view(torch.float8_e4m3fn)


def _sweep_block(w: Tensor, scale: Tensor, carry: Tensor, carried: Tensor, codes: Tensor) -> Tensor:
    """Round the columns of one block, which lie in rows here; the errors [columns, N]. Fills `carried` and `codes`."""
    errors = torch.empty_like(w)
    for j in range(len(w)):
        wanted = w[j] - carried[j]
        found = nearest(wanted / scale[j], E4M3)
        codes[j] = found.view(torch.uint8)
        errors[j] = wanted - found.float() * scale[j]
        carried[j + 1 :] += carry[j, j + 1 :, None] * errors[j]
    return errors


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [M, k] @ b [k, N]` in FP64 for k up to 128, the same bits in any order of summation.

    Both are first rounded to multiples of a power of two, `BITS` below the largest magnitude of a's row or b's column.
    """
    assert a.shape[1] <= BLOCK
    unit_a, unit_b = unit(a, 1), unit(b, 0)
    whole = (a / unit_a).round().double() @ (b / unit_b).round().double()
    return whole * unit_a.double() * unit_b.double()


def unit(x: Tensor, dim: int) -> Tensor:
    """The power of two, FP32, of which no |x| along `dim` is more than 2^BITS multiples; made from bits."""
    amax = x.abs().amax(dim, keepdim=True)
    power = ((amax.view(torch.int32) & 0x7F800000) + (1 << 23)).view(torch.float32)
    return (power * 2.0**-BITS).clamp(min=2.0**-126)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of the outputs, by row [N], of weights that are off by `difference` [N, K]."""
    off = difference.double()
    return ((off @ hessian) * off).sum(1)
