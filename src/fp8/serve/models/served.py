"""A decoder as it is served: an embedding, blocks in a row, a norm and a head, over new rows of many sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...attention.paged import LayerPages, PagedCache
from ...models.architecture import Architecture
from ..batch import Batch
from .layers import Linear, Matrix, norm_logits
from .weights import Weights

Tables = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer: what an architecture defines."""

    capturable = True  # no shape depends on a value: a CUDA graph can replay it

    def forward(self, h: Tensor, batch: Batch, pages: LayerPages, rope: Tables) -> Tensor:
        """The residual stream h [T, hidden], BF16, after this layer; its new keys and values are in `pages`."""
        raise NotImplementedError


class ServedModel(nn.Module):
    """`model(batch, cache)` writes the keys and values of the batch's tokens, and gives the logits that are wanted."""

    embedding: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: Architecture, weights: Weights, block: Callable[[Weights, int], Block]) -> None:
        """Read a model; `block(weights, i)` reads its layer i."""
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.register_buffer("embedding", weights.high("model.embed_tokens.weight", shape))
        self.layers = nn.ModuleList(block(weights, i) for i in range(config.num_layers))
        self.norm = weights.norm("model.norm", config.hidden_size, config.norm_eps)
        self.head = head(config, weights, self.embedding)
        cos, sin = config.rope.tables(config.max_positions, config.head_dim, weights.device)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        attention = [f"model.layers.{i}.self_attn" for i in range(config.num_layers)]
        self.kv_scales = weights.kv_scales(attention, config.num_kv_heads)

    @torch.no_grad()
    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """FP32 logits `[S', V]` of the rows that `batch.wanted` names."""
        h = self.embedding[batch.tokens]
        for layer, pages in zip(self.layers, cache.layers, strict=True):
            h = layer(h, batch, pages, (self.cos, self.sin))
        return norm_logits(h[batch.wanted], self.norm, self.head)

    def new_cache(self, pages: int, page_size: int = 64, dtype: str = "fp8") -> PagedCache:
        """A cache of this model's shape and device, with the file's static scales where it has them and `dtype` is the
        format that they were made for ("fp8")."""
        c = self.config
        scales = self.kv_scales if dtype in ("fp8", "e4m3") else None
        return PagedCache(
            c.num_layers, pages, page_size, c.num_kv_heads, c.head_dim, dtype=dtype, kv_scales=scales,
            device=self.embedding.device,
        )  # fmt: skip

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can replay a step: no shape depends on a value."""
        return all(isinstance(layer, Block) and layer.capturable for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, each counted once; the rotary tables are not."""
        held = {t.data_ptr(): t.nbytes for t in self.buffers() if t is not self.cos and t is not self.sin}
        return sum(held.values())


def head(config: Architecture, weights: Weights, embedding: Tensor) -> Matrix:
    """The output head: the file's own, or the embedding where both are tied and the file holds one of them."""
    if config.tie_embeddings and not weights.has("lm_head.weight"):
        return Linear(embedding)
    return weights.linear(["lm_head"], (config.vocab_size, config.hidden_size), keep=True)
