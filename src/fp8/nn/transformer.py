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
from ..fused import Heads
from ..fused.rope.reference import rotate
from ..quantize.record import as_matrix
from ..recipe import Recipe
from .fused import Activation, Norm, NormMlp, NormQkvRope, Rope, values_type, why_not, why_not_recipes
from .kv_rounding import KVRounding
from .linear import Linear

FUNCTIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swiglu": "silu", "geglu": "gelu"}
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
        if cache is None and self.why_not_fused(x) is None:
            return self._fused(x, attention_mask)
        x = x + self.attention(self.attention_norm(x), attention_mask, cache)
        return x + self.mlp(self.mlp_norm(x))

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why this block runs module by module on x [B, T, hidden_size]; None: in the few kernels of `nn/fused.py`, to
        the same codes."""
        attention, mlp = self.attention, self.mlp
        if attention.fp8_kv is not None:
            return "its keys and values are rounded as an FP8 cache holds them"
        linears = (attention.qkv, attention.out, mlp.up, mlp.down)
        norms, halves = (self.attention_norm, self.mlp_norm), (attention, mlp)
        reason = why_not(x, norms, linears, halves, attention.head_dim)
        return reason or why_not_recipes(self._recipes(linears), mlp.down.in_features, attention.head_dim)

    def _recipes(self, linears: tuple[nn.Linear, ...]) -> list[Recipe | None]:
        return [linear.fp8.recipe_now() if isinstance(linear, Linear) else None for linear in linears]

    def _fused(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = self.attention.check(x)
        attention_, mlp = self.attention, self.mlp
        linears = (attention_.qkv, attention_.out, mlp.up, mlp.down)
        dtype, matrix, heads = values_type(x), as_matrix(x).contiguous(), attention_.heads_of()
        norm, recipes = self.attention_norm, self._recipes(linears)
        if recipes[0] is None:
            h, y = Norm.apply(matrix, None, norm.weight, norm.eps, dtype)
            q, k, v = Rope.apply(attention_.qkv(y), tokens, heads)
        else:
            run = attention_.qkv.fp8.run(recipes[0], attention_.qkv.weight, matrix.requires_grad)
            h, q, k, v = NormQkvRope.apply(
                matrix, norm.weight, attention_.qkv.weight, run, norm.eps, heads, tokens, dtype
            )
        y = attention(q, k, v, mask=mask, causal=attention_.causal)
        branch = attention_.out(y.transpose(1, 2).reshape(batch * tokens, width))
        return mlp.fused(h, branch, self.mlp_norm, dtype, recipes[2:]).view(x.shape)


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
        self.fp8_kv: KVRounding | None = None  # put here by `fp8.prepare_qat`

    def check(self, x: Tensor) -> torch.Size:
        if x.dim() != 3:
            raise ShapeError(f"a TransformerLayer takes [batch, tokens, hidden], not {tuple(x.shape)}.")
        return x.shape

    def heads_of(self, start: int = 0) -> Heads:
        """How the joined product is divided, from position `start` on."""
        return Heads(self.heads, self.kv_heads, self.head_dim, self.rope_theta, start)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        batch, tokens, _ = self.check(x)
        heads = self.qkv(x).view(batch, tokens, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.rope_theta is not None:
            cos, sin = self.heads_of(0 if cache is None else cache.length).tables(tokens, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.fp8_kv is not None:
            k, v = self.fp8_kv(k, v)
        if cache is None:
            y = attention(q, k, v, mask=mask, causal=self.causal)
        elif mask is not None:
            raise ShapeError("attention_mask and cache cannot be used together: the cache holds only real tokens.")
        else:
            cache.append(k, v)
            y = cache.attend(q, causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


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

    def fused(
        self, h: Tensor, branch: Tensor, norm: nn.Module, dtype: torch.dtype, recipes: list[Recipe | None]
    ) -> Tensor:
        """`h2 + mlp(norm(h2))` with h2 = h + branch, all [T, hidden_size], in few kernels."""
        function, gated = FUNCTIONS[self.activation], self.activation in GATED
        if recipes[0] is None or recipes[1] is None:
            h, y = Norm.apply(h, branch, norm.weight, norm.eps, dtype)
            return h + self.down(Activation.apply(self.up(y), function, gated))
        up, down = self.up.weight, self.down.weight
        runs = (self.up.fp8.run(recipes[0], up, True), self.down.fp8.run(recipes[1], down, True))
        return NormMlp.apply(h, branch, norm.weight, up, down, *runs, norm.eps, function, gated, dtype)
