"""Keys and values rounded as an FP8 cache holds them, with a gradient that passes straight through.

    head      one scale a head, for all tokens: what `fp8 quantize` writes into a checkpoint, and what vLLM reads
    token     one scale for each token and head: the cache of this library (`attention/cache.py`)

Both round K after the rotary embedding and V as projected, from their BF16 rounding, as they would be stored; attention
then reads what the codes stand for.

Our own attention asks its part `fp8_kv`. Any other hands its keys and values to a cache, by calling
`past_key_values.update(keys, values, ...)`, which is where transformers' attention modules do whatever precedes a cache
and nothing else; so they get, in a hook of the module, a cache that rounds, around the one that they were given or
around none. Attention kernels, masks and the model's outputs stay as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConvertError, ShapeError
from ..formats import format_of
from ..quantize import Quantized, run_quantize
from ..tile import Tile

E4M3 = format_of("e4m3")
WORD = "past_key_values"


class _Through(torch.autograd.Function):
    """The rounded tensor, with the gradient of the one that was rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class KVRounding(nn.Module):
    """`k, v = rounding(k, v)`, both [B, KV, T, D]. `keys`, `values`: the scales of heads, `MeasuredScale` [KV]; without
    them each token has its own."""

    def __init__(self, keys: nn.Module | None = None, values: nn.Module | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(k, self.keys), self._round(v, self.values)

    def _round(self, x: Tensor, scales: Any) -> Tensor:
        stored = x.detach().to(torch.bfloat16)
        rows, given = stored.reshape(-1, x.shape[-1]), None
        if scales is not None:
            if x.shape[1] != len(scales.seen):
                raise ShapeError(
                    f"KV scales are for {len(scales.seen)} heads; keys or values came as {tuple(x.shape)}."
                )
            magnitude = stored.float().abs()
            amax = torch.where(magnitude.isfinite(), magnitude, 0.0).amax((0, 2, 3))
            given = scales(amax).view(1, -1, 1).expand(x.shape[:3]).reshape(-1, 1)
        codes, scale, _ = run_quantize(rows, given, E4M3, Tile(1, 0), given is None)
        rounded = Quantized(codes, scale, Tile(1, 0), E4M3).dequantize(x.dtype).view(x.shape)
        return _Through.apply(x, rounded)  # type: ignore[return-value]


class _RoundingCache:
    """A cache that rounds what it is given, before it hands it on."""

    def __init__(self, rounding: KVRounding, inner: Any) -> None:
        self.rounding, self.inner = rounding, inner

    def update(self, keys: Tensor, values: Tensor, *args: Any, **keywords: Any) -> Any:
        keys, values = self.rounding(keys, values)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def _hand_over(module: nn.Module, args: Any, keywords: dict[str, Any]) -> Any:
    return args, {**keywords, WORD: _RoundingCache(module.fp8_kv, keywords.get(WORD))}  # type: ignore[arg-type]


def round_kv(module: nn.Module, rounding: KVRounding) -> None:
    """Make an attention module round its keys and values. Raises `ConvertError` for one that knows no cache."""
    own = "fp8_kv" in module.__dict__
    if not own and WORD not in inspect.signature(module.forward).parameters:
        raise ConvertError(
            f"{type(module).__name__} hands its keys and values to no {WORD}, so they cannot be rounded: leave out kv."
        )
    module.fp8_kv = rounding
    if not own:
        module.register_forward_pre_hook(_hand_over, with_kwargs=True)


def unround_kv(module: nn.Module) -> None:
    """Take it out again."""
    if not isinstance(module._modules.get("fp8_kv"), KVRounding):
        return
    hooks = [key for key, hook in module._forward_pre_hooks.items() if hook is _hand_over]
    for key in hooks:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    del module.fp8_kv
    if not hooks:
        module.fp8_kv = None  # type: ignore[assignment]
