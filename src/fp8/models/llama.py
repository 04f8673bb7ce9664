"""A decoder of the Llama family: `fp8.TransformerLayer` in a row, between an embedding and a head.

    tokens [B, T] -> embedding -> layers (RMSNorm, causal grouped-query attention with RoPE, SwiGLU) -> RMSNorm -> head

There is no bias anywhere. It is built in high precision; `fp8.convert(decoder, recipe)` makes the layers' products FP8
and leaves the embedding, the norms and the head as they are. `models/huggingface.py` says what its parts are called
elsewhere.

**Initialization.** A matrix is drawn from N(0, s^2) with s = 1 / (2 sqrt(inputs)), the two that write into the
residual stream with s / sqrt(2 * layers), so that its variance does not grow with depth (Radford et al., "Language
models are unsupervised multitask learners", 2019); the embedding with s = 0.02. Numbers come from torch's CPU
generator in FP32, so that `torch.manual_seed` gives the same model on every device.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import KVCache
from ..errors import ConfigError, ShapeError, TensorError, suggest
from ..nn import TransformerLayer

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: sizes in elements, all above 0. Raises `ConfigError` for a shape that cannot be built.

    `max_positions` is what the model is meant for: `generate` stops there. `tie_embeddings`: the head shares the
    weight of the embedding.
    """

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{field.name} must be a whole number above 0, not {value!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} must divide num_attention_heads={self.num_attention_heads}."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> DecoderConfig:
        """What `to_dict` wrote. Raises `ConfigError` for a key that is unknown or missing."""
        fields = dataclasses.fields(DecoderConfig)
        known = [field.name for field in fields]
        if unknown := sorted(set(plain) - set(known)):
            raise ConfigError(f"a decoder has no setting {unknown[0]!r}. {suggest(unknown[0], known)}")
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in plain]:
            raise ConfigError(f"a decoder's configuration lacks {', '.join(missing)}.")
        return DecoderConfig(**plain)


class Decoder(nn.Module):
    """The model. `decoder(tokens [B, T])` gives logits `[B, T, vocab_size]`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialize()

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, last: bool = False) -> Tensor:
        """Logits `[B, T, V]` for tokens `[B, T]` (int64 or int32), in the type of the model, or of the autocast around
        it.

        cache   continues the tokens that it holds, and stores these (`new_cache` makes one)
        last    give the logits of the last position only, `[B, 1, V]`
        """
        self.check(tokens, cache)
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x) if cache is None else layer(x, cache=cache.layers[i])
        return self.head(self.norm(x[:, -1:] if last else x))

    def new_cache(self, batch: int = 1, dtype: str = "fp8", capacity: int = 256) -> KVCache:
        """An empty cache of this model's shape and device: in "fp8" (E4M3), "e5m2", "bf16" or "fp32"."""
        c = self.config
        device = self.embedding.weight.device
        return KVCache(c.num_layers, batch, c.num_kv_heads, c.head_dim, dtype=dtype, capacity=capacity, device=device)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights anew, as the top of this file says; norms become 1."""
        residual = math.sqrt(2 * self.config.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
                continue
            std = EMBEDDING_STD if name == "embedding.weight" else 0.5 / math.sqrt(weight.shape[1])
            std = std / residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else std
            weight.copy_(torch.randn(weight.shape) * std)

    def check(self, tokens: Tensor, cache: KVCache | None) -> None:
        """Refuse what is not tokens `[B, T]`."""
        if tokens.dim() != 2:
            raise ShapeError(f"a decoder takes tokens [B, T], not {tuple(tokens.shape)}: add the batch dimension.")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TensorError(f"tokens are int64 or int32, not {tokens.dtype}.")
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ShapeError(
                f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}: use new_cache()."
            )


def _layer(config: DecoderConfig) -> TransformerLayer:
    return TransformerLayer(
        config.hidden_size,
        config.ffn_hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_kv_heads,
        norm="rmsnorm",
        norm_eps=config.norm_eps,
        activation="swiglu",
        bias=False,
        causal=True,
        rope_theta=config.rope_theta,
    )
