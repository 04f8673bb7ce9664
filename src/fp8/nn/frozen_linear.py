"""A linear layer that holds FP8 codes and no parameter: what a checkpoint becomes when it is served.

The codes and scales are those of the file, in bytes. The activation is quantized as the checkpoint says, always in the
same way: one scale a token (or a group of a token's channels), measured when it passes, or one for all that was
calibrated before; so a token's result never depends on its batch. The product is `fp8.matmul`. A weight-only layer
decodes its weight and multiplies in the type of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConvertError, TensorError
from ..formats import format_of
from ..matmul import run_matmul
from ..quantize import INPUTS, Quantized, run_quantize
from ..recipe import Recipe
from ..tile import Tile
from .autocast import active, recipe_in_use


class _Served(torch.autograd.Function):
    """y, with a backward that refuses: a gradient that silently ended here would look like training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, name: str) -> Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConvertError(
            f"{ctx.name or 'this layer'} holds FP8 codes that were loaded to serve, and has no gradient. Train from "
            "the master weights of a training checkpoint (fp8 train --resume), or evaluate under torch.no_grad()."
        )


def served_input(x: Tensor, recipe: Recipe, input_scale: Tensor | None) -> Quantized:
    """The codes of an input `[T, K]` as a server makes them: scales measured by `recipe.x`, or `input_scale` [1, 1]."""
    row, tile = format_of(recipe.x.format), recipe.x.tile
    given = None if input_scale is None else input_scale.expand(x.shape[0], 1).contiguous()
    x = x.detach().contiguous()
    codes, scale, _ = run_quantize(x, given, row, tile, recipe.power_of_two and given is None)
    return Quantized(codes, scale, tile, row)


def served(
    x: Tensor, weight: Quantized, recipe: Recipe, bias: Tensor | None, input_scale: Tensor | None, name: str
) -> Tensor:
    """`x W^T + b` as it is served, codes times codes: x `[..., K]`, y `[..., N]` of its type. It has no gradient."""
    if (products := active().products) is not None:
        products.counts[name, "forward"] += 1
    codes = served_input(x.reshape(-1, x.shape[-1]), recipe, input_scale)
    y = run_matmul(codes, weight, x.dtype, recipe.accumulate.forward, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Served.apply(x, y, name)
    return y.view(*x.shape[:-1], y.shape[-1])


class FrozenLinear(nn.Module):
    """`y = x W^T + b` with W as it was exported. x [..., K] in FP32, BF16 or FP16; y [..., N] of the type of x, or of
    the surrounding `torch.autocast`.

    `recipe` says how x is quantized (`recipe.x`, `recipe.scale_rounding`) and how the product is summed
    (`recipe.accumulate.forward`). Inside `fp8.autocast(enabled=False)` the decoded weight is used, in the type of x.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Quantized,
        recipe: Recipe,
        bias: Tensor | None = None,
        name: str = "",
        *,
        input_scale: Tensor | None = None,
        weight_only: bool = False,
    ) -> None:
        """`input_scale` FP32 [1, 1]: the calibrated scale of x. `weight_only`: x is not quantized."""
        super().__init__()
        self.recipe, self.name, self.weight_only = recipe, name, weight_only
        self.tile: Tile = weight.tile
        self.format = weight.format
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def quantized_weight(self) -> Quantized:
        """The codes [out_features, in_features] and scales of the checkpoint."""
        return Quantized(self.codes, self.scale, self.tile, self.format)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        if x.dtype not in INPUTS:
            raise TensorError(f"{self.name or 'a frozen layer'} takes float32, bfloat16 or float16, not {x.dtype}.")
        if self.weight_only or recipe_in_use(self.recipe) is None:
            return nn.functional.linear(x, self.quantized_weight().dequantize(x.dtype), self._bias(x.dtype))
        return served(x, self.quantized_weight(), self.recipe, self.bias, self.input_scale, self.name)

    def quantized_input(self, x: Tensor) -> Quantized:
        """The codes of x [rows, K] that the weight is multiplied by; not for weight-only layers, which make none."""
        return served_input(x, self.recipe, self.input_scale)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tile={str(self.tile)!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Moves, and never casts: codes are codes and scales are FP32, whatever `model.to(dtype)` asks of the rest."""
        for name, held in self.named_buffers(recurse=False):
            setattr(self, name, held.to(fn(held).device) if held.device.type != "meta" else fn(held))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLinear:
        weight = Quantized(self.codes.clone(), self.scale.clone(), self.tile, self.format)
        bias, inputs = (None if t is None else t.clone() for t in (self.bias, self.input_scale))
        return FrozenLinear(weight, self.recipe, bias, self.name, input_scale=inputs, weight_only=self.weight_only)
