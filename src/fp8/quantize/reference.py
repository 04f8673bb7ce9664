"""Quantizing, as the definition: plain torch, on the CPU, one step after the other.

    amax    the largest finite magnitude in each tile of x, which is first converted exactly to FP32
    scale   the smallest power of two with amax / scale <= max (or amax / max by IEEE division); 1 for a tile of zeros
    code    x / scale, rounded to the nearest code, ties to even, clipped at the largest finite code

Whether an element is NaN or infinite is read from x, never from x / scale: a finite x that overflows under a stale
scale is clipped, an infinite x stays visible (Inf in E5M2, NaN in E4M3). Subnormals are kept, zeros keep their sign,
every NaN becomes 0x7F.

**The power of two without a division.** `max` is 1.75 * 2^8 in E4M3 and 1.75 * 2^15 in E5M2. An amax of `m * 2^e` with
m in [1, 2) needs the scale 2^(e - 8) while m <= 1.75 and 2^(e - 7) above; adding 0x1FFFFF to the bits of the amax
carries into the exponent exactly when m > 1.75. Clearing the mantissa and subtracting 8 (or 15) from the exponent is
all.

**Stochastic rounding.** t = |x / scale| in units of the last place lies between the codes f and f + 1; it becomes f + 1
with probability t - f, by comparing 32 random bits with floor((t - f) * 2^32). The bits are Philox4x32-10 of the
element's row-major index, so they do not depend on the machine, the number of threads, or which orientation is written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import TensorError
from ..formats import Format
from ..tile import Tile

NAN = 0x7F
LOW32 = 0xFFFFFFFF


def quantize(
    x: Tensor, scale: Tensor | None, format: Format, tile: Tile, power_of_two: bool, seed: int | None, stream: int = 0,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(codes [rows, cols], scale, finite amax of all of x)` of a matrix in FP32, BF16 or FP16.

    `scale=None` measures it; a given one (FP32, of the tile's scale shape) is used as it is. `seed=None` rounds to
    nearest. An `amax` (FP32 []) is raised in place and returned instead of a new one.
    """
    refuse_flushed_subnormals(x)
    x = x.float()
    words = None if seed is None else philox(x.numel(), seed, stream).view(x.shape)
    codes, scale, largest = _quantize(x, scale, format, tile, power_of_two, words)
    return codes, scale, raised(amax, largest)


def quantize_both(
    x: Tensor, scale: Tensor | None, format: Format, tile: Tile, power_of_two: bool, seed: int | None, stream: int = 0,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize` of x and of x.T: `(codes, scale, codes_t [cols, rows], scale_t, amax)`; one draw serves both."""
    refuse_flushed_subnormals(x)
    x = x.float()
    words = None if seed is None else philox(x.numel(), seed, stream).view(x.shape)
    codes, row_scale, largest = _quantize(x, scale, format, tile, power_of_two, words)
    turned = None if words is None else words.t()
    codes_t, scale_t, _ = _quantize(x.t().contiguous(), scale, format, tile, power_of_two, turned)
    return codes, row_scale, codes_t, scale_t, raised(amax, largest)


def raised(amax: Tensor | None, largest: Tensor) -> Tensor:
    """The larger of both, in place of `amax` where there is one."""
    return largest if amax is None else amax.copy_(torch.maximum(amax, largest))


def _quantize(x, scale, format, tile, power_of_two, words):  # type: ignore[no-untyped-def]
    rows, cols = x.shape
    tiles = cut(x, tile)
    magnitude = tiles.abs()
    amax = magnitude.amax((1, 3))
    finite = bool(amax.isfinite().all())
    if not finite:
        amax = magnitude.masked_fill(~tiles.isfinite(), 0.0).amax((1, 3))
    if scale is None:
        scale = scale_of(amax, format, power_of_two)
    v = (tiles / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :cols]
    codes = nearest(v, format) if words is None else stochastic(v, words, format)
    codes = codes if finite else mark_non_finite(codes, x, format)
    return codes, scale, amax.amax() if amax.numel() else x.new_zeros(())


def cut(x: Tensor, tile: Tile) -> Tensor:
    """A matrix as [tiles down, tile height, tiles across, tile width], the last tiles filled up with zeros."""
    rows, cols = x.shape
    height, width = tile.shape(rows, cols)
    down, across = tile.scale_shape(rows, cols)
    if (down * height, across * width) != (rows, cols):
        x = torch.nn.functional.pad(x, (0, across * width - cols, 0, down * height - rows))
    return x.reshape(down, height, across, width)


def scale_of(amax: Tensor, format: Format, power_of_two: bool) -> Tensor:
    """The dequantizing scale of an amax (FP32, any shape); 1 where the amax is 0."""
    if power_of_two:
        top = (math.frexp(format.max)[1] - 1) << 23
        bits = ((amax.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - top
        scale = bits.clamp(min=1 << 23).view(torch.float32)
    else:
        scale = (amax / format.max).clamp(2.0**-126, 2.0**126)
    return torch.where(amax == 0, 1.0, scale)


def nearest(v: Tensor, format: Format) -> Tensor:
    """The codes nearest to v, ties to even, clipped. torch's own cast is right once nothing is beyond the last code."""
    return v.clamp(-format.max, format.max).to(format.dtype, memory_format=torch.contiguous_format)


def stochastic(v: Tensor, words: Tensor, format: Format) -> Tensor:
    """The code below |v| or the one above it, drawn by the random words (int64, 0 to 2^32 - 1)."""
    u = v.abs().clamp(max=format.max)
    exponent = torch.frexp(u).exponent - 1
    ulp = torch.ldexp(torch.ones_like(u), exponent.clamp(min=format.exponent_min) - format.mantissa_bits)
    t = u / ulp
    floor = t.floor()
    up = words < ((t - floor) * 2.0**32).long()
    return torch.copysign((floor + up) * ulp, v).to(format.dtype)


def mark_non_finite(codes: Tensor, x: Tensor, format: Format) -> Tensor:
    """Codes with NaN where x is NaN, and Inf (NaN, in a format without Inf) where x is infinite."""
    raw = torch.where(x.isfinite(), codes.contiguous().view(torch.uint8), NAN)
    if format.has_infinity:
        raw = torch.where(x.isinf(), 0x7C + x.signbit().to(torch.uint8) * 0x80, raw)
    return raw.view(codes.dtype)


def philox(count: int, seed: int, stream: int) -> Tensor:
    """`count` random words of 32 bits as int64: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) with the key `seed` and the counter (low32(i >> 2), high32(i >> 2), stream, 0), word i & 3."""
    block = torch.arange(-(-count // 4), dtype=torch.int64)
    c = [block & LOW32, block >> 32, torch.full_like(block, stream & LOW32), torch.zeros_like(block)]
    k = [seed & LOW32, (seed >> 32) & LOW32]
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & LOW32, (k[1] + 0xBB67AE85) & LOW32]
    return torch.stack(c, 1).flatten()[:count]


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a 32-bit product, in halves so that int64 does not overflow."""
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def refuse_flushed_subnormals(x: Tensor) -> None:
    """`torch.set_flush_denormal(True)` changes codes, so it is refused."""
    if x.device.type == "cpu" and not bool(torch.full((), 1e-40) * 1.0):
        raise TensorError(
            "FP32 subnormals are being flushed to zero, which changes FP8 codes: call torch.set_flush_denormal(False)."
        )
