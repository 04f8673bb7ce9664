"""Inputs of fused operations that their tests share: every kind of target, and numbers that break quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp8.formats import format_of
from fp8.fused import Codes, Target
from fp8.tile import Tile

TARGETS = [
    ("e4m3", "tensor", True, None),
    ("e5m2", "tensor", True, None),
    ("e4m3", "tensor", False, None),
    ("e4m3", "tensor", True, 2.0**-6),
    ("e5m2", "tensor", True, 2.0**-9),
    ("e4m3", "row", True, None),
    ("e5m2", "row", False, None),
    ("e4m3", "1x128", True, None),
    ("e4m3", "1x128", False, None),
]


def target(format: str, tile: str, power_of_two: bool, scale: float | None, device: str = "cpu") -> Target:
    given = None if scale is None else torch.full((1, 1), scale, device=device)
    return Target(format_of(format), Tile.of(tile), power_of_two, given)


def hard(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """BF16 numbers with zeros, infinities and NaN among them, and rows of very different size."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-8, 6, (*shape[:-1], 1), generator=draw).float())
    chance = torch.rand(shape, generator=draw)
    for value, low, high in ((0.0, 0.0, 0.03), (-0.0, 0.03, 0.05), (torch.inf, 0.05, 0.055), (-torch.inf, 0.055, 0.06),
                             (torch.nan, 0.06, 0.065)):  # fmt: skip
        x = torch.where((chance >= low) & (chance < high), value, x)
    return x.bfloat16()


def parts(codes: Codes) -> Iterator[tuple[str, Tensor]]:
    """What a kernel must give in bytes."""
    for name in ("codes", "scale", "codes_t", "scale_t", "keys_t"):
        value = getattr(codes, name)
        if value is not None and value.numel():
            yield name, value


def differing(want: Codes, got: Codes, asked: tuple[str, ...] | None = None) -> dict[str, int]:
    """How many bytes differ, by part."""
    found = {}
    other = dict(parts(got))
    for name, value in parts(want):
        if asked is not None and name not in asked:
            continue
        a, b = value.cpu(), other[name].cpu()
        assert a.shape == b.shape, f"{name}: {tuple(b.shape)} for {tuple(a.shape)}"
        assert a.dtype == b.dtype
        left, right = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        if count := int((left != right).sum()):
            found[name] = count
    return found
