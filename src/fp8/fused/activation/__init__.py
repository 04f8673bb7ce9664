"""Gated and plain activations: the doors. `reference.py` is the definition, and says how far `cuda.py` may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend, choose
from ..target import Codes, Target, fake, flat, of_flat, of_words, to_words, why_not_both, without_keys

BACKENDS = (
    Backend("cuda", "a Hopper GPU and NVRTC", why_not_both, "fp8.fused.activation.cuda"),
    Backend("reference", "nothing", lambda x: None, "fp8.fused.activation.reference"),
)


def activation(x: Tensor, function: str, gated: bool, target: Target | None) -> Tensor | Codes:
    """h [T, F] of x [T, 2F] (gated) or [T, F], contiguous; as values, or as the codes that `target` describes.

    function   "silu", "gelu" or "relu"
    """
    if torch.compiler.is_compiling():
        if target is None:
            return torch.ops.fp8.activation_plain(x, function, gated)
        return of_flat(torch.ops.fp8.activation(x, function, gated, *to_words(target)), target, across=False)
    return choose("activation", BACKENDS, x).run(x, function, gated, target)


def activation_backward(
    dh: Tensor, x: Tensor, function: str, gated: bool, target: Target | None, again: Target | None = None,
    keys_t: Tensor | None = None,
) -> tuple[Tensor | Codes, Codes | None]:  # fmt: skip
    """`(gradient of x, transposed codes of h or None)`: the gradient as values, or in both orientations of codes.

    again    how the forward quantized h: its target, with the scale that it used; `keys_t` what it left. It comes with
             a target, and only with one
    """
    assert (target is None) == (again is None)
    if torch.compiler.is_compiling():
        if target is None or again is None:
            return torch.ops.fp8.activation_backward_plain(dh, x, function, gated), None
        words = (*to_words(target), *to_words(again))
        out = torch.ops.fp8.activation_backward(dh, x, function, gated, *words, keys_t)
        return of_flat(out[:6], target), of_flat(out[6:], again, down=False)
    return choose("activation_backward", BACKENDS, x).run(dh, x, function, gated, target, again, keys_t)


@torch.library.custom_op("fp8::activation_plain", mutates_args=())
def _plain(x: Tensor, function: str, gated: bool) -> Tensor:
    out = activation(x, function, gated, None)
    assert isinstance(out, Tensor)
    return out


@_plain.register_fake
def _(x, function, gated):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])


@torch.library.custom_op("fp8::activation", mutates_args=())
def _activation(
    x: Tensor, function: str, gated: bool, format: str, tile: str, power_of_two: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = of_words(format, tile, power_of_two, scale)
    out = activation(x, function, gated, target)
    assert isinstance(out, Codes)
    return flat(out, target)


@_activation.register_fake
def _(x, function, gated, format, tile, power_of_two, scale):  # type: ignore[no-untyped-def]
    width = x.shape[1] // 2 if gated else x.shape[1]
    return fake(x, x.shape[0], width, of_words(format, tile, power_of_two, scale), across=False)


@torch.library.custom_op("fp8::activation_backward_plain", mutates_args=())
def _backward_plain(dh: Tensor, x: Tensor, function: str, gated: bool) -> Tensor:
    out, _ = activation_backward(dh, x, function, gated, None)
    assert isinstance(out, Tensor)
    return out


@_backward_plain.register_fake
def _(dh, x, function, gated):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("fp8::activation_backward", mutates_args=())
def _backward(
    dh: Tensor, x: Tensor, function: str, gated: bool,
    format: str, tile: str, power_of_two: bool, scale: Tensor | None,
    h_format: str, h_tile: str, h_power_of_two: bool, h_scale: Tensor | None, keys_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target = of_words(format, tile, power_of_two, scale)
    again = of_words(h_format, h_tile, h_power_of_two, h_scale)
    out, h = activation_backward(dh, x, function, gated, target, again, keys_t)
    assert isinstance(out, Codes)
    assert h is not None
    return *flat(out, target), *without_keys(flat(h, again))


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dh, x, function, gated, format, tile, power_of_two, scale, h_format, h_tile, h_power_of_two, h_scale, keys_t
):
    out = fake(x, x.shape[0], x.shape[1], of_words(format, tile, power_of_two, scale))
    h = fake(dh, dh.shape[0], dh.shape[1], of_words(h_format, h_tile, h_power_of_two, h_scale), down=False)
    return *out, *without_keys(h)
