"""Rotary positions, as the definition.

A head's channels i and i + D/2 are a pair, turned by the angle `position * theta^(-2i/D)` (Su et al., "RoFormer", 2021;
the order of channels is Hugging Face's):

    forward     y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin
    backward    dx1 = dy1 cos + dy2 sin     dx2 = dy2 cos - dy1 sin

in FP32, each product rounded, then rounded to the type of x. The tables are made once, on the CPU, and carried to where
they are used: cosines differ in the last bit from one device to another, so that is what makes RoPE equal in bytes
everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..target import Codes, Target, quantized


@dataclass(frozen=True)
class Heads:
    """How the columns of a joined q, k, v product are divided: `queries` heads, then `keys` heads, then as many of
    values, each of `dim` channels; queries and keys are turned with base `theta`, from position `start` on. None: no
    rotation."""

    queries: int
    keys: int
    dim: int
    theta: float | None
    start: int = 0

    @property
    def total(self) -> int:
        return self.queries + 2 * self.keys

    @property
    def turned(self) -> int:
        """Heads that are turned: the first ones."""
        return 0 if self.theta is None else self.queries + self.keys

    def tables(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, dim / 2] in FP32."""
        assert self.theta is not None
        if torch.compiler.is_compiling():
            return torch.ops.fp8.rope_tables(tokens, self.dim, self.theta, self.start, device)
        length = 1 << (self.start + tokens - 1).bit_length()
        cos, sin = tables(length, self.dim, float(self.theta), device)
        return cos[self.start : self.start + tokens], sin[self.start : self.start + tokens]


@functools.cache
@torch.inference_mode(False)
def tables(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim / 2] of positions from 0, FP32, angles too, as in Hugging Face. Never write to them.

    They are kept for good, since captured graphs read them (powers of two: twice the longest, at most), and made where
    inference mode and torch's default device change nothing, since training reads them too.
    """
    if device.type != "cpu":
        cos, sin = tables(length, dim, theta, torch.device("cpu"))
        return cos.to(device), sin.to(device)
    channel = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float()
    frequency = 1.0 / theta ** (channel / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.int64, device=device).float(), frequency)
    return angle.cos(), angle.sin()


@torch.library.custom_op("fp8::rope_tables", mutates_args=())
def _tables(tokens: int, dim: int, theta: float, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = Heads(1, 1, dim, theta, start).tables(tokens, device)
    return cos.clone(), sin.clone()  # a compiled graph may write over what an operator gives it


@_tables.register_fake
def _(tokens, dim, theta, start, device):  # type: ignore[no-untyped-def]
    shape = (tokens, dim // 2)
    return torch.empty(shape, device=device), torch.empty(shape, device=device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] turned by the tables [T, D / 2]; with -sin it is turned back."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rope(qkv: Tensor, tokens: int, heads: Heads) -> Tensor:
    """qkv [B * tokens, total * D] with its queries and keys turned; a fresh matrix."""
    if not heads.turned:
        return qkv.clone()
    x = qkv.view(-1, tokens, heads.total, heads.dim)
    cos, sin = heads.tables(tokens, qkv.device)
    turned = rotate(x[:, :, : heads.turned].transpose(1, 2), cos, sin).transpose(1, 2)
    return torch.cat([turned, x[:, :, heads.turned :]], 2).view(qkv.shape)


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, heads: Heads, target: Target | None) -> Tensor | Codes:
    """The gradient [B * T, total * D] of the joined product from those of q [B, H, T, D], k and v [B, KV, T, D]."""
    tokens = dq.shape[2]
    if heads.turned:
        cos, sin = heads.tables(tokens, dq.device)
        dq, dk = rotate(dq, cos, -sin), rotate(dk, cos, -sin)
    joined = torch.cat([dq, dk, dv], 1).transpose(1, 2).reshape(-1, heads.total * heads.dim)
    return joined if target is None else quantized(joined, target)
