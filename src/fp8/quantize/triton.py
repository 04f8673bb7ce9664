"""The GPU's quantizer: which kernels run for which tile, with what rectangle, and what is allocated.

    tile      quantize                          quantize_both                          bytes an element (BF16 in)
    tensor    given: `cast_line`                given: `cast_tiles`                    3 and 4
              current: `partial_keys` first     current: `partial_keys` first          5 and 6
    row       `cast_rows`, a row a program      `row_column_keys`, then `cast_tiles`   3 and 6
    1x128, 1x32, 128x128   `cast_tiles`         `cast_tiles`                           3 and 4

The rectangle of a program is a pure function of the request (`plan`): nothing is timed, nothing is run twice. The CPU
is asked for at most two launches, a fill of a few bytes where an atomic maximum needs a zero, and the outputs.

What was left out: TMA (a store of bytes through it needs the same trip through shared memory), clusters (Triton has
none on Hopper), and quantizing rows longer than 16384 in one read (they are read twice, the second time from the L2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format
from ..tile import Tile
from . import reference
from .triton_cast import amax_bits, factor_of, key, raise_amax, scale_of, scaled, words_of, words_of_four
from .triton_tiles import cast_tiles, encode, partial_keys, row_column_keys

PARTS = 512  # programs of the first pass over a tensor: about four for each multiprocessor of an H200
LINE = 4096  # elements a program of `cast_line`
LONGEST = 16384  # the longest row that stays in registers
MODES = {"tensor": "tensor", "row": "row", "1x128": "group", "1x32": "group", "128x128": "square"}


@dataclass(frozen=True)
class Plan:
    """A program's rectangle of BM x BN, how many codes pack into a word of the transposed store, and its warps."""

    rows: int
    cols: int
    pack: int
    warps: int
    band: int = 1


def plan(mode: str, both: bool) -> Plan:
    """The rectangle for a mode of `cast_tiles`. Groups and squares need 128 x 128, the others are free."""
    pack = 4 if both else 1
    if mode in ("group", "square"):
        return Plan(128, 128, pack, 8) if both or mode == "square" else Plan(32, 128, 1, 4)
    return Plan(64, 128, pack, 4)


# --------------------------------------------------------------------------- one orientation: lines and rows


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "parts"], do_not_specialize_on_alignment=["amax_ptr"])
def cast_line(
    x_ptr, codes_ptr, scale_ptr, keys_ptr, amax_ptr, count, parts, seed_low, seed_high, stream,
    CURRENT: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, a line of `count` numbers, to codes with one scale; see `cast_tiles` for its modes tensor and current."""
    pid = tl.program_id(0)
    if CURRENT:
        pid = tl.num_programs(0) - 1 - pid
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(x_ptr + at).to(tl.float32)
    else:
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    if CURRENT:
        lane = tl.arange(0, PARTS)
        bits = amax_bits(tl.max(tl.load(keys_ptr + lane, mask=lane < parts, other=0), axis=0))
        scale = scale_of(bits, E4M3, POWER)
        if pid == 0:
            tl.store(scale_ptr, scale)
            tl.store(amax_ptr, bits.to(tl.float32, bitcast=True))
    else:
        scale = tl.load(scale_ptr)
        raise_amax(amax_ptr, amax_bits(tl.max(key(x), axis=0)))
    word = 0
    if STOCHASTIC:
        block = pid.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        word = words_of_four(block, seed_low, seed_high, stream, [BLOCK])
    codes = encode(x, scaled(x, factor_of(scale, POWER), POWER), word, E4M3, STOCHASTIC)
    out = codes_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at
    if EVEN:
        tl.store(out, codes)
    else:
        tl.store(out, codes, mask=at < count)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream"])
def cast_rows(
    x_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, seed_low, seed_high, stream,
    E4M3: tl.constexpr, POWER: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] to codes and a scale for each row. WHOLE: BN >= cols, one read; else two reads."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    line = r.to(tl.int64)[:, None] * cols
    lane = tl.arange(0, BN)[None, :]
    held = (r < rows)[:, None]
    out = codes_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    x = tl.load(x_ptr + line + lane, mask=held & (lane < cols), other=0.0).to(tl.float32)
    largest = tl.max(key(x), axis=1)
    if not WHOLE:
        for start in range(BN, cols, BN):
            more = tl.load(x_ptr + line + start + lane, mask=held & (lane < cols - start), other=0.0)
            largest = tl.maximum(largest, tl.max(key(more.to(tl.float32)), axis=1))
    bits = amax_bits(largest)
    scale = scale_of(bits, E4M3, POWER)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    raise_amax(amax_ptr, tl.max(bits, axis=0))
    factor = factor_of(scale, POWER)[:, None]
    word = 0
    if STOCHASTIC:
        word = words_of(line + lane, seed_low, seed_high, stream)
    codes = encode(x, scaled(x, factor, POWER), word, E4M3, STOCHASTIC)
    tl.store(out + line + lane, codes, mask=held & (lane < cols))
    if not WHOLE:
        for start in range(BN, cols, BN):
            at = line + start + lane
            mask = held & (lane < cols - start)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if STOCHASTIC:
                word = words_of(at, seed_low, seed_high, stream)
            tl.store(out + at, encode(x, scaled(x, factor, POWER), word, E4M3, STOCHASTIC), mask=mask)


# --------------------------------------------------------------------------- the two functions


def quantize(
    x: Tensor, scale: Tensor | None, format: Format, tile: Tile, power_of_two: bool, seed: int | None, stream: int = 0,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.quantize` of a contiguous CUDA matrix: `(codes [rows, cols], scale, amax)`, equal in bytes.

    1x128 scales are stored column by column (strides 1 and rows), as cuBLASLt reads them; all others row by row.
    """
    if x.numel() == 0:
        return reference.quantize(x, scale, format, tile, power_of_two, seed, stream, amax)
    name = str(tile)
    codes = torch.empty_like(x, dtype=format.dtype)
    if name == "tensor":
        scale, amax = _line(x, codes, scale, format, power_of_two, seed, stream, amax=amax)
    elif name == "row" and scale is None:
        scale, amax = _rows(x, codes, format, power_of_two, seed, stream)
    else:
        scale, _, amax = _tiles(x, codes, None, scale, format, tile, power_of_two, seed, stream, amax=amax)
    return codes, scale, amax


def quantize_both(
    x: Tensor, scale: Tensor | None, format: Format, tile: Tile, power_of_two: bool, seed: int | None, stream: int = 0,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.quantize_both` of a contiguous CUDA matrix: `(codes, scale, codes_t [cols, rows], scale_t, amax)`.

    The transposed codes leave four rows at a time, so an odd number of rows is filled up with zeros, which enter no
    statistic and come after every index of the random words, and cut off again: one copy more.
    """
    if x.numel() == 0:
        return reference.quantize_both(x, scale, format, tile, power_of_two, seed, stream, amax)
    rows = x.shape[0]
    if rows % 4:
        x = torch.nn.functional.pad(x, (0, 0, 0, -rows % 4))
    codes = torch.empty_like(x, dtype=format.dtype)
    codes_t = torch.empty(x.shape[::-1], dtype=format.dtype, device=x.device)
    scale, scale_t, amax = _tiles(x, codes, codes_t, scale, format, tile, power_of_two, seed, stream, amax=amax)
    if rows % 4:
        codes, codes_t = codes[:rows], codes_t[:, :rows].contiguous()
        scale = _cut(scale, tile, rows)
    return codes, scale, codes_t, scale_t, amax


def _line(x, codes, scale, format, power_of_two, seed, stream, block=LINE, warps=8, amax=None):  # type: ignore[no-untyped-def]
    """One scale, one orientation: `(scale, amax)`."""
    count, current = x.numel(), scale is None
    keys, parts, scale, amax = _first_pass(x) if current else (scale, 1, scale, _zero(x) if amax is None else amax)
    cast_line[(triton.cdiv(count, block),)](
        x, codes, scale, keys, amax, count, parts, *_halves(seed), stream,
        CURRENT=current, E4M3=format.name == "e4m3", POWER=power_of_two, STOCHASTIC=seed is not None,
        EVEN=count % block == 0, PARTS=PARTS, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return scale, amax


def _rows(x, codes, format, power_of_two, seed, stream):  # type: ignore[no-untyped-def]
    """A scale for each row, measured, one orientation: `(scale, amax)`."""
    rows, cols = x.shape
    width = min(max(triton.next_power_of_2(cols), 128), LONGEST)
    height = max(1, 4096 // width)
    scale, amax = _fp32(x, rows, 1), _zero(x)
    cast_rows[(triton.cdiv(rows, height),)](
        x, codes, scale, amax, rows, cols, *_halves(seed), stream,
        E4M3=format.name == "e4m3", POWER=power_of_two, STOCHASTIC=seed is not None, WHOLE=cols <= width, BM=height,
        BN=width, num_warps=max(4, width // 1024),
    )  # fmt: skip
    return scale, amax


def _tiles(x, codes, codes_t, scale, format, tile, power_of_two, seed, stream, use=None, amax=None):  # type: ignore[no-untyped-def]
    """Everything that `cast_tiles` does: `(scale, scale_t, amax)`. `use` replaces the plan, for measurements."""
    (rows, cols), name, both, given = x.shape, str(tile), codes_t is not None, scale is not None
    mode = MODES[name]
    keys, parts, scale_t = x, 1, None
    if mode == "tensor" and not given:
        mode = "current"
        keys, parts, scale, amax = _first_pass(x)
    elif mode == "row" and not given:
        keys = torch.zeros(rows + cols + 1, dtype=torch.int32, device=x.device)
        even = rows % 64 == 0 and cols % 256 == 0
        row_column_keys[(triton.cdiv(rows, 64) * triton.cdiv(cols, 256),)](
            x, keys, rows, cols, BM=64, BN=256, EVEN=even, num_warps=8
        )
        amax = _fp32(x)
    if not given and scale is None:
        scale = _scale(x, tile, rows, cols)
    if both:
        scale_t = (
            scale if mode in ("tensor", "current") else scale.t() if tile.transposes else _scale(x, tile, cols, rows)
        )
    amax = _zero(x) if amax is None else amax
    use = use or plan(mode, both)
    down, across = triton.cdiv(rows, use.rows), triton.cdiv(cols, use.cols)
    other = scale_t if both else scale
    cast_tiles[(down * across,)](
        x, codes, codes_t if both else codes, scale, other, keys, amax,
        rows, cols, down, across, *scale.stride(), *other.stride(), parts, *_halves(seed), stream, 0.0,
        MODE=mode, GIVEN=given, BOTH=both, GROUP=tile.cols if mode == "group" else 0, E4M3=format.name == "e4m3",
        POWER=power_of_two, STOCHASTIC=seed is not None, QUAD=cols % 4 == 0,
        EVEN=rows % use.rows == 0 and cols % use.cols == 0, ALIGNED=rows % 16 == 0, PARTS=PARTS,
        J=use.pack, BM=use.rows, BN=use.cols, BAND=use.band, num_warps=use.warps,
        maxnreg=128 if both and power_of_two and seed is None else None,  # so that two programs fit a multiprocessor
    )  # fmt: skip
    return scale, scale_t, amax


def _first_pass(x, block=8192, warps=8, most=PARTS):  # type: ignore[no-untyped-def]
    """Starts `partial_keys`: `(keys, how many, room for the scale, room for the amax)`."""
    count = x.numel()
    parts = min(most, triton.cdiv(count, block))
    keys = torch.empty(most, dtype=torch.int32, device=x.device)
    partial_keys[(parts,)](x, keys, count, BLOCK=block, EVEN=count % block == 0, num_warps=warps)
    return keys, parts, _fp32(x, 1, 1), _fp32(x)


def _scale(x: Tensor, tile: Tile, rows: int, cols: int) -> Tensor:
    """Room for the scales of a matrix; those of 1x128 lie column by column."""
    down, across = tile.scale_shape(rows, cols)
    if str(tile) == "1x128":
        return _fp32(x, across, down).t()
    return _fp32(x, down, across)


def _cut(scale: Tensor, tile: Tile, rows: int) -> Tensor:
    """The scales of the first rows, in the order that `_scale` gives them."""
    if tile.rows != 1:
        return scale
    if str(tile) == "1x128":
        return scale[:rows].t().clone(memory_format=torch.contiguous_format).t()
    return scale[:rows].clone(memory_format=torch.contiguous_format)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _halves(seed: int | None) -> tuple[int, int]:
    """A 64-bit seed as two signed 32-bit integers, low half first, so that every seed has the same types."""
    seed = seed or 0
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
