"""What a layer of a served model does between its attention and its residual stream: few calls, each one a fusion.

    norm_linear        product(norm(h)), and h              qkv, gate and up
    linear_add         residual + product(x)                the attention's output
    gated_linear_add   residual + product(silu(a) * b)      down
    norm_logits        product(norm(h)) in FP32             the head

x, h and every result are BF16 matrices, one row a token; `product` is `x W^T + b`. What is here is the definition, step
by step: each step rounds to BF16 what the next one reads, and an FP8 layer quantizes the rounded value. A kernel may
join the steps of a call; it may not skip a rounding.

    norm       `fused/norm`: RN(RN32(RN32(h * rstd) * weight))
    silu       `fused/activation`: RN(silu(a) * b), in FP32
    product    FP8: `fp8.matmul` of codes, quantized as the checkpoint says, whatever the number of rows
               INT8, for comparison: `nn/int8_linear.py`
               BF16, and weight-only FP8 once decoded: FP32 products and sums, then the bias, then one rounding
    residual   RN(residual + product)

**A row's result never depends on its company.** A product of FP8 or INT8 is summed exactly, so the order of the sum,
which libraries choose by the number of rows, does not matter. A BF16 product is not: on a CPU it is computed for `ROWS`
rows at a time, filled up with zeros, so that every call has the same shape. (Where in the block a row stands must not
matter either. For MKL's FP32 products it does not, at any shape that was tried: the tests hold it.) The gate runs row
by row: torch computes what is left over of a vector by another exponential, and where that falls depends on the shape.
On a GPU these come from cuBLAS and kernels, in one piece.

**On a GPU** the norm, the gate and the quantization that follows are one launch (`fused/rows`), and products of up to
64 rows come from `matmul/skinny`, with bias and residual: a layer of a decode step is nine launches. Those of up to 16
rows, of 17 to 64 and of more, which are cuBLASLt's, add in three orders: a row's last bits may differ between them. The
residual of cuBLASLt's is added by the norm that follows, which reads both (`Sum`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...backends import why_not_triton
from ...formats import format_of
from ...fused.activation import activation
from ...fused.norm import norm as fused_norm
from ...fused.rows import Into, add_norm_codes, gated_codes, gated_values, norm_codes, norm_values, row_codes
from ...matmul import run_matmul
from ...matmul.skinny import skinny
from ...matmul.skinny import why_not as why_not_skinny
from ...nn.frozen_linear import FrozenLinear
from ...nn.int8_linear import Int8Linear
from ...quantize import Quantized

ROWS = 16  # rows of one BF16 product on a CPU
SLAB = 1 << 12  # outputs whose weights are widened at once


class Norm(nn.Module):
    """An RMS norm's weight, BF16 [K], and epsilon."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps


class Linear(nn.Module):
    """A matrix in BF16 [N, K], with or without a bias [N]. One in FP8 is a `FrozenLinear`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)


Matrix = Linear | FrozenLinear | Int8Linear


# --------------------------------------------------------------------------- the calls of a layer


@dataclass(frozen=True)
class Sum:
    """h + y [T, N], not added yet: on a GPU the norm that follows does it in passing."""

    h: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.h)


Stream = Tensor | Sum  # the residual stream


def settled(h: Stream) -> Tensor:
    """The stream as one tensor."""
    return h if isinstance(h, Tensor) else h.h + h.y


def norm_linear(h: Stream, norm: Norm, linear: Matrix) -> tuple[Tensor, Tensor]:
    """The product `[T, N]` of the norm of h [T, K], and h."""
    if (into := joined(h, linear)) is None:
        h = settled(h)
        return product(normed(h, norm), linear), h
    if isinstance(h, Sum):
        h, codes = add_norm_codes(h.h, h.y, norm.weight, norm.eps, into)
        return code_product(codes, linear), h
    return code_product(norm_codes(h, norm.weight, norm.eps, into), linear), h


def linear_add(x: Tensor | Quantized, linear: Matrix, residual: Tensor) -> Stream:
    """`residual [T, N]` and the product of x [T, K], or of its codes, added."""
    if isinstance(x, Quantized):
        return code_sum(x, linear, residual)
    if (into := joined(x, linear)) is not None:
        return code_sum(row_codes(x, into), linear, residual)
    if isinstance(linear, Linear) and few(x, linear.weight):
        return skinny(x, linear.weight, x.dtype, linear.bias, residual)
    return residual + product(x, linear)


def gated_linear_add(gate_up: Tensor, linear: Matrix, residual: Tensor) -> Stream:
    """`residual [T, N]` and the product of silu(gate) * up, added; `gate_up` holds both side by side, [T, 2 K]."""
    if (into := joined(gate_up, linear)) is not None:
        return code_sum(gated_codes(gate_up, into), linear, residual)
    return linear_add(gated(gate_up), linear, residual)


def norm_logits(h: Tensor, norm: Norm, head: Matrix) -> Tensor:
    """The logits `[T, V]` of h [T, K], FP32: the head's sums are not rounded to BF16."""
    return product(normed(h, norm), head, torch.float32)


# --------------------------------------------------------------------------- joined steps, on a GPU


def joined(x: Stream, linear: Matrix) -> Into | None:
    """How the input of an FP8 layer is quantized by the kernel that makes it; None: step by step."""
    if (isinstance(x, Tensor) and x.device.type == "cpu") or not isinstance(linear, FrozenLinear) or linear.weight_only:
        return None
    operand, recipe = linear.recipe.x, linear.recipe
    return Into(format_of(operand.format), operand.tile, recipe.power_of_two, linear.input_scale)


def code_product(x: Quantized, linear: Matrix) -> Tensor:
    """The product of codes by an FP8 layer, BF16."""
    assert isinstance(linear, FrozenLinear)
    weight = linear.quantized_weight()
    if few(x, weight):
        return skinny(x, weight, torch.bfloat16, linear.bias)
    return run_matmul(x, weight, torch.bfloat16, linear.recipe.accumulate.forward, linear.bias)


def code_sum(x: Quantized, linear: Matrix, residual: Tensor) -> Stream:
    """The residual and the product of codes by an FP8 layer: added where the product's kernel does it."""
    assert isinstance(linear, FrozenLinear)
    if few(x, weight := linear.quantized_weight()):
        return skinny(x, weight, torch.bfloat16, linear.bias, residual)
    return Sum(residual, code_product(x, linear))


def few(x: Quantized | Tensor, weight: Quantized | Tensor) -> bool:
    """Whether the kernel for few rows takes this product."""
    device = x.codes.device if isinstance(x, Quantized) else x.device
    return device.type != "cpu" and why_not_triton(device) is None and why_not_skinny(x, weight) is None


# --------------------------------------------------------------------------- their steps


def normed(h: Tensor, norm: Norm) -> Tensor:
    """The RMS norm of each row, BF16."""
    if h.device.type != "cpu":
        return norm_values(h, norm.weight, norm.eps)
    _, _, y = fused_norm(h, None, norm.weight, norm.eps, torch.bfloat16, None)
    assert isinstance(y, Tensor)
    return y


def gated(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, BF16 [T, K], of [T, 2 K]."""
    if gate_up.device.type != "cpu":
        return gated_values(gate_up)
    parts = [activation(row, "silu", True, None) for row in gate_up.split(1)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def product(x: Tensor, linear: Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`x W^T + b`, rounded once to `dtype`: `[T, N]`."""
    if isinstance(linear, Linear):
        return high_product(x, linear.weight, linear.bias, dtype)
    if isinstance(linear, Int8Linear):
        return linear(x, dtype)
    weight = linear.quantized_weight()
    if linear.weight_only:
        return high_product(x, weight.dequantize(x.dtype), linear.bias, dtype)
    codes = linear.quantized_input(x)
    if few(codes, weight):
        return skinny(codes, weight, dtype, linear.bias)
    return run_matmul(codes, weight, dtype, linear.recipe.accumulate.forward, linear.bias)


def high_product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product of BF16 matrices, summed in FP32."""
    if few(x, weight):
        return skinny(x, weight, dtype, bias)
    if x.device.type != "cpu":
        if dtype == x.dtype:
            return nn.functional.linear(x, weight, bias)
        y = torch.mm(x, weight.t(), out_dtype=dtype)
    else:
        y = torch.cat([_in_blocks(x, slab) for slab in weight.split(SLAB)], 1)
    return (y if bias is None else y + bias.float()).to(dtype)


def _in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in FP32, `ROWS` rows at a time."""
    wide, tokens = weight.float().t(), x.shape[0]
    full = x.new_zeros(-(-tokens // ROWS) * ROWS, x.shape[1], dtype=torch.float32)
    full[:tokens] = x
    return torch.cat([block @ wide for block in full.split(ROWS)])[:tokens]
