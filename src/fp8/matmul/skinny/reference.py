"""Products of few rows, as the definition: the product of `fp8.matmul`, or an FP32 one, then the residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quantize.record import Quantized
from .. import reference

Operand = Quantized | Tensor


def skinny(x: Operand, w: Operand, out_dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if isinstance(x, Quantized) and isinstance(w, Quantized):
        y = reference.matmul(x, w, out_dtype, "promoted", bias)
    else:
        assert isinstance(x, Tensor) and isinstance(w, Tensor)
        y = x.float() @ w.float().t()
        y = (y if bias is None else y + bias.float()).to(out_dtype)
    return y if residual is None else residual + y
