"""`fp8.Linear` and `fp8.Conv2d`: torch's layers with their products in FP8.

Both are subclasses that keep torch's parameters, names and initialization, so that a layer becomes FP8, or stops being
it, by changing its class (`fp8.convert`, `fp8.revert`): parameters, hooks, optimizer state and whoever else holds the
module stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RecipeError, ShapeError
from ..quantize import Quantized
from ..recipe import Recipe
from .products import Fp8Products

Weighted = tuple[Fp8Products, Tensor]


class Linear(nn.Linear):
    """`y = x W^T + b` with FP8 forward, input-gradient and weight-gradient products.

    x [..., in_features] in FP32, BF16 or FP16; weight [out_features, in_features]; y has the type of x, or of the
    surrounding `torch.autocast`. `recipe` is a preset's name or a `Recipe`; without one the layer is FP8 inside
    `fp8.autocast` only.
    """

    fp8: Fp8Products

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, recipe: str | Recipe | None = None, **kwargs: Any
    ) -> None:
        if isinstance(bias, (str, Recipe)):
            raise RecipeError(f"the third argument is bias, as in torch: write Linear(..., recipe={bias!r}).")
        super().__init__(in_features, out_features, bias, **kwargs)
        self.fp8 = Fp8Products(None if recipe is None else Recipe.of(recipe))

    def forward(self, input: Tensor) -> Tensor:
        return self.fp8(input, self.weight, self.bias)

    def fp8_weights(self) -> Iterator[Weighted]:
        """Each FP8 part with the weight [N, K] that it multiplies by."""
        yield self.fp8, self.weight

    @property
    def recipe(self) -> Recipe | None:
        return self.fp8.recipe

    @property
    def name(self) -> str:
        return self.fp8.name

    def quantized_weight(self) -> Quantized:
        """The codes [out_features, in_features] that the next forward multiplies by."""
        return self.fp8.quantize_weight(self.weight)[0]


class Conv2d(nn.Conv2d):
    """A convolution as an FP8 product of its im2col rows [B*H*W, I*kh*kw] with its weight [O, I*kh*kw].

    Input [B, I, H, W] or [I, H, W]. One group; every stride, padding, dilation and padding mode of `torch.nn.Conv2d`.
    A 1 x 1 kernel copies nothing when its input is `torch.channels_last`, and its output is so too.
    """

    fp8: Fp8Products

    def __init__(self, *args: Any, recipe: str | Recipe | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if recipe is not None and self.groups != 1:
            raise ConfigError(
                f"a convolution in {self.groups} groups has products too thin for FP8: leave out recipe={recipe!r}, "
                "and it runs in high precision."
            )
        self.fp8 = Fp8Products(None if recipe is None else Recipe.of(recipe))

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8.recipe_now() is None or self.groups != 1:
            return super().forward(input)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            name, shape = self.fp8.name or "an FP8 convolution", tuple(input.shape)
            raise ShapeError(f"{name} takes [batch, {self.in_channels}, height, width]; the input has shape {shape}.")
        x = input if input.dim() == 4 else input.unsqueeze(0)
        x, padding = self._padded(x)
        if self._is_product_of_pixels(x, padding):
            y = self.fp8(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
            return y if input.dim() == 4 else y.squeeze(0)
        rows = nn.functional.unfold(x, self.kernel_size, self.dilation, padding, self.stride)  # type: ignore[arg-type]
        y = self.fp8(rows.transpose(1, 2), self.weight.flatten(1), self.bias)
        y = y.transpose(1, 2).reshape(x.shape[0], self.out_channels, *self._output_size(x, padding))
        return y if input.dim() == 4 else y.squeeze(0)

    def _is_product_of_pixels(self, x: Tensor, padding: tuple[int, int]) -> bool:
        """Whether the rows lie in memory as they are: a 1 x 1 kernel over every pixel of a channels-last input."""
        every = self.kernel_size == (1, 1) and self.stride == (1, 1) and padding == (0, 0)
        return every and x.is_contiguous(memory_format=torch.channels_last)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded here where `unfold` cannot, and what is left for `unfold` to pad."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding  # type: ignore[return-value]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return nn.functional.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)

    def _output_size(self, x: Tensor, padding: tuple[int, int]) -> tuple[int, int]:
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        height, width = (
            (size + 2 * pad - span) // step + 1
            for size, pad, span, step in zip(x.shape[2:], padding, spans, self.stride, strict=True)
        )
        return height, width

    def fp8_weights(self) -> Iterator[Weighted]:
        yield self.fp8, self.weight.flatten(1)

    def quantized_weight(self) -> Quantized:
        """The codes [O, I*kh*kw] that the next forward multiplies by."""
        with torch.no_grad():
            return self.fp8.quantize_weight(self.weight.flatten(1))[0]
