"""The caches that are held against each other, and how a served model comes to use one.

    bf16                  what the others are measured against
    e4m3                  a power-of-two scale a token and head: what the engine does without a checkpoint's scales
    e4m3, key offsets     the same, with the mean of each head's keys taken off (`attention/paged/pages.py`)
    e4m3, full keys       dynamic scales of keys are amax / 448 as it is: a key's largest element has no error
    e4m3, full keys, offsets   both
    e4m3, static          a power of two a head, which holds the largest magnitude of a calibration text
    e4m3, static, offsets both
    e4m3, scale 1         what servers do with a checkpoint that has no scales
    e5m2, e5m2 offsets    two bits of mantissa, a scale a token and head
    three codes           a control that must fail: static scales 2^17 too large, which leave a few codes near zero

`Cached` is a served model whose caches are of one kind; the engine takes it as it takes any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention.paged import LayerPages, PagedCache
from ...formats import format_of
from ...quantize import run_quantize
from ...serve import Batch
from ...serve.models import ServedModel
from ...tile import Tile
from .chunks import PAGE, equal_rows, pages_of
from .remedies import remedied, store

TOO_LARGE = 2.0**17


@dataclass(frozen=True)
class Kind:
    """How a cache stores: `scales` are "dynamic", "static", "one", or "ruined"; `offsets`: keys less their mean."""

    dtype: str
    scales: str = "dynamic"
    offsets: bool = False
    full_keys: bool = False


KINDS: Mapping[str, Kind] = {
    "bf16": Kind("bf16"),
    "e4m3": Kind("e4m3"),
    "e4m3, key offsets": Kind("e4m3", offsets=True),
    "e4m3, full keys": Kind("e4m3", full_keys=True),
    "e4m3, full keys, offsets": Kind("e4m3", offsets=True, full_keys=True),
    "e4m3, static": Kind("e4m3", "static"),
    "e4m3, static, offsets": Kind("e4m3", "static", True),
    "e4m3, scale 1": Kind("e4m3", "one"),
    "e5m2": Kind("e5m2"),
    "e5m2, key offsets": Kind("e5m2", offsets=True),
    "three codes": Kind("e4m3", "ruined"),
}
HIGH = "bf16"
CONTROL = "three codes"


@dataclass(frozen=True)
class Calibration:
    """What text said of a model's cache, FP32: key offsets [layers, KV, D], and scales [layers, 2, KV] for keys as they
    are and for keys less their offsets."""

    offsets: Tensor
    plain: Tensor
    less_mean: Tensor

    @staticmethod
    def of(model: ServedModel, texts: Tensor) -> Calibration:
        """From tokens [B, T], which should not be those that are judged."""
        cache = whole(model, texts)
        offsets = mean_keys(cache, texts.shape[1])
        return Calibration(offsets, head_scales(cache, None), head_scales(cache, offsets))

    def scales(self, kind: Kind) -> Tensor | None:
        """The static scales of a kind of cache, None for dynamic ones."""
        found = self.less_mean if kind.offsets else self.plain
        made = {"dynamic": None, "static": found, "one": torch.ones_like(found), "ruined": found * TOO_LARGE}
        return made[kind.scales]


def mean_keys(cache: PagedCache, length: int) -> Tensor:
    """The mean of each head's keys over a BF16 cache of texts of one length: FP32 [layers, KV, D]. The first position
    of a text is left out: much attention rests there, on a key like no other."""
    means = []
    for pages in cache.layers:
        keys = pages.key_codes.transpose(1, 2).reshape(-1, pages_of(length) * PAGE, *pages.key_codes.shape[1::2])
        means.append(keys[:, 1:length].double().mean((0, 1)).float())
    return torch.stack(means)


def head_scales(cache: PagedCache, offsets: Tensor | None) -> Tensor:
    """The scales of `max`, FP32 [layers, 2, KV]: powers of two that hold the largest magnitude of each head."""
    amax = []
    for i, pages in enumerate(cache.layers):
        keys = pages.key_codes.float()
        keys = keys if offsets is None else keys - offsets[i][:, None]
        amax += [x.abs().amax((0, 2, 3)) for x in (keys, pages.value_codes.float())]
    most = torch.stack(amax).view(-1, 1)
    scale = run_quantize(most, None, format_of("e4m3"), Tile(1, 0), True)[1]
    return scale.view(len(cache.layers), 2, -1)


@torch.no_grad()
def whole(model: ServedModel, texts: Tensor) -> PagedCache:
    """A BF16 cache that holds the keys and values of tokens [B, T]."""
    count, length = texts.shape
    cache = model.new_cache(count * pages_of(length), PAGE, "bf16")
    for i, row in enumerate(texts.to(model.embedding.device)):
        batch = equal_rows(row[None], 0, length)
        at = i * batch.pages.shape[1]
        pages, slots, wanted = batch.pages + at, batch.slots + at * PAGE, batch.wanted[-1:]
        model(replace(batch, pages=pages, slots=slots, wanted=wanted), cache)
    return cache


class Cached:
    """A served model with caches of one kind; what the engine and the studies ask for is passed on."""

    def __init__(self, model: ServedModel, kind: Kind, calibration: Calibration | None = None) -> None:
        self.kind, self.scales = kind, None if calibration is None else calibration.scales(kind)
        self.offsets = calibration.offsets if calibration is not None and kind.offsets else None
        self.otherwise = self.offsets is not None or kind.full_keys
        self.model = remedied(model, self.offsets, kind.full_keys) if self.otherwise else model
        self.config, self.embedding, self.capturable = model.config, model.embedding, not self.otherwise

    def __call__(self, batch: Batch, cache: PagedCache) -> Tensor:
        return self.model(batch, cache)

    def new_cache(self, pages: int, page_size: int = PAGE, dtype: Any = None) -> PagedCache:
        """A cache of this kind, whatever `dtype` says."""
        return self._made(slice(None), pages, page_size)

    def new_layer(self, layer: int, pages: int) -> LayerPages:
        """The pages of one layer alone."""
        return self._made(slice(layer, layer + 1), pages, PAGE).layers[0]

    def offset(self, layer: int) -> Tensor | None:
        """What is taken from the keys of a layer [KV, D]; None: nothing."""
        return None if self.offsets is None else self.offsets[layer]

    def store_again(self, layer: int, pages: LayerPages, keys: Tensor, slots: Tensor) -> None:
        """Store keys as this kind does, where that is not how the engine did it just now."""
        if self.otherwise:
            store(pages, keys, slots, self.offset(layer), self.kind.full_keys)

    def _made(self, layers: slice, pages: int, page_size: int) -> PagedCache:
        c, held = self.config, self.scales
        return PagedCache(
            len(range(c.num_layers)[layers]), pages, page_size, c.num_kv_heads, c.head_dim, dtype=self.kind.dtype,
            kv_scales=None if held is None else held[layers], device=self.embedding.device,
        )  # fmt: skip


def arms(model: ServedModel, calibration: Calibration, names: Any = None) -> dict[str, Cached]:
    """The model with each kind of cache, by name."""
    return {name: Cached(model, KINDS[name], calibration) for name in names or KINDS}
