"""Residual add and RMS norm: the doors. `reference.py` is the definition, `triton.py` equals it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, choose, why_not_triton
from ..target import Codes, Target, fake, flat, of_flat, of_words, to_words, without_keys

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.fused.norm.triton"),
    Backend("reference", "nothing", lambda x: None, "fp8.fused.norm.reference"),
)


def norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, target: Target | None
) -> tuple[Tensor, Tensor, Tensor | Codes]:
    """`(h, rstd, y)`: h = x + branch [T, K] (x itself without a branch), 1 / RMS [T] in FP32, and the norm of h [T, K],
    as values of `dtype` or as the codes that `target` describes."""
    if torch.compiler.is_compiling():
        if target is None:
            h, rstd, y = torch.ops.fp8.norm_plain(x, branch, weight, eps, dtype)
            return x if branch is None else h, rstd, y
        h, rstd, *codes = torch.ops.fp8.norm(x, branch, weight, eps, dtype, *to_words(target))
        return x if branch is None else h, rstd, of_flat(tuple(codes), target, across=False)  # type: ignore[arg-type]
    return choose("norm", BACKENDS, x).run(x, branch, weight, eps, dtype, target)


def norm_across(
    h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype, target: Target, keys_t: Tensor | None = None
) -> Codes:
    """The transposed codes [K, T] of the norm, from what `norm` returned; `target.scale` and `keys_t` are its."""
    if torch.compiler.is_compiling():
        codes = torch.ops.fp8.norm_across(h, rstd, weight, dtype, *to_words(target), keys_t)
        return of_flat(codes, target, down=False)
    return choose("norm_across", BACKENDS, h).run(h, rstd, weight, dtype, target, keys_t)


def norm_backward(
    dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(dx, dw)`: the gradient of h [T, K], in its type, `residual` (the gradient that came past the norm) included;
    and that of the weight [K]."""
    if torch.compiler.is_compiling():
        return torch.ops.fp8.norm_backward(dy, h, rstd, weight, residual)
    return choose("norm_backward", BACKENDS, dy).run(dy, h, rstd, weight, residual)


@torch.library.custom_op("fp8::norm_plain", mutates_args=())
def _plain(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h, rstd, y = norm(x, branch, weight, eps, dtype, None)
    assert isinstance(y, Tensor)
    return x.new_empty(0) if branch is None else h, rstd, y


@_plain.register_fake
def _(x, branch, weight, eps, dtype):  # type: ignore[no-untyped-def]
    h = x.new_empty(0) if branch is None else torch.empty_like(x)
    return h, x.new_empty(x.shape[0], dtype=torch.float32), torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("fp8::norm", mutates_args=())
def _norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype,
    format: str, tile: str, power_of_two: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target = of_words(format, tile, power_of_two, scale)
    h, rstd, y = norm(x, branch, weight, eps, dtype, target)
    assert isinstance(y, Codes)
    return x.new_empty(0) if branch is None else h, rstd, *flat(y, target)


@_norm.register_fake
def _(x, branch, weight, eps, dtype, format, tile, power_of_two, scale):  # type: ignore[no-untyped-def]
    h = x.new_empty(0) if branch is None else torch.empty_like(x)
    codes = fake(x, x.shape[0], x.shape[1], of_words(format, tile, power_of_two, scale), across=False)
    return h, x.new_empty(x.shape[0], dtype=torch.float32), *codes


@torch.library.custom_op("fp8::norm_across", mutates_args=())
def _across(
    h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype,
    format: str, tile: str, power_of_two: bool, scale: Tensor | None, keys_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target = of_words(format, tile, power_of_two, scale)
    return without_keys(flat(norm_across(h, rstd, weight, dtype, target, keys_t), target))


@_across.register_fake
def _(h, rstd, weight, dtype, format, tile, power_of_two, scale, keys_t):  # type: ignore[no-untyped-def]
    return without_keys(fake(h, h.shape[0], h.shape[1], of_words(format, tile, power_of_two, scale), down=False))


@torch.library.custom_op("fp8::norm_backward", mutates_args=())
def _backward(dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return norm_backward(dy, h, rstd, weight, residual)


@_backward.register_fake
def _(dy, h, rstd, weight, residual):  # type: ignore[no-untyped-def]
    return torch.empty_like(h), torch.empty_like(weight)
