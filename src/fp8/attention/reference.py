"""Attention over decoded keys and values, as the definition: plain torch, FP32 throughout.

    score[t, j] = (q[t] · k[j]) / sqrt(D)         FP32 products and sums; q is converted exactly from its own type
    p[t]        = softmax over the visible j      FP32
    out[t]      = sum over j of p[t, j] v[j]      FP32, rounded once to the type of q

Keys and values come decoded exactly: `code * scale` of an FP8 code and a power-of-two scale is an FP32 number, so all
the error of an FP8 cache is made when a token is stored, none when it is read.

Grouped queries need no copy of the keys: the H / KV query heads that share a key head are laid one after the other
along T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .training import causal_mask, check


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """`[B, H, T, D]` in the type of q; queries are the last T of the S positions.

    q [B, H, T, D] in any floating type; k, v [B, KV, S, D] (decoded; converted to FP32). `causal`: query t sees keys
    up to S - T + t; otherwise all S. Raises `ShapeError`. No gradient reaches a cache, so none is computed here.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        exact = q.float(), k.float(), v.float()
        check(*exact)
        return _attend(*exact, causal).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * queries, width)
    scores = (grouped @ k.mT).view(batch, kv_heads, -1, queries, keys) / math.sqrt(width)
    if causal and queries > 1:
        scores = scores.masked_fill(~causal_mask(queries, keys, q.device), float("-inf"))
    weights = scores.softmax(-1).view(batch, kv_heads, -1, keys)
    return (weights @ v).view(batch, heads, queries, width)
