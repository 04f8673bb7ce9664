"""Rotary positions of a joined q, k, v product: the doors. `reference.py` is the definition, `triton.py` equals it in
bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, choose, why_not_triton
from ..target import Codes, Target, fake, flat, of_flat, of_words, to_words
from .reference import Heads

__all__ = ["Heads", "rope", "rope_backward"]

BACKENDS = (
    Backend("triton", "a Hopper GPU and Triton", lambda x: why_not_triton(x.device), "fp8.fused.rope.triton"),
    Backend("reference", "nothing", lambda x: None, "fp8.fused.rope.reference"),
)


def rope(qkv: Tensor, tokens: int, heads: Heads) -> Tensor:
    """qkv [B * tokens, heads.total * D], contiguous, with its queries and keys turned; a fresh matrix."""
    if torch.compiler.is_compiling():
        return torch.ops.fp8.rope(qkv, tokens, *_words(heads))
    return choose("rope", BACKENDS, qkv).run(qkv, tokens, heads)


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, heads: Heads, target: Target | None) -> Tensor | Codes:
    """The gradient [B * T, heads.total * D] of the joined product, as values or in both orientations of codes, from
    those of q [B, H, T, D] and of k and v [B, KV, T, D] (any strides). On the GPU D is a power of two, 16 to 128."""
    if torch.compiler.is_compiling():
        if target is None:
            return torch.ops.fp8.rope_backward_plain(dq, dk, dv, *_words(heads))
        out = torch.ops.fp8.rope_backward(dq, dk, dv, *_words(heads), *to_words(target))
        return of_flat(out, target)
    return choose("rope_backward", BACKENDS, dq).run(dq, dk, dv, heads, target)


def _words(heads: Heads) -> tuple[int, int, int, float | None, int]:
    return heads.queries, heads.keys, heads.dim, heads.theta, heads.start


@torch.library.custom_op("fp8::rope", mutates_args=())
def _rope(qkv: Tensor, tokens: int, queries: int, keys: int, dim: int, theta: float | None, start: int) -> Tensor:
    return rope(qkv, tokens, Heads(queries, keys, dim, theta, start))


@_rope.register_fake
def _(qkv, tokens, queries, keys, dim, theta, start):  # type: ignore[no-untyped-def]
    return torch.empty_like(qkv)


@torch.library.custom_op("fp8::rope_backward_plain", mutates_args=())
def _backward_plain(
    dq: Tensor, dk: Tensor, dv: Tensor, queries: int, keys: int, dim: int, theta: float | None, start: int
) -> Tensor:
    out = rope_backward(dq, dk, dv, Heads(queries, keys, dim, theta, start), None)
    assert isinstance(out, Tensor)
    return out


@_backward_plain.register_fake
def _(dq, dk, dv, queries, keys, dim, theta, start):  # type: ignore[no-untyped-def]
    return dq.new_empty(dq.shape[0] * dq.shape[2], (queries + 2 * keys) * dim)


@torch.library.custom_op("fp8::rope_backward", mutates_args=())
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, queries: int, keys: int, dim: int, theta: float | None, start: int,
    format: str, tile: str, power_of_two: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target = of_words(format, tile, power_of_two, scale)
    out = rope_backward(dq, dk, dv, Heads(queries, keys, dim, theta, start), target)
    assert isinstance(out, Codes)
    return flat(out, target)


@_backward.register_fake
def _(dq, dk, dv, queries, keys, dim, theta, start, format, tile, power_of_two, scale):  # type: ignore[no-untyped-def]
    rows, cols = dq.shape[0] * dq.shape[2], (queries + 2 * keys) * dim
    return fake(dq, rows, cols, of_words(format, tile, power_of_two, scale))
