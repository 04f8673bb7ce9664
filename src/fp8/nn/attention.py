"""torch's own attention modules, with their products in FP8.

`nn.MultiheadAttention` multiplies by bare parameters (`in_proj_weight`), and in evaluation it and
`nn.TransformerEncoderLayer` jump to a fused BF16 kernel past everything that a conversion put in. So the first gets a
forward of its own, and the second is kept from jumping.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError
from ..recipe import Recipe
from .linear import Weighted
from .products import Fp8Products

PARTS = ("q", "k", "v")


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with FP8 input and output projections: same parameters, same arguments, same results but
    for rounding. Self-attention projects q, k and v in one product; cross-attention in three."""

    fp8: Fp8Products
    fp8_q: Fp8Products
    fp8_k: Fp8Products
    fp8_v: Fp8Products
    fp8_out: Fp8Products

    def __init__(self, *args: Any, recipe: str | Recipe | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_products(None if recipe is None else Recipe.of(recipe), "")

    def add_products(self, recipe: Recipe | None, name: str) -> None:
        """The FP8 parts: one for the packed projection, one for each of q, k, v on its own, one for the output."""
        dot = f"{name}." if name else ""
        self.fp8 = Fp8Products(recipe, f"{dot}in_proj")
        self.fp8_q, self.fp8_k, self.fp8_v = (Fp8Products(recipe, f"{dot}{part}_proj") for part in PARTS)
        self.fp8_out = Fp8Products(recipe, f"{dot}out_proj")

    def fp8_weights(self) -> Iterator[Weighted]:
        if self._qkv_same_embed_dim:
            yield self.fp8, self.in_proj_weight
        yield self.fp8_out, self.out_proj.weight

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        itself = query is key and key is value
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._project(query, key, value, itself))
        mask = self._mask(attn_mask, key_padding_mask, q, k, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5 + (0.0 if mask is None else mask)
            weights = F.dropout(scores.float().softmax(-1).to(v.dtype), dropout)  # returned as used, as torch does
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.fp8_out(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if x.dim() != 2 + batched:
            raise ShapeError(f"query, key and value must all be batched (3-D) or all not (2-D); got {tuple(x.shape)}.")
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, itself: bool) -> tuple[Tensor, ...]:
        if itself and self._qkv_same_embed_dim:
            return self.fp8(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        parts = (self.fp8_q, self.fp8_k, self.fp8_v)
        inputs = (query, key, value)
        return tuple(part(x, w, b) for part, x, w, b in zip(parts, inputs, weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, is_causal: bool
    ) -> Tensor | None:
        """One additive mask [B or 1, heads or 1, T, S] of torch's two (in which True means: hidden)."""
        if attn_mask is None and is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            total = total.unflatten(0, (-1, self.num_heads)) if total.dim() == 3 else total
        if padding is not None:
            hidden = _additive(padding, q).view(-1, 1, 1, k.shape[2])
            total = hidden if total is None else total + hidden
        return total


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -torch.inf)
