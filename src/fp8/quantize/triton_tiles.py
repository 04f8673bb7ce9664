"""The kernel that reads a rectangle of the matrix once and writes its codes, its transposed codes, or both.

**One read, two orientations.** A program holds a rectangle of BM x BN numbers in registers, as a tensor `[BM / J, J,
BN]` in which element (i, j, c) is row J * i + j, column c. Loads and row-major stores run along c, 16 bytes at a
time. For the other orientation the J = 4 codes at (i, 0..3, c), which lie in one thread because Triton hands out
dimension 1 last, are packed into one 32-bit word: four neighbours in the transposed row c. Only `[BM / 4, BN]` words
then change places through shared memory, as words and not as bytes, and leave as 16-byte stores along the transposed
row. The number of rows is a multiple of four where both are written; J is 1 where only one is.

**Where a scale comes from** (MODE):

    tensor   one scale, given; the finite amax goes to one integer by atomic maximum
    current  one scale, from the partial maxima that `partial_keys` left: every program reduces those few hundred words
             itself, so there is no third launch and nothing returns to the host
    row      a scale for each row and, transposed, each column, from the maxima that `row_column_keys` left
    group    1x128 or 1x32: GROUP neighbours in a row; transposed, GROUP neighbours in a column
    square   128x128: the same scale in both orientations

The second reading passes (current, row) walk the matrix from its end, where the first pass has just left it in the L2.
Maxima are order-free, so every path is deterministic.

**Order of the scales.** 1x128 scales are stored column by column, as cuBLASLt reads them; the strides say so.

**Indices.** A row index times the row length is taken in 64 bits; offsets within a row fit 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_cast import (
    amax_bits,
    factor_of,
    key,
    nearest,
    nearest_again,
    raise_amax,
    scale_of,
    scaled,
    stochastic,
    words_of,
    words_of_four,
)


@triton.jit
def largest_key(x_ptr, count, part, parts, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """The largest key of a part of x, a line of `count` numbers: every `parts`-th stretch of BLOCK."""
    lane = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.int32)
    for start in range(part.to(tl.int64) * BLOCK, count, parts.to(tl.int64) * BLOCK):
        if EVEN:
            x = tl.load(x_ptr + start + lane)
        else:
            x = tl.load(x_ptr + start + lane, mask=lane < count - start, other=0.0)
        best = tl.maximum(best, key(x.to(tl.float32)))
    return tl.max(best, axis=0)


@triton.jit
def partial_keys(x_ptr, keys_ptr, count, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """keys[p] = the largest key of what program p reads."""
    tl.store(keys_ptr + tl.program_id(0), largest_key(x_ptr, count, tl.program_id(0), tl.num_programs(0), BLOCK, EVEN))


@triton.jit
def raise_row_column_keys(
    x_ptr, keys_ptr, rows, cols, tile_r, tile_c, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr
):
    """One rectangle's share of keys [rows + cols + 1], zero before: the largest of each row, each column, and all."""
    r = tile_r * BM + tl.arange(0, BM)
    c = tile_c * BN + tl.arange(0, BN)
    at = x_ptr + r.to(tl.int64)[:, None] * cols + c[None, :]
    if EVEN:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    keys = key(x.to(tl.float32))
    down = tl.max(keys, axis=0)
    tl.atomic_max(keys_ptr + r, tl.max(keys, axis=1), mask=r < rows, sem="relaxed")
    tl.atomic_max(keys_ptr + rows + c, down, mask=c < cols, sem="relaxed")
    tl.atomic_max(keys_ptr + rows + cols, tl.max(down, axis=0), sem="relaxed")


@triton.jit
def row_column_keys(x_ptr, keys_ptr, rows, cols, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """`raise_row_column_keys` of a whole matrix, a rectangle a program."""
    across = tl.cdiv(cols, BN)
    tile_r, tile_c = tl.program_id(0) // across, tl.program_id(0) % across
    raise_row_column_keys(x_ptr, keys_ptr, rows, cols, tile_r, tile_c, BM, BN, EVEN)


@triton.jit
def along_rows(keys, GROUP: tl.constexpr, H: tl.constexpr, J: tl.constexpr, BN: tl.constexpr):
    """[H, J, BN] keys to [H, J, BN / GROUP]: the maximum of each group of neighbours in a row."""
    if GROUP == BN:
        return tl.max(keys, axis=2)[:, :, None]
    else:
        return tl.max(tl.reshape(keys, [H, J, BN // GROUP, GROUP]), axis=3)


@triton.jit
def spread_rows(factor, GROUP: tl.constexpr, H: tl.constexpr, J: tl.constexpr, BN: tl.constexpr):
    """[H, J, BN / GROUP] to what broadcasts over [H, J, BN]."""
    if GROUP == BN:
        return factor
    else:
        wide = tl.broadcast_to(factor[:, :, :, None], [H, J, BN // GROUP, GROUP])
        return tl.reshape(wide, [H, J, BN])


@triton.jit
def along_columns(keys, GROUP: tl.constexpr, H: tl.constexpr, J: tl.constexpr, BN: tl.constexpr):
    """[H, J, BN] keys to [H * J / GROUP, BN]: the maximum of each group of neighbours in a column."""
    keys = tl.max(keys, axis=1)
    if GROUP == H * J:
        return tl.max(keys, axis=0)[None, :]
    else:
        return tl.max(tl.reshape(keys, [H * J // GROUP, GROUP // J, BN]), axis=1)


@triton.jit
def spread_columns(factor, GROUP: tl.constexpr, H: tl.constexpr, J: tl.constexpr, BN: tl.constexpr):
    """[H * J / GROUP, BN] to what broadcasts over [H, J, BN]."""
    if GROUP == H * J:
        return factor[:, None, :]
    else:
        tall = tl.broadcast_to(factor[:, None, :], [H * J // GROUP, GROUP // J, BN])
        return tl.reshape(tall, [H, BN])[:, None, :]


@triton.jit
def encode(x, v, word, E4M3: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes (uint8) by either rounding."""
    if STOCHASTIC:
        return stochastic(x, v, word, E4M3)
    return nearest(x, v, E4M3)


@triton.jit
def pack(codes, H: tl.constexpr, J: tl.constexpr, BN: tl.constexpr):
    """[H, J = 4, BN] codes to [H, BN] words of four bytes, the code of j = 0 lowest."""
    place = (tl.arange(0, J) * 8)[None, :, None]
    return tl.sum(codes.to(tl.uint32) << place.to(tl.uint32), axis=1).to(tl.uint32)


@triton.jit
def cast_rectangle(
    x_ptr, codes_ptr, codes_t_ptr, scale_ptr, scale_t_ptr, keys_ptr, amax_ptr,
    rows, cols, tile_r, tile_c, stride_r, stride_c, stride_tr, stride_tc, parts,
    seed_low, seed_high, stream, nothing,
    MODE: tl.constexpr, GIVEN: tl.constexpr, BOTH: tl.constexpr, GROUP: tl.constexpr, E4M3: tl.constexpr,
    POWER: tl.constexpr, STOCHASTIC: tl.constexpr, QUAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """The rectangle (tile_r, tile_c) of x [rows, cols] to codes, and with BOTH to codes_t [cols, rows].

    `nothing` is 0.0, which the compiler must not know (`nearest_again`). `keys_ptr` is read by current and row;
    `amax_ptr` (int32 bits, zero or less before) is raised by the other modes, and with RAISE by these two as well.
    J = 1 with BOTH is for any number of rows: the transposed codes leave as single bytes.
    """
    H: tl.constexpr = BM // J
    first = (tile_r == 0) & (tile_c == 0)
    i = tl.arange(0, H)[:, None]
    j = tl.arange(0, J)[None, :]
    r = tile_r * BM + i * J + j
    c = tile_c * BN + tl.arange(0, BN)
    at = r.to(tl.int64)[:, :, None] * cols + c[None, None, :]
    inside = (r < rows)[:, :, None] & (c < cols)[None, None, :]
    if EVEN:
        x = tl.load(x_ptr + at).to(tl.float32)
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)

    # ---- the scales: `factor` for the rows, `factor_t` for the columns
    if MODE == "tensor":
        factor = factor_of(tl.load(scale_ptr), POWER)
        raise_amax(amax_ptr, amax_bits(tl.max(key(x))))
    elif MODE == "current":
        lane = tl.arange(0, PARTS)
        bits = amax_bits(tl.max(tl.load(keys_ptr + lane, mask=lane < parts, other=0), axis=0))
        scale = scale_of(bits, E4M3, POWER)
        factor = factor_of(scale, POWER)
        if first:
            tl.store(scale_ptr, scale)
            if RAISE:
                raise_amax(amax_ptr, bits)
            else:
                tl.store(amax_ptr, bits.to(tl.float32, bitcast=True))
    elif MODE == "square":
        bits = amax_bits(tl.max(key(x)))
        if GIVEN:
            scale = tl.load(scale_ptr + tile_r * stride_r + tile_c * stride_c)
        else:
            scale = scale_of(bits, E4M3, POWER)
            tl.store(scale_ptr + tile_r * stride_r + tile_c * stride_c, scale)
        factor = factor_of(scale, POWER)
        raise_amax(amax_ptr, bits)
    elif MODE == "row":
        if GIVEN:
            scale = tl.load(scale_ptr + r * stride_r, mask=r < rows, other=1.0)
            raise_amax(amax_ptr, amax_bits(tl.max(key(x))))
        else:
            scale = scale_of(amax_bits(tl.load(keys_ptr + r, mask=r < rows, other=0)), E4M3, POWER)
            if tile_c == 0:
                tl.store(scale_ptr + r, scale, mask=r < rows)
        factor = factor_of(scale, POWER)[:, :, None]
        if BOTH:
            scale_t = scale_of(amax_bits(tl.load(keys_ptr + rows + c, mask=c < cols, other=0)), E4M3, POWER)
            if tile_r == 0:
                tl.store(scale_t_ptr + c, scale_t, mask=c < cols)
            factor_t = factor_of(scale_t, POWER)[None, None, :]
            if first:
                bits = amax_bits(tl.load(keys_ptr + rows + cols))
                if RAISE:
                    raise_amax(amax_ptr, bits)
                else:
                    tl.store(amax_ptr, bits.to(tl.float32, bitcast=True))
    else:
        GROUPS: tl.constexpr = BN // GROUP
        keys = key(x)
        largest = along_rows(keys, GROUP, H, J, BN)
        g = tile_c * GROUPS + tl.arange(0, GROUPS)
        spot = r[:, :, None] * stride_r + g[None, None, :] * stride_c
        held = (r < rows)[:, :, None] & (g * GROUP < cols)[None, None, :]
        if GIVEN:
            scale = tl.load(scale_ptr + spot, mask=held, other=1.0)
        else:
            scale = scale_of(amax_bits(largest), E4M3, POWER)
            tl.store(scale_ptr + spot, scale, mask=held)
        factor = spread_rows(factor_of(scale, POWER), GROUP, H, J, BN)
        if BOTH:
            scale_t = scale_of(amax_bits(along_columns(keys, GROUP, H, J, BN)), E4M3, POWER)
            h = tile_r * (BM // GROUP) + tl.arange(0, BM // GROUP)
            spot_t = c[None, :] * stride_tr + h[:, None] * stride_tc
            tl.store(scale_t_ptr + spot_t, scale_t, mask=(c < cols)[None, :] & (h * GROUP < rows)[:, None])
            factor_t = spread_columns(factor_of(scale_t, POWER), GROUP, H, J, BN)
        raise_amax(amax_ptr, amax_bits(tl.max(largest)))

    # ---- the codes
    word = 0
    if STOCHASTIC:
        if QUAD:
            quad = tile_c * (BN // 4) + tl.arange(0, BN // 4)
            block = r.to(tl.int64)[:, :, None] * (cols // 4) + quad[None, None, :]
            word = words_of_four(block, seed_low, seed_high, stream, [H, J, BN])
        else:
            word = words_of(at, seed_low, seed_high, stream)
    codes = encode(x, scaled(x, factor, POWER), word, E4M3, STOCHASTIC)
    out = codes_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at
    if EVEN:
        tl.store(out, codes)
    else:
        tl.store(out, codes, mask=inside)

    # ---- the transposed codes
    if BOTH:
        if MODE == "row" or MODE == "group":
            codes = encode(x, scaled(x, factor_t, POWER), word, E4M3, STOCHASTIC)
        elif E4M3 and not STOCHASTIC:
            codes = nearest_again(x, scaled(x, factor, POWER), nothing)
        if J == 1:
            turned = tl.trans(tl.reshape(codes, [H, BN]))
            base = codes_t_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        else:
            turned = tl.trans(pack(codes, H, J, BN))
            base = codes_t_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        words = rows // J
        if ALIGNED:
            words = tl.multiple_of(words, 16 // J)
        k = tile_r * H + tl.arange(0, H)
        out_t = base + (c.to(tl.int64)[:, None] * words + k[None, :])
        if EVEN:
            tl.store(out_t, turned)
        else:
            tl.store(out_t, turned, mask=(c < cols)[:, None] & (k < words)[None, :])


@triton.jit(
    do_not_specialize=["down", "across", "parts", "seed_low", "seed_high", "stream"],
    do_not_specialize_on_alignment=["amax_ptr"],
)
def cast_tiles(
    x_ptr, codes_ptr, codes_t_ptr, scale_ptr, scale_t_ptr, keys_ptr, amax_ptr,
    rows, cols, down, across, stride_r, stride_c, stride_tr, stride_tc, parts,
    seed_low, seed_high, stream, nothing,
    MODE: tl.constexpr, GIVEN: tl.constexpr, BOTH: tl.constexpr, GROUP: tl.constexpr, E4M3: tl.constexpr,
    POWER: tl.constexpr, STOCHASTIC: tl.constexpr, QUAD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A whole matrix: `down x across` rectangles, one program each; see `cast_rectangle`.

    BAND rectangles in a column follow each other before the next column starts (1: row after row of rectangles).
    """
    pid = tl.program_id(0)
    if MODE == "current" or MODE == "row":
        pid = down * across - 1 - pid
    if BAND == 1:
        tile_r, tile_c = pid // across, pid % across
    else:
        first = pid // (BAND * across) * BAND
        height = tl.minimum(down - first, BAND)
        within = pid % (BAND * across)
        tile_r, tile_c = first + within % height, within // height
    cast_rectangle(
        x_ptr, codes_ptr, codes_t_ptr, scale_ptr, scale_t_ptr, keys_ptr, amax_ptr,
        rows, cols, tile_r, tile_c, stride_r, stride_c, stride_tr, stride_tc, parts,
        seed_low, seed_high, stream, nothing,
        MODE, GIVEN, BOTH, GROUP, E4M3, POWER, STOCHASTIC, QUAD, EVEN, ALIGNED, PARTS, J, BM, BN, False,
    )  # fmt: skip
