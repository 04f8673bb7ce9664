"""The FP8 part of a layer in quantization-aware training: operands rounded to codes, then multiplied in high precision.

    x ──► codes ──► x'   ┐
                         ├──► y = x' W'^T + b     forward, in the type of x
    W ──► codes ──► W'   ┘
    dx = dy W'       dW = dy^T x'                 backward: the gradient of x' is that of x, and of W' that of W

The codes are those that will be served: `served_input` makes both, the activation's here and in `FrozenLinear`, and the
weight's are those of `fp8.quantize` of the parameter as it is stored (the FP32 master under autocast), as an export of
it writes them. Only the product differs from the served one: it sums in another order, in the type of the model.

**The gradient passes straight through** (Bengio et al., "Estimating or propagating gradients through stochastic
neurons", 2013): rounding is a staircase, whose own derivative is zero. It passes also where a value saturates. A scale
measured from what it scales saturates nothing; under a given one (`static`, KV scales calibrated before), a gradient
cut off there would leave a clipped value no way back.

**Memory.** Codes and scales are what lives from forward to backward: one byte an element for x, where a layer in BF16
keeps two, and one for W.

**Scales that cannot be measured when served** (`static` inputs, heads of the KV cache) are the largest magnitude that
training has seen so far, `MeasuredScale`; evaluation writes nothing. The maximum is idempotent, so recomputed layers
and micro-batches need no care. Under data parallelism each rank has its own; the export is of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConvertError
from ..formats import format_of
from ..quantize import Quantized, run_quantize
from ..quantize.record import as_matrix
from ..quantize.scale_search import searched_scales
from ..recipe import Recipe
from ..tile import Tile
from .autocast import active
from .frozen_linear import served, served_input
from .products import Fp8Products, Pair

E4M3 = format_of("e4m3")


class _Rounded(torch.autograd.Function):
    """x [T, K], weight [N, K], bias [N] or None, and the codes of both -> y [T, N] of the type of x.

    x comes along for its gradient; it is multiplied itself only where it has no codes (`tiles[0]` is None).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Any, *codes: Tensor) -> Tensor:
        kept = x if tiles[0] is None else None
        ctx.save_for_backward(kept, *codes)
        ctx.tiles, ctx.types = tiles, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        inputs, weights = decoded(kept, codes, tiles, x.dtype)
        return F.linear(inputs, weights, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_type, weight_type, bias_type = ctx.types
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        kept, *codes = ctx.saved_tensors
        inputs, weights = decoded(kept, codes, ctx.tiles, x_type)
        grad_x = grad @ weights if need_x else None
        grad_w = (grad.t() @ inputs).to(weight_type) if need_w else None
        grad_bias = grad.sum(0, dtype=torch.float32).to(bias_type) if need_bias else None
        return grad_x, grad_w, grad_bias, None, *(None for _ in codes)


def decoded(x: Tensor | None, codes: Any, tiles: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The operands that the codes stand for; `x` itself where it has none."""
    weights = Quantized(codes[-2], codes[-1], tiles[1], E4M3).dequantize(dtype)
    return (x if x is not None else Quantized(codes[0], codes[1], tiles[0], E4M3).dequantize(dtype)), weights


class FakeProducts(Fp8Products):
    """In the place of `Fp8Products`: one product of rounded operands. Called with x [..., K], the weight and the bias.

    recipe          how x and the weight are quantized, and how the served product sums
    weight_only     x is not rounded
    inputs          the scale of x where it is one number for all (`static`), else None
    searched        each channel of the weight has the scale that errs least, looked for at every rounding
    with_it         the layers (themselves among them) whose weights share one per-tensor scale with this one
    """

    fuses = False

    def __init__(
        self, recipe: Recipe, name: str, *, weight_only: bool = False, searched: bool = False,
        inputs: MeasuredScale | None = None,
    ) -> None:  # fmt: skip
        super().__init__(recipe, name)
        self.weight_only, self.searched, self.inputs = weight_only, searched, inputs
        self.with_it: tuple[nn.Module, ...] = ()
        self.serves = False  # after `finalize`: the served product itself

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recipe = self.recipe_now()
        if recipe is None or self.recipe is None:
            return F.linear(x, weight, bias)
        x = self.checked(x, weight)
        w = self.rounded_weight(weight)
        if self.serves and not self.weight_only:
            return served(x, w, self.recipe, bias, self.input_scale, self.name)
        self.count()
        matrix, tiles, codes = as_matrix(x), (None, w.tile), (w.codes, w.scale)
        if not self.weight_only:
            q = served_input(matrix, self.recipe, self._scale_now(matrix))
            tiles, codes = (q.tile, w.tile), (q.codes, q.scale, *codes)
        y = _Rounded.apply(matrix, weight, bias, tiles, *codes)
        return y.view(*x.shape[:-1], weight.shape[0])

    def count(self) -> None:
        if (products := active().products) is not None:
            products.counts[self.name, "rounded"] += 1

    @torch.no_grad()
    def rounded_weight(self, weight: Tensor) -> Quantized:
        """The codes of the weight [N, K] as an export of it writes them."""
        assert self.recipe is not None
        tile, scale = self.recipe.w.tile, None
        weight = weight.detach().contiguous()
        if tile == Tile(0, 0):
            group: list[Any] = [weight] if len(self.with_it) < 2 else [layer.weight for layer in self.with_it]
            scale = scale_of(torch.stack([finite_amax(w) for w in group]).amax().view(1, 1), self.recipe.power_of_two)
        elif self.searched:
            scale = searched_scales(weight)
        power_of_two = self.recipe.power_of_two and scale is None
        codes, scale, _ = run_quantize(weight, scale, E4M3, tile, power_of_two)
        return Quantized(codes, scale, tile, E4M3)

    def quantize_weight(self, weight: Tensor) -> Pair:  # type: ignore[override]
        return self.rounded_weight(weight), None

    def _scale_now(self, x: Tensor) -> Tensor | None:
        return None if self.inputs is None else self.inputs(finite_amax(x.detach()).view(1)).view(1, 1)

    @property
    def input_scale(self) -> Tensor | None:
        """FP32 [1, 1] where the input has one scale. Raises `ConvertError` before anything was seen."""
        return None if self.inputs is None else self.inputs.found(self.name).view(1, 1)


class MeasuredScale(nn.Module):
    """Scales of n groups, FP32 [n]: of the largest magnitudes that passed in training, or given ones."""

    seen: Tensor
    given: Tensor | None

    def __init__(self, groups: int, power_of_two: bool, given: Tensor | None = None) -> None:
        super().__init__()
        self.power_of_two = power_of_two
        self.register_buffer("seen", torch.zeros(groups), persistent=False)
        self.register_buffer("given", given, persistent=False)

    @torch.no_grad()
    def forward(self, amax: Tensor) -> Tensor:
        """The scales to use for values with these largest magnitudes [n], FP32; in training they count from now on."""
        if self.given is not None:
            return self.given
        if self.training:
            self.seen.copy_(torch.maximum(self.seen, amax))
            return scale_of(self.seen, self.power_of_two)
        return scale_of(torch.where(self.seen > 0, self.seen, amax), self.power_of_two)

    def found(self, name: str) -> Tensor:
        """The scales that are exported."""
        if self.given is None and not bool((self.seen > 0).any()):
            raise ConvertError(
                f"{name} has a scale that training measures, and nothing passed in training mode yet: train first, or "
                "give prepare_qat calibrated scales."
            )
        return self.given if self.given is not None else scale_of(self.seen, self.power_of_two)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeasuredScale:
        """Moves, and never casts."""
        for name, held in self.named_buffers(recurse=False):
            setattr(self, name, held.to(fn(held).device))
        return self


def finite_amax(x: Tensor) -> Tensor:
    """The largest finite magnitude, FP32, of a tensor; 0 where there is none."""
    magnitude = x.float().abs()
    return torch.where(magnitude.isfinite(), magnitude, 0.0).amax()


def scale_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """The scales, FP32, of magnitudes of the same shape, as `fp8.quantize` gives them."""
    return run_quantize(amax.view(-1, 1), None, E4M3, Tile(1, 0), power_of_two)[1].view(amax.shape)
