"""`fp8.TransformerLayer`: one pre-norm transformer block, four FP8 products.

    x = x + out(attention(rope(qkv(norm(x)))))
    x = x + down(activation(up(norm(x))))

FP8: qkv, out, up, down. High precision: norms, RoPE, softmax, activation, residual. q, k and v come from one product,
and so do gate and up: the rows of `attention.qkv.weight` are all query heads, then key heads, then value heads; those
of `mlp.up.weight` are the gate, then what it gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attention
from ..errors import ConfigError, ShapeError, suggest
from ..recipe import Recipe
from .linear import Linear

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swiglu": F.silu, "geglu": F.gelu}
GATED = ("swiglu", "geglu")
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class TransformerLayer(nn.Module):
    """A pre-norm transformer block, batch first.

    hidden_size, ffn_hidden_size, num_attention_heads   as the names say; a head has hidden_size / num_attention_heads
                                                        channels
    num_kv_heads     key and value heads, shared by groups of query heads; as many as query heads by default
    norm             "layernorm" or "rmsnorm"
    activation       "gelu", "relu", "silu", or gated: "swiglu", "geglu"
    causal           whether a position sees only itself and what came before
    rope_theta       base of the rotary position embedding; None: no rotation
    recipe           a preset's name or a `Recipe`; without one the layer is FP8 inside `fp8.autocast` only
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        *,
        num_kv_heads: int | None = None,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        activation: str = "gelu",
        bias: bool = True,
        causal: bool = False,
        rope_theta: float | None = None,
        recipe: str | Recipe | None = None,
    ) -> None:
        super().__init__()
        for word, known, what in ((norm, NORMS, "norm"), (activation, ACTIVATIONS, "activation")):
            if word not in known:
                raise ConfigError(f"{what} cannot be {word!r}. {suggest(word, known)}")
        self.attention_norm = NORMS[norm](hidden_size, eps=norm_eps)
        self.attention = SelfAttention(
            hidden_size,
            num_attention_heads,
            num_attention_heads if num_kv_heads is None else num_kv_heads,
            bias,
            causal,
            rope_theta,
            recipe,
        )
        self.mlp_norm = NORMS[norm](hidden_size, eps=norm_eps)
        self.mlp = MLP(hidden_size, ffn_hidden_size, activation, bias, recipe)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, *, cache: Any = None) -> Tensor:
        """x [B, T, hidden_size] to the same shape.

        attention_mask   True (or 1) where a query may look, [B, S], [B, T, S] or [B, heads, T, S]; a float mask is
                         added to the scores
        cache            a layer's KV cache: x continues what it holds, and is appended to it
        """
        x = x + self.attention(self.attention_norm(x), attention_mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and an optional KV cache."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        bias: bool,
        causal: bool,
        rope_theta: float | None,
        recipe: str | Recipe | None,
    ) -> None:
        super().__init__()
        if min(hidden_size, heads, kv_heads) < 1 or hidden_size % heads or heads % kv_heads:
            raise ConfigError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={heads}, and that of "
                f"num_kv_heads={kv_heads}."
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden_size // heads
        if rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"RoPE rotates pairs: a head of {self.head_dim} channels is odd.")
        self.causal, self.rope_theta = causal, rope_theta
        self.qkv = Linear(hidden_size, (heads + 2 * kv_heads) * self.head_dim, bias, recipe)
        self.out = Linear(hidden_size, hidden_size, bias, recipe)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        if x.dim() != 3:
            raise ShapeError(f"a TransformerLayer takes [batch, tokens, hidden], not {tuple(x.shape)}.")
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.rope_theta is not None:
            start = 0 if cache is None else cache.length
            cos, sin = rope_tables(tokens, self.head_dim, self.rope_theta, x.device, start)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            y = attention(q, k, v, mask=mask, causal=self.causal)
        elif mask is not None:
            raise ShapeError("attention_mask and cache cannot be used together: the cache holds only real tokens.")
        else:
            cache.append(k, v)
            y = cache.attend(q, causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate) * up) where gated."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, activation: str, bias: bool, recipe: str | Recipe | None
    ) -> None:
        super().__init__()
        self.activation = activation
        width = ffn_hidden_size * (2 if activation in GATED else 1)
        self.up = Linear(hidden_size, width, bias, recipe)
        self.down = Linear(ffn_hidden_size, hidden_size, bias, recipe)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        function = ACTIVATIONS[self.activation]
        if self.activation in GATED:
            gate, up = h.chunk(2, -1)
            return self.down(function(gate) * up)
        return self.down(function(h))


def rope_tables(
    tokens: int, head_dim: int, theta: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim / 2] in FP32 for positions from `start`; angles in FP32, as in Hugging Face."""
    channel = torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).float()
    frequency = 1.0 / theta ** (channel / head_dim)
    position = torch.arange(start, start + tokens, device=device, dtype=torch.int64).float()
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D], channels (i, i + D/2) turned by position: FP32, each product rounded, then x's type."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
