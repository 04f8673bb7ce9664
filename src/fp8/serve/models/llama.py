"""Llama, and what shares its computation: Mistral, and this package's own decoder.

    h = h + out(attention(rope(qkv(norm(h)))))
    h = h + down(silu(gate(norm(h))) * up(norm(h)))

q, k and v are one product, and gate and up another: their rows lie one below the other, as servers fuse them. Other
architectures are this one with a part replaced.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...attention.paged import LayerPages, attend, rope_attend, rope_write
from ...models.architecture import Architecture
from ..batch import Batch
from .layers import Stream, gated_linear_add, joined, linear_add, norm_linear
from .served import Block, Tables
from .weights import Weights


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    qkv_bias = False  # whether q, k and v always have biases; otherwise `attention_bias` in config.json decides
    head_norms = False  # whether each head of q and k has an RMS norm
    q_norm: Tensor | None
    k_norm: Tensor | None

    def __init__(self, weights: Weights, name: str, config: Architecture) -> None:
        super().__init__()
        c, always = config, self.qkv_bias
        queries, keys = c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self.norm = weights.norm(f"{name.rpartition('.')[0]}.input_layernorm", c.hidden_size, c.norm_eps)
        self.qkv = weights.linear(names, (queries + 2 * keys, c.hidden_size), bias=always or c.attention_bias)
        self.out = weights.linear([f"{name}.o_proj"], (c.hidden_size, queries), bias=c.attention_bias and not always)
        for part in "qk":
            weight = weights.norm(f"{name}.{part}_norm", c.head_dim, c.norm_eps).weight if self.head_norms else None
            self.register_buffer(f"{part}_norm", weight)
        self.eps, self.scale = c.norm_eps, 1 / math.sqrt(c.head_dim)

    def forward(self, h: Stream, batch: Batch, pages: LayerPages, rope: Tables, last: Batch | None = None) -> Stream:
        qkv, h = norm_linear(h, self.norm, self.qkv)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self.eps)
        given = qkv, batch.positions, batch.slots, pages, rope
        if last is None:
            into = joined(h, self.out)
            return linear_add(rope_attend(*given, batch, self.scale, norms, into), self.out, h)
        q, h = rope_write(*given, self.q_norm, self.k_norm, self.eps)[batch.wanted], h[batch.wanted]
        return linear_add(attend(q, pages, last, self.scale), self.out, h) if len(h) else h


class MLP(nn.Module):
    """A gated product: SwiGLU."""

    def __init__(self, weights: Weights, name: str, config: Architecture) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.norm = weights.norm(f"{name.rpartition('.')[0]}.post_attention_layernorm", hidden, config.norm_eps)
        self.gate_up = weights.linear([f"{name}.gate_proj", f"{name}.up_proj"], (2 * ffn, hidden))
        self.down = weights.linear([f"{name}.down_proj"], (hidden, ffn))

    def forward(self, h: Stream) -> Stream:
        gate_up, h = norm_linear(h, self.norm, self.gate_up)
        return gated_linear_add(gate_up, self.down, h)


class LlamaBlock(Block):
    """One layer."""

    attention_class: type[Attention] = Attention

    def __init__(self, weights: Weights, i: int, config: Architecture) -> None:
        super().__init__()
        self.attention = self.attention_class(weights, f"model.layers.{i}.self_attn", config)
        self.mlp = self.read_mlp(weights, i, config)

    @property
    def capturable(self) -> bool:
        return getattr(self.mlp, "capturable", True)

    def read_mlp(self, weights: Weights, i: int, config: Architecture) -> nn.Module:
        return MLP(weights, f"model.layers.{i}.mlp", config)

    def forward(self, h: Stream, batch: Batch, pages: LayerPages, rope: Tables, last: Batch | None = None) -> Stream:
        h = self.attention(h, batch, pages, rope, last)
        return self.mlp(h) if len(h) else h
