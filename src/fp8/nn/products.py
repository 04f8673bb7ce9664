"""One weight and its three FP8 products.

    forward     y  [T, N]  =  x      [T, K] · w   [N, K]^T  + bias
    grad_x      dx [T, K]  =  grad   [T, N] · w^T [K, N]^T
    grad_w      dw [N, K]  =  grad^T [N, T] · x^T [K, T]^T

Hopper reads both FP8 operands with K last, so x, w and grad are each needed in two orientations; each is read once and
written in both. Between forward and backward only x^T and w^T live, as codes: one byte an element, one orientation
each.

Codes never cross a differentiable edge. Autograd would cast a gradient to the type of the forward output, silently
turning it into unscaled FP8; so quantize, multiply and their backward are one `autograd.Function`, with high precision
at both ends.

`Fp8Products` is the part of a layer that holds what this needs: the recipe, the state of delayed scaling, and the
weight's codes once `refresh` has been called. It owns no parameter: the layer passes its weight in.

**Weight codes.** Without a refresh every forward quantizes the weight it is given. `fp8.refresh` writes the codes of
the current parameter, both orientations, into buffers, which are used until the module is moved, cast, copied or loaded
into. Whoever updates the weights calls it again (`fp8.attach` does so after each optimizer step); in eager mode another
tensor in the parameter's place, or a version counter that moved without a refresh, is noticed, and the stale codes are
not used. A weight that is computed anew for each call has no codes to hold.

**Recomputing.** Activation checkpointing runs a layer again inside backward, when the `fp8.autocast` around its forward
may have been left. So each call outside of backward leaves its recipe behind, and a call inside of it takes that one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import CheckpointError, ConvertError, ShapeError, TensorError
from ..formats import Format, format_of
from ..matmul import run_matmul
from ..quantize import INPUTS, Quantized, run_quantize, run_quantize_both
from ..quantize.many import Cast
from ..quantize.record import as_matrix, room_for_scale
from ..recipe import Operand, Recipe
from ..scaling import DelayedState, ScaleState, state_for
from ..tile import Tile
from .autocast import Products, active, recipe_in_use

X, W, GRAD = 0, 1, 2
PARTS = ("codes", "codes_t", "scale", "scale_t")
Pair = tuple[Quantized, Quantized | None]


@dataclass(frozen=True)
class Run:
    """What one call of a layer goes by, in forward and in the backward that belongs to it."""

    recipe: Recipe
    state: ScaleState | None
    record: bool
    backward: bool
    weight: Pair | None
    products: Products | None
    name: str

    def count(self, product: str) -> None:
        if self.products is not None:
            self.products.counts[self.name, product] += 1

    def quantize(self, x: Tensor, which: int, both: bool = True) -> tuple[Quantized, Any]:
        """x [rows, cols] as the recipe says: `(codes of x, codes of x.T or None)`."""
        recipe = self.recipe
        operand: Operand = (recipe.x, recipe.w, recipe.grad)[which]
        scale = self.state.before(which, x, self.record) if self.state is not None else None
        slot = self.slot(which)
        q, q_t, amax = _quantize(x, operand, recipe.power_of_two, scale, both, slot)
        self.note(which, amax, slot, q.scale)
        return q, q_t

    def slot(self, which: int) -> Tensor | None:
        """The amax of delayed scaling that quantizing raises in place, if it can."""
        return self.state.slot(which) if self.state is not None and self.record else None

    def note(self, which: int, amax: Tensor, slot: Tensor | None, scale: Tensor) -> None:
        """Tell delayed scaling what was quantized."""
        if self.state is None or not self.record:
            return
        if slot is None:
            self.state.after(which, amax, scale)
        else:
            self.state.noted(which, scale)


def _quantize(
    x: Tensor, operand: Operand, power_of_two: bool, scale: Tensor | None, both: bool, amax: Tensor | None
) -> tuple[Quantized, Quantized | None, Tensor]:
    """The codes of x, those of x.T if `both`, and the amax of x, or `amax`, raised to it."""
    x, row, tile = x.contiguous(), format_of(operand.format), operand.tile
    if both:
        codes, s, codes_t, s_t, largest = run_quantize_both(x, scale, row, tile, power_of_two, amax=amax)
        return Quantized(codes, s, tile, row), Quantized(codes_t, s_t, tile, row), largest
    codes, s, largest = run_quantize(x, scale, row, tile, power_of_two, amax=amax)
    return Quantized(codes, s, tile, row), None, largest


class _Linear(torch.autograd.Function):
    """x [T, K], weight [N, K], bias [N] or None -> y [T, N] of the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, run: Run) -> Tensor:
        need_x, need_w = (need and run.backward for need in ctx.needs_input_grad[:2])  # True under no_grad as well
        x_q, x_t = run.quantize(x, X, both=need_w)
        w_q, w_t = run.weight if run.weight is not None else run.quantize(weight, W, both=need_x)
        run.count("forward")
        ctx.run, ctx.dtypes = run, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.tiles = tuple(None if q is None else (q.tile, q.format) for q in (x_t, w_t if need_x else None))
        kept = [t for q in (x_t, w_t if need_x else None) if q is not None for t in (q.codes, q.scale)]
        ctx.save_for_backward(*kept)
        return run_matmul(x_q, w_q, x.dtype, run.recipe.accumulate.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run: Run = ctx.run
        x_type, w_type, bias_type = ctx.dtypes
        x_t, w_t = _restore(ctx.tiles, ctx.saved_tensors)
        grad_bias = grad.sum(0, dtype=torch.float32).to(bias_type) if ctx.needs_input_grad[2] else None
        if x_t is None and w_t is None:
            return None, None, grad_bias, None
        g, g_t = run.quantize(grad, GRAD, both=x_t is not None)
        grad_x = grad_w = None
        if w_t is not None:
            run.count("grad_x")
            grad_x = run_matmul(g, w_t, x_type, run.recipe.accumulate.grad_x)
        if x_t is not None:
            run.count("grad_w")
            grad_w = run_matmul(g_t, x_t, w_type, run.recipe.accumulate.grad_w)
        return grad_x, grad_w, grad_bias, None


def _restore(tiles: tuple[Any, ...], saved: tuple[Tensor, ...]) -> list[Quantized | None]:
    """The saved codes and scales as records again."""
    tensors = iter(saved)
    return [None if tile is None else Quantized(next(tensors), next(tensors), *tile) for tile in tiles]


def _mark(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight does, as far as torch can see: `.data.copy_` and inference tensors leave no trace."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class Fp8Products(nn.Module):
    """The FP8 part of a layer: recipe, delayed state, weight codes. Call it with x [..., K], the weight [N, K] and the
    bias."""

    codes: Any
    codes_t: Any
    scale: Any
    scale_t: Any
    fuses = True  # whether the kernels of `nn/fused.py` may take the place of this part

    def __init__(self, recipe: Recipe | None = None, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.recipe: Recipe | None = None
        self.delayed: ScaleState | None = None
        self.waiting: dict[str, Tensor] = {}
        for part in PARTS:
            self.register_buffer(part, None, persistent=False)
        self.made_of: tuple[int, int] | None = None
        self.prepared: Any = None
        self.last: Recipe | None = None
        self.set_recipe(recipe)

    def set_recipe(self, recipe: Recipe | None) -> None:
        """Change the recipe; what was made or remembered under another one is forgotten."""
        if recipe != self.recipe:
            self.forget()
            self.recipe = recipe
            self.delayed = None if recipe is None else self._new_state(recipe)

    def recipe_now(self) -> Recipe | None:
        """The recipe of this call; None: high precision. Recomputing in backward takes that of the call before it."""
        if torch.compiler.is_compiling():
            return recipe_in_use(self.recipe)
        if torch._C._current_graph_task_id() == -1:
            self.last = recipe_in_use(self.recipe)
        return self.last

    def extra_repr(self) -> str:
        return f"recipe={self.recipe.name if self.recipe else None!r}"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recipe = self.recipe_now()
        if recipe is None:
            return nn.functional.linear(x, weight, bias)
        x = self.checked(x, weight)
        run = self.run(recipe, weight, x.requires_grad)
        y = _Linear.apply(as_matrix(x), weight, bias, run)
        return y.view(*x.shape[:-1], weight.shape[0])

    def checked(self, x: Tensor, weight: Tensor) -> Tensor:
        """x in the type that the product runs in: its own, or that of the autocast around it."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        for what, tensor in (("takes", x), ("has a weight to quantize of", weight)):
            if tensor.dtype not in INPUTS:
                name = self.name or "an FP8 layer"
                raise TensorError(f"{name} {what} float32, bfloat16 or float16, not {tensor.dtype}.")
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise ShapeError(
                f"{self.name or 'an FP8 layer'} takes [..., {weight.shape[1]}]; x has shape {tuple(x.shape)}."
            )
        return x

    def run(self, recipe: Recipe, weight: Tensor, backward: bool) -> Run:
        record = self.training and torch.is_grad_enabled()
        state = self._state(recipe, weight)
        if record and isinstance(state, DelayedState) and torch.compiler.is_compiling():
            quantized = (X, *(() if self.codes is not None else (W,)))
            state.expect(*quantized, *((GRAD,) if backward or weight.requires_grad else ()))
        backward = torch.is_grad_enabled()
        return Run(recipe, state, record, backward, self._codes(recipe, weight), active().products, self.name)

    def _state(self, recipe: Recipe, weight: Tensor) -> ScaleState | None:
        if recipe.delayed is None:
            return None
        if self.delayed is None or not self.delayed.serves(recipe):  # a layer without a recipe, under autocast
            if torch.compiler.is_compiling():
                raise ConvertError(
                    "delayed scaling keeps state: give the layer its recipe (fp8.convert) before compiling."
                )
            state = self._new_state(recipe)
            self.delayed = None if state is None else state.to(weight.device)
        return self.delayed

    def _new_state(self, recipe: Recipe) -> ScaleState | None:
        """A state for the recipe: with what was loaded before there was one, else empty."""
        state, loaded = state_for(recipe), self.waiting
        if state is None or not loaded:
            return state
        try:
            state.load_state_dict(loaded)
        except RuntimeError:
            raise CheckpointError(
                f"{self.name or 'an FP8 layer'} was loaded with the state of another rule of delayed scaling ("
                f"{', '.join(f'{key} {list(value.shape)}' for key, value in loaded.items() if key[0] != '_')}), and "
                f"now meets {recipe.name} {recipe.delayed}. Use the recipe that it was trained with, or load without "
                "the keys that hold '.delayed.'."
            ) from None
        self.waiting = {}
        return state

    def _codes(self, recipe: Recipe, weight: Tensor) -> Pair | None:
        """The refreshed codes, if they are of this recipe and of the parameter as it is."""
        if self.codes is None or recipe is not self.recipe:
            return None
        if not torch.compiler.is_compiling() and self.made_of != _mark(weight):
            self.made_of = None  # for good: a later tensor may come to lie at the same address
            return None
        row, tile = format_of(recipe.w.format), recipe.w.tile
        scale_t = self.scale.t() if tile.transposes else self.scale_t
        return Quantized(self.codes, self.scale, tile, row), Quantized(self.codes_t, scale_t, tile, row)

    @torch.no_grad()
    def quantize_weight(self, weight: Tensor) -> tuple[Quantized, Quantized]:
        """The codes of a weight [N, K] and of its transpose, as the layer's next forward would make them."""
        recipe = self.recipe or recipe_in_use(None)
        if recipe is None:
            raise ConvertError(f"{self.name or 'this layer'} has no recipe: fp8.convert the model first.")
        state = self._state(recipe, weight)
        return Run(recipe, state, False, False, None, None, self.name).quantize(weight, W)

    def weight_form(self) -> tuple[Format, Tile, bool]:
        """Format and tile of the weight's codes, and whether its scales are powers of two. The layer has a recipe."""
        assert self.recipe is not None
        return format_of(self.recipe.w.format), self.recipe.w.tile, self.recipe.power_of_two

    @property
    def codes_follow(self) -> bool:
        """Whether an optimizer can make the weight's codes, or measure its amax, as it updates it: with one scale for
        the tensor, or for 128x128."""
        recipe = self.recipe
        article = recipe is not None and recipe.delayed is not None and recipe.delayed.rule == "article"
        return recipe is not None and not article and str(recipe.w.tile) in ("tensor", "128x128")

    @torch.no_grad()
    def cast(self, weight: Tensor) -> Cast:
        """What makes the codes of the weight as it is now, into the buffers, which stay where they are. The layer has a
        recipe; call `wrote` afterwards."""
        recipe = self.recipe
        assert recipe is not None
        self._make_room(weight.shape, weight.device, recipe.w)
        state, given, amax = self._state(recipe, weight), None, None
        if isinstance(state, DelayedState):
            given = state.scale[W] if state.warm[W] else None
            amax = state.pending[W] if self.training else None
        elif state is not None:
            self.scale.copy_(state.before(W, weight, self.training))
            given = self.scale
        scale_t = None if recipe.w.tile.transposes else self.scale_t
        return Cast(weight.detach().contiguous(), self.codes, self.codes_t, self.scale, scale_t, given, amax)

    def wrote(self, weight: Tensor) -> None:
        """Take note that the buffers now hold the codes of this weight."""
        if self.training and isinstance(self.delayed, DelayedState):
            self.delayed.noted(W, self.scale)
        self.made_of = _mark(weight)

    def _make_room(self, shape: tuple[int, ...], device: torch.device, w: Operand) -> None:
        """The buffers for codes [N, K], their transpose and scales, where there are none of this shape."""
        if self.codes is not None and self.codes.shape == shape and self.codes.device == device:
            return
        rows, cols = shape
        self.codes = torch.empty(rows, cols, dtype=format_of(w.format).dtype, device=device)
        self.codes_t = torch.empty(cols, rows, dtype=self.codes.dtype, device=device)
        self.scale = room_for_scale(w.tile, rows, cols, device)
        self.scale_t = None if w.tile.transposes else room_for_scale(w.tile, cols, rows, device)

    def forget(self) -> None:
        """Drop the weight codes: until the next refresh every forward quantizes."""
        self.codes = self.codes_t = self.scale = self.scale_t = self.made_of = self.prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling take along: all but the codes, whose weight is another one there."""
        bare = {"_buffers": {**self._buffers, **dict.fromkeys(PARTS)}, **dict.fromkeys(("made_of", "last", "prepared"))}
        return {**self.__dict__, **bare}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Products:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # type: ignore[override]
        """Also takes the state of delayed scaling that an autocast made, for which there is no module here yet."""
        self.forget()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.waiting = {}
        if self.delayed is None:
            under = f"{prefix}delayed."
            found = [key for key in state_dict if key.startswith(under)]
            self.waiting = {key[len(under) :]: state_dict[key].detach().clone() for key in found}
            unexpected = rest[-2]
            unexpected[:] = [key for key in unexpected if key not in found]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}delayed.{key}": value for key, value in self.waiting.items()})
