"""Keys stored otherwise than the engine stores them: what was tried to make FP8 keys cost less, and is not served.

A key errs in proportion to each of its channels, and two things make that dear. Keys of a head lie around a mean that
is larger than what tells them apart; and many a key has one channel far above the others. So, before a key is stored,

    offsets     k - m: the mean of the head's keys is taken off. Softmax does not see what all keys have in common, for
                q . (k - m) = q . k - q . m, so attention reads the codes as ever (Zhang et al., "SageAttention", 2024)
    full keys   the scale of a token and head is amax / 448 as it is, not rounded up to a power of two: the largest
                channel then has the code 448, and no error. Scales of keys multiply scores, in FP32

The mean is that of keys after their rotation, since only that is the same for all keys of a cache. A channel that turns
by less than a full turn over the text has another mean at other positions: offsets that were measured on short texts
make long ones worse, which `docs/log.md` has the figures of.

`Remedied` stands in for an attention module of a served model: the same products and the same reading, another writing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.paged import LayerPages, PagedCache, attend, rope_write
from ...quantize import run_quantize
from ...serve import Batch
from ...serve.models import ServedModel
from ...serve.models.layers import Stream, linear_add, norm_linear
from ...tile import Tile


class Remedied(nn.Module):
    """An attention module that stores keys less `offset` [KV, D], or None, with full scales where `full` says so."""

    def __init__(self, inner: nn.Module, offset: Tensor | None, full: bool) -> None:
        super().__init__()
        self.inner, self.offset, self.full = inner, offset, full

    def forward(
        self, h: Stream, batch: Batch, pages: LayerPages, rope: tuple[Tensor, Tensor], last: Batch | None = None
    ) -> Stream:
        m: Any = self.inner
        qkv, h = norm_linear(h, m.norm, m.qkv)
        q = rope_write(qkv, batch.positions, batch.slots, pages, rope, m.q_norm, m.k_norm, m.eps)
        keys = self.keys(qkv, batch, pages, rope)
        store(pages, keys, batch.slots, self.offset, self.full)
        if last is not None:
            q, h, batch = q[batch.wanted], h[batch.wanted], last
        return linear_add(attend(q, pages, batch, m.scale), m.out, h) if len(h) else h

    def keys(self, qkv: Tensor, batch: Batch, pages: LayerPages, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The rotated keys [T, KV, D], BF16, by way of a cache that holds them as they are."""
        m: Any = self.inner
        tokens, heads = len(qkv), pages.num_kv_heads
        plain = PagedCache(1, -(-tokens // 16), 16, heads, pages.head_dim, dtype="bf16", device=qkv.device).layers[0]
        rope_write(
            qkv, batch.positions, torch.arange(tokens, device=qkv.device), plain, rope, m.q_norm, m.k_norm, m.eps
        )
        return plain.key_codes.transpose(1, 2).reshape(-1, heads, pages.head_dim)[:tokens]


def store(pages: LayerPages, keys: Tensor, slots: Tensor, offset: Tensor | None, full: bool) -> None:
    """Write keys [T, KV, D] over those at their slots: codes of RN(k - offset), by static scales or measured ones."""
    assert pages.format is not None and pages.key_scale is not None
    less = keys if offset is None else (keys.float() - offset).to(keys.dtype)
    rows = less.reshape(-1, pages.head_dim).contiguous()
    given = pages.key_scale.repeat(len(keys)).unsqueeze(1) if pages.static else None
    codes, scale, _ = run_quantize(rows, given, pages.format, Tile(1, 0), given is None and not full)
    page, place = slots // pages.page_size, slots % pages.page_size
    pages.key_codes.view(torch.uint8)[page, :, place] = codes.view(torch.uint8).view(keys.shape)
    if given is None:
        pages.key_scale[page, :, place] = scale.view(keys.shape[:2])


def remedied(model: ServedModel, offsets: Tensor | None, full: bool) -> ServedModel:
    """The model, its weights shared, storing keys otherwise; offsets [layers, KV, D]."""
    out = copy.copy(model)
    out._modules = dict(model._modules)
    out.layers = nn.ModuleList(copy.copy(block) for block in model.layers)
    for i, block in enumerate(out.layers):
        block._modules = dict(block._modules)
        block.attention = Remedied(block.attention, None if offsets is None else offsets[i], full)  # type: ignore[arg-type]
    return out
