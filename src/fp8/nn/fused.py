"""A transformer block in few kernels: its two halves as autograd functions, in FP8 and in high precision.

    x ──► norm ──► qkv product ──► rope ──► q, k, v ──► attention (torch's) ──► out product
    h = x + that ──► norm ──► up product ──► activation ──► down product ──► + h

An autograd function starts where values become codes and ends where they are values again, for codes cross no
differentiable edge: `NormQkvRope` is the first line up to q, k, v; `NormMlp` is the second, with the residual add
before and after it. Both also hand on the residual stream, so that its gradient arrives where the norm's backward adds
to it.

**What lives from forward to backward**: the residual stream, 1 / RMS, and gate and up; the weights' transposed codes,
unless `refresh` holds them, but for an `up` weight with one scale, which is read a second time. The inputs of the
products are not kept: the norm's backward makes the first pair of them again as transposed codes, the activation's
backward the last one, from tensors that must live anyway.

`why_not` says when a block takes this path; otherwise it runs module by module, to the same codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backends import why_not_triton
from ..formats import format_of
from ..fused import (
    Codes,
    Heads,
    Target,
    across,
    activation,
    activation_backward,
    norm,
    norm_across,
    norm_backward,
    rope,
    rope_backward,
)  # fmt: skip
from ..fused.target import MODES
from ..matmul import run_matmul
from ..quantize import Quantized
from ..quantize.record import as_matrix
from ..recipe import Recipe
from .products import GRAD, Pair, Run, W, X

LONGEST = 16384  # the longest row that a norm's program holds


def target_of(run: Run, which: int) -> Target:
    """How an operand of this call is quantized."""
    recipe = run.recipe
    operand = (recipe.x, recipe.w, recipe.grad)[which]
    scale = run.state.before(which, torch.empty(0), run.record) if run.state is not None else None
    return Target(format_of(operand.format), operand.tile, recipe.power_of_two, scale, run.slot(which))


def operands(codes: Codes, target: Target) -> tuple[Any, Any]:
    """The codes and the transposed codes as operands of products."""
    down = None if codes.codes is None else Quantized(codes.codes, codes.scale, target.tile, target.format)
    turned = None if codes.codes_t is None else Quantized(codes.codes_t, codes.scale_t, target.tile, target.format)  # type: ignore[arg-type]
    return down, turned


def again(target: Target, scale: Tensor | None) -> Target:
    """The target with the scale that its forward used, where one scale serves both orientations."""
    return target.with_scale(scale if str(target.tile) == "tensor" else None)


def weights(run: Run, weight: Tensor, backward: bool, again: bool = False) -> Pair:
    """The weight's codes: those that `refresh` holds, or fresh ones; the transposed ones only if they are kept, and not
    made `again` in the backward."""
    if run.weight is not None:
        return run.weight
    return run.quantize(weight, W, both=backward and not (again and _can_be_made_again(run, weight)))


def _can_be_made_again(run: Run, weight: Tensor) -> bool:
    """Whether the backward can make the weight's transposed codes anew: where one scale serves both orientations, that
    costs a second reading of the weight and saves a byte for each of its elements."""
    return str(run.recipe.w.tile) == "tensor" and weight.dtype == torch.bfloat16


def kept_weight(name: str, pair: Pair, weight: Tensor) -> dict[str, Tensor]:
    """What `turned_weight` needs: transposed codes, or the weight and the scale of its codes."""
    if pair[1] is not None:
        return {name: pair[1].codes, f"{name}_scale": pair[1].scale}
    return {f"{name}_itself": weight, f"{name}_scale": pair[0].scale}


def turned_weight(kept: dict[str, Tensor], run: Run, name: str) -> Quantized:
    """The transposed weight as an operand of grad_x."""
    operand, scale = run.recipe.w, kept[f"{name}_scale"]
    form = format_of(operand.format)
    if name in kept:
        return Quantized(kept[name], scale, operand.tile, form)
    made = across(kept[f"{name}_itself"], Target(form, operand.tile, run.recipe.power_of_two, scale))
    assert made.codes_t is not None
    return Quantized(made.codes_t, scale, operand.tile, form)


def product(run: Run, name: str, a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    run.count(name)
    return run_matmul(a, b, dtype, getattr(run.recipe.accumulate, name))


class Kept:
    """Tensors for `save_for_backward`, by name; None is kept as None."""

    def __init__(self, ctx: Any, **tensors: Tensor | None) -> None:
        self.names = tuple(name for name, tensor in tensors.items() if tensor is not None)
        ctx.save_for_backward(*(tensors[name] for name in self.names))

    def read(self, ctx: Any) -> dict[str, Tensor]:
        return dict(zip(self.names, ctx.saved_tensors, strict=True))


class NormQkvRope(torch.autograd.Function):
    """x [T, K], the norm's weight [K], that of the joined product [(H + 2 KV) D, K] -> x, q [B, H, S, D], k and v
    [B, KV, S, D] in `dtype`; T = B * S."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, run: Run, eps: float, heads: Heads, tokens: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        backward = run.backward and any(ctx.needs_input_grad[:3])
        target = target_of(run, X)
        _, rstd, y = norm(x, None, scale, eps, dtype, target)
        assert isinstance(y, Codes)
        run.note(X, y.amax, target.amax, y.scale)
        pair = weights(run, weight, backward)
        qkv = product(run, "forward", operands(y, target)[0], pair[0], dtype)
        if backward:
            ctx.kept = Kept(
                ctx, x=x, scale=scale, rstd=rstd, keys=y.keys_t, used=y.scale, **kept_weight("w", pair, weight)
            )
            ctx.rest = run, heads, target.with_scale(None), dtype, weight.dtype
        return x.view_as(x), *split(rope(qkv, tokens, heads), tokens, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run, heads, target, dtype, weight_type = ctx.rest
        kept = ctx.kept.read(ctx)
        into = target_of(run, GRAD)
        grad = rope_backward(dq, dk, dv, heads, into)
        assert isinstance(grad, Codes)
        run.note(GRAD, grad.amax, into.amax, grad.scale)
        g, g_t = operands(grad, into)
        dy = product(run, "grad_x", g, turned_weight(kept, run, "w"), dtype)
        x, rstd, scale = kept["x"], kept["rstd"], kept["scale"]
        x_t = norm_across(x, rstd, scale, dtype, again(target, kept["used"]), kept.get("keys"))
        dw = product(run, "grad_w", g_t, operands(x_t, target)[1], weight_type)
        del grad, g, g_t, x_t
        dx, dscale = norm_backward(dy, x, rstd, scale, dh)
        return dx, dscale, dw, None, None, None, None, None


class NormMlp(torch.autograd.Function):
    """h + branch [T, K] = h2;  h2 + down(f(up(norm(h2)))) [T, K], in the type of h."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, branch: Tensor, scale: Tensor, up: Tensor, down: Tensor, up_run: Run, down_run: Run,
        eps: float, function: str, gated: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        backward = up_run.backward and any(ctx.needs_input_grad[:5])
        target, target_a = target_of(up_run, X), target_of(down_run, X)
        h2, rstd, y = norm(h, branch, scale, eps, dtype, target)
        assert isinstance(y, Codes)
        up_run.note(X, y.amax, target.amax, y.scale)
        up_pair = weights(up_run, up, backward, again=True)  # more than half of a layer's codes
        inner = product(up_run, "forward", operands(y, target)[0], up_pair[0], dtype)
        a = activation(inner, function, gated, target_a)
        assert isinstance(a, Codes)
        down_run.note(X, a.amax, target_a.amax, a.scale)
        down_pair = weights(down_run, down, backward)
        y_down = product(down_run, "forward", operands(a, target_a)[0], down_pair[0], dtype)
        if backward:
            ctx.kept = Kept(
                ctx, h2=h2, scale=scale, rstd=rstd, inner=inner, keys=y.keys_t, used=y.scale, a_keys=a.keys_t,
                a_used=a.scale, **kept_weight("up", up_pair, up), **kept_weight("down", down_pair, down),
            )  # fmt: skip
            ctx.rest = up_run, down_run, target.with_scale(None), target_a.with_scale(None), function, gated, dtype
            ctx.types = up.dtype, down.dtype
        return h2 + y_down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up_run, down_run, target, target_a, function, gated, dtype = ctx.rest
        kept = ctx.kept.read(ctx)
        g, g_t = down_run.quantize(dout.to(dtype), GRAD)
        da = product(down_run, "grad_x", g, turned_weight(kept, down_run, "down"), dtype)
        del g
        into = target_of(up_run, GRAD)
        grad, a_t = activation_backward(
            da, kept["inner"], function, gated, into, again(target_a, kept["a_used"]), kept.get("a_keys")
        )
        assert isinstance(grad, Codes)
        assert a_t is not None
        del da
        up_run.note(GRAD, grad.amax, into.amax, grad.scale)
        d_down = product(down_run, "grad_w", g_t, operands(a_t, target_a)[1], ctx.types[1])
        del g_t, a_t
        g, g_t = operands(grad, into)
        dy = product(up_run, "grad_x", g, turned_weight(kept, up_run, "up"), dtype)
        del g
        h2, rstd, scale = kept["h2"], kept["rstd"], kept["scale"]
        y_t = norm_across(h2, rstd, scale, dtype, again(target, kept["used"]), kept.get("keys"))
        d_up = product(up_run, "grad_w", g_t, operands(y_t, target)[1], ctx.types[0])
        del grad, g_t, y_t
        dh, dscale = norm_backward(dy, h2, rstd, scale, dout)
        return dh, dh.to(dtype), dscale, d_up, d_down, None, None, None, None, None, None


# --------------------------------------------------------------------------- the same kernels in high precision


class Norm(torch.autograd.Function):
    """h = x + branch and its RMS norm, [T, K]: `(h, y)`, y in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        h, rstd, y = norm(x, branch, weight, eps, dtype, None)
        assert isinstance(y, Tensor)
        ctx.save_for_backward(h, rstd, weight)
        ctx.branch = None if branch is None else branch.dtype
        return x.view_as(x) if branch is None else h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, rstd, weight = ctx.saved_tensors
        dx, dw = norm_backward(dy, h, rstd, weight, dh)
        return dx, None if ctx.branch is None else dx.to(ctx.branch), dw, None, None


class Activation(torch.autograd.Function):
    """f(x) or f(gate) * up of x [T, ...], as `fused.activation`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str, gated: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.what = function, gated
        y = activation(x, function, gated, None)
        assert isinstance(y, Tensor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return activation_backward(dy.contiguous(), ctx.saved_tensors[0], ctx.what[0], ctx.what[1], None)[0], None, None


class Rope(torch.autograd.Function):
    """A joined product [T, (H + 2 KV) D] to q, k, v with rotary positions."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tokens: int, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads = heads
        return split(rope(qkv, tokens, heads), tokens, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return rope_backward(dq, dk, dv, ctx.heads, None), None, None


def split(qkv: Tensor, tokens: int, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, S, D], k and v [B, KV, S, D] of a joined product [B * S, (H + 2 KV) D]: views."""
    each = qkv.view(-1, tokens, heads.total, heads.dim).transpose(1, 2)
    q, k, v = each.split([heads.queries, heads.keys, heads.keys], 1)
    return q, k, v


# --------------------------------------------------------------------------- when


def values_type(x: Tensor) -> torch.dtype:
    """The type in which a layer's values are: that of the autocast around it, or of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def why_not(
    x: Tensor, norms: tuple[nn.Module, ...], linears: tuple[nn.Module, ...], halves: tuple[nn.Module, ...], dim: int
) -> str | None:
    """Why a block cannot run in these kernels; None when it can.

    norms      its two norms; linears: qkv, out, up, down; halves: the modules around them, which are not called
    dim        channels of a head
    """
    if (reason := _why_not_kernels(x.device.type, x.device.index)) is not None:
        return reason
    if values_type(x) != torch.bfloat16 or x.dtype not in (torch.bfloat16, torch.float32):
        return f"values are {str(values_type(x))[6:]}; the fused kernels are for BF16"
    return why_not_shape(x, norms, linears, halves, dim)


def _why_not_kernels(device: str, index: int | None) -> str | None:
    return why_not_triton(torch.device(device) if index is None else torch.device(device, index))


# What torch.compiler.assume_constant_result does: a compiled graph asks once. The decorator would import the compiler.
_why_not_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_shape(
    x: Tensor, norms: tuple[nn.Module, ...], linears: tuple[nn.Module, ...], halves: tuple[nn.Module, ...], dim: int
) -> str | None:
    """The part of `why_not` that holds on any device."""
    if any(type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None for norm in norms):
        return "its norms are not RMS norms with a weight"
    if any(norm.weight.dtype not in (torch.bfloat16, torch.float32) for norm in norms):
        return "the weight of a norm is neither in BF16 nor in FP32"
    if not all(isinstance(getattr(linear, "weight", None), Tensor) for linear in linears):
        return "what stands for a linear layer has no weight of its own"
    if not all(getattr(getattr(linear, "fp8", None), "fuses", True) for linear in linears):
        return "its linear layers are prepared for quantization-aware training"
    if any(getattr(linear, "bias", None) is not None for linear in linears):
        return "a linear layer has a bias"
    if torch.is_grad_enabled() and not all(linear.weight.requires_grad for linear in linears):
        return "a weight is frozen, and its gradient is computed here all the same"
    if not torch.compiler.is_compiling() and any(_hooked(module) for module in (*norms, *halves)):
        return "a module inside it has hooks"
    rows, width = as_matrix(x).shape
    if not rows or rows % 16 or width % 16 or width > LONGEST:
        return (
            f"{rows} tokens of {width} channels: both must be positive multiples of 16, and channels at most {LONGEST}"
        )
    inner = linears[-1].weight.shape[-1]  # type: ignore[index]
    if inner % 16:
        return f"an MLP of {inner} channels, which is no multiple of 16"
    if dim & (dim - 1) or not 16 <= dim <= 128:  # `both.cu` turns pairs within 128 columns
        return f"a head has {dim} channels, which is no power of two from 16 to 128"
    return None


def why_not_recipes(recipes: list[Recipe | None], width: int, dim: int) -> str | None:
    """Why these recipes of qkv, out, up and down have no fused kernels; None when they have, or when all are None."""
    own = [recipe for recipe in recipes if recipe is not None]
    if not own:
        return None
    if len(own) < len(recipes):
        return "some of its linear layers are FP8 and some are not"
    for recipe in own:
        if recipe.delayed is not None and recipe.delayed.rule == "article":
            return "the article's scaler measures what a fused kernel does not store"
        tiles = {str(recipe.x.tile), str(recipe.grad.tile)}
        if not tiles <= set(MODES):
            return f"no fused kernel writes the tiles {', '.join(sorted(tiles - set(MODES)))}"
        if "1x128" in tiles and (dim != 128 or width % 128):
            return "tiles of 128 want heads of 128 channels and an MLP of a multiple of 128"
    return None


def _hooked(module: nn.Module) -> bool:
    parts = module.modules()
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in parts
    )
