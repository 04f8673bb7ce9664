"""Attention for training: torch's fused kernels, chosen in a fixed order.

On CUDA torch has several kernels for the same sum and picks one by its own list, which has changed between releases.
Here the order is fixed: cuDNN first, whose kernel is the only one of them made for Hopper's asynchronous tensor cores
(B 4, 32 query and 8 key heads, T 4096, D 128, causal, BF16, on an H200 with torch 2.11 and cuDNN 9.19: forward 598
TFLOP/s against 324 for FlashAttention-2, forward and backward 496 against 266), then FlashAttention-2, then the
memory-efficient kernel, then plain matrix products. Each refuses what it cannot do (a head size, a mask, FP32), so the
first that accepts is taken. On the CPU torch has one fused kernel.

**Masks.** True means "may look". `[B, S]` marks keys (Hugging Face's `attention_mask`, of ones and zeros, is such a
one); `[B, T, S]` one table a sequence; four dimensions are used as they are, `[B or 1, H or 1, T or 1, S]`. A
floating-point mask is added to the scores. A query that may look nowhere gets zeros, not NaN.

With a given `mask` and `causal=True` both hold. The last query sits at the last key: with T < S the first S - T keys
are the past, visible to all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ShapeError, TensorError

CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`softmax(q · k^T / sqrt(D) + mask) · v` with gradients, in the type of q.

    q      [B, H, T, D], BF16, FP16 or FP32
    k, v   [B, KV, S, D] of the same type; H is a multiple of KV, and query head h reads key head h // (H / KV)
    mask   None, or where a query may look (bool, or ones and zeros), or what is added to the scores (floating point)
    causal query t sees keys up to t + S - T

    Returns [B, H, T, D]. Raises `ShapeError` and `TensorError`.
    """
    check(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    square = causal and mask is None and queries == keys
    if not square:
        mask = full_mask(mask, causal, queries, keys, q)
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, enable_gqa=grouped)
    with sdpa_kernel(CUDA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=square, enable_gqa=grouped)


def full_mask(mask: Tensor | None, causal: bool, queries: int, keys: int, like: Tensor) -> Tensor | None:
    """The mask that torch takes, of four dimensions (or two, the causal one alone); None when everything is seen."""
    past = causal_mask(queries, keys, like.device) if causal else None
    if mask is None:
        return past
    mask = widen(mask)
    if mask.is_floating_point():
        mask = mask.to(like.dtype)
        return mask if past is None else mask.masked_fill(~past, float("-inf"))
    mask = mask.bool()
    return mask if past is None else mask & past


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """`[T, S]`, True where query t may look: keys up to t + S - T."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def widen(mask: Tensor) -> Tensor:
    """A mask of keys `[B, S]` or of pairs `[B, T, S]` as `[B, 1, T or 1, S]`."""
    if mask.dim() == 2:
        return mask[:, None, None, :]
    if mask.dim() == 3:
        return mask[:, None]
    if mask.dim() != 4:
        raise ShapeError(f"a mask is [B, S], [B, T, S] or [B, H, T, S]; this one has shape {tuple(mask.shape)}.")
    return mask


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse heads that do not fit together."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            "attention needs q [B, H, T, D] and k, v [B, KV, S, D]; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly: make one divide the other."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TensorError(f"q, k and v must have one type; got {q.dtype}, {k.dtype}, {v.dtype}: cast them.")
