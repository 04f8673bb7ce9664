"""The GPU's paged cache: one launch writes, two read for decode, one for chunks of prompts.

    rope_heads_write   a block of tokens of one head: norm, rotation, and for keys and values the codes in their pages
    attend_parts       decode: the partitions of one sequence and key head, each to (max, sum, weighted values) in FP32
    join_parts         decode: the partitions of a query head, joined in ascending order
    attend_rows        chunks: a block of rows (token, query head) of one key head, over all the keys that they see

**Codes are those of the reference, in bytes.** The same roundings in the same order, by `quantize`'s device functions.

**Sums are not.** FP8 codes are FP16 numbers, so that tensor cores multiply them as they are: keys by queries that a
power of two brought into FP16's range (what it flushes is 2^-34 of the row's largest), values by weights rounded to
FP16, 2^-11 of themselves. Scales are powers of two or a head's own; those of keys multiply scores, those of values
weights, relative to the largest of the partition. A BF16 cache multiplies in BF16, and its weights are rounded to 2^-8
of themselves. Weights reach 2^14, not 1, so that FP16 keeps small ones too. All sums are FP32: the FP8 tensor core,
whose accumulator keeps 13 bits, is not used. So with A the weighted sum of |v|, over n keys,

    |out - exact| <= 2^-8 |out| + (2^-11 or 2^-8) A + 2^-38 n max |v|

**A row does not depend on its company**: partitions have `PARTITION` keys counted from position 0, whoever computes
them, and are joined in their order; what a partition gives depends on its keys and the query. How many programs share
the partitions of a sequence changes nothing. Decode and chunks are two kernels, whose sums differ in order: where the
bits of both must agree, `decode=False` sends everything to `attend_rows`, which is slower for single rows.

**Nothing compiles for a number.** Counts of rows, sequences and partitions are not specialized on (16, 1, or neither):
traffic would meet each kind for the first time.

**Nothing waits for the host.** The grid comes from shapes alone: the table of pages is as wide as the longest request
may need, so programs are few enough that those without work cost microseconds, and each takes every `lanes`-th
partition. In `attend_rows` a program finds its sequence itself. A length of 0 reads nothing.

bytes: decode reads each code and scale once, and moves (D + 2) * 8 bytes a partition and query head: 6 % of an FP8
partition with 4 query heads and D = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_launch
from ...quantize.triton_cast import amax_bits, factor_of, key, nearest, scale_of, scaled
from ...triton_launch import enter
from .pages import LayerPages
from .reference import PARTITION
from .rows import Rows

LOG2E = 1.4426950408889634
PROGRAMS = 8192  # of decode, about: some dozens a multiprocessor, so that unequal lengths even out
KEYS, WARPS, STAGES, REGISTERS = 64, 4, 3, None  # of `attend_parts`
ROWS, ROW_KEYS, ROW_WARPS, ROW_STAGES = 128, 64, 8, 3  # of `attend_rows`
JOINED = 16  # partitions that `join_parts` reads at once
HEADROOM = tl.constexpr(14.0)  # the largest weight is 2^14: FP16 then holds weights down to 2^-38 of it
NONE, STATIC, DYNAMIC = 0, 1, 2  # layouts of scales


# --------------------------------------------------------------------------- writing


@triton.jit(do_not_specialize=["rows"])
def rope_heads_write(
    x_ptr, positions_ptr, slots_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, keys_ptr, values_ptr,
    key_scale_ptr, value_scale_ptr, saturated_ptr, rows, queries, kv, eps, PAGE,
    HALF: tl.constexpr, NORM: tl.constexpr, SCALES: tl.constexpr, E4M3: tl.constexpr, MAX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BM tokens of one head of x [rows, (queries + 2 kv) * 2 HALF]: queries to q_ptr, the others to their slots."""
    enter(AHEAD)
    head = tl.program_id(1)
    total = queries + 2 * kv
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.arange(0, BN)
    held = r < rows
    inside = held[:, None] & (i < HALF)[None, :]
    at = (r.to(tl.int64)[:, None] * total + head) * (2 * HALF) + i[None, :]
    first = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < queries + kv:
        if NORM:
            weight_ptr = q_norm_ptr if head < queries else k_norm_ptr
            left = tl.load(weight_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
            right = tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
            a, b = first.to(tl.float64), second.to(tl.float64)
            mean = (tl.sum(a * a + b * b, axis=1) / (2 * HALF)).to(tl.float32)
            rstd = tl.div_rn(tl.full([BM], 1.0, tl.float32), tl.sqrt_rn(mean + eps))[:, None]
            first = (first * rstd * left[None, :]).to(tl.bfloat16).to(tl.float32)
            second = (second * rstd * right[None, :]).to(tl.bfloat16).to(tl.float32)
        place = tl.load(positions_ptr + r, mask=held, other=0)[:, None] * HALF + i[None, :]
        cos = tl.load(cos_ptr + place, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + place, mask=inside, other=0.0)
        turned = (first * cos - second * sin).to(tl.bfloat16).to(tl.float32)
        second = (second * cos + first * sin).to(tl.bfloat16).to(tl.float32)
        first = turned
    if head < queries:
        q_at = q_ptr + (r.to(tl.int64)[:, None] * queries + head) * (2 * HALF) + i[None, :]
        tl.store(q_at, first.to(tl.bfloat16), mask=inside)
        tl.store(q_at + HALF, second.to(tl.bfloat16), mask=inside)
    else:
        is_key = head < queries + kv
        h = head - queries if is_key else head - queries - kv
        slot = tl.load(slots_ptr + r, mask=held, other=-1)
        kept = slot >= 0
        row = ((slot // PAGE) * kv + h) * PAGE + slot % PAGE
        codes_ptr = keys_ptr if is_key else values_ptr
        scale_ptr = key_scale_ptr if is_key else value_scale_ptr
        out = codes_ptr + row[:, None] * (2 * HALF) + i[None, :]
        stored = kept[:, None] & (i < HALF)[None, :]
        if SCALES == 0:
            tl.store(out, first.to(tl.bfloat16), mask=stored)
            tl.store(out + HALF, second.to(tl.bfloat16), mask=stored)
        else:
            POWER: tl.constexpr = SCALES == 2
            if POWER:
                most = tl.maximum(tl.max(key(first), axis=1), tl.max(key(second), axis=1))
                scale = scale_of(amax_bits(most), E4M3, True)
                tl.store(scale_ptr + row, scale, mask=kept)
            else:
                scale = tl.load(scale_ptr + h) + tl.zeros([BM], tl.float32)
            factor = factor_of(scale, POWER)[:, None]
            left, right = scaled(first, factor, POWER), scaled(second, factor, POWER)
            tl.store(out, nearest(first, left, E4M3), mask=stored)
            tl.store(out + HALF, nearest(second, right, E4M3), mask=stored)
            if not POWER:
                count = tl.sum(tl.sum(beyond(first, left, stored, MAX) + beyond(second, right, stored, MAX), 1), 0)
                if count > 0:
                    tl.atomic_add(saturated_ptr, count.to(tl.int64), sem="relaxed")


@triton.jit
def beyond(x, v, stored, MAX: tl.constexpr):
    """1 where a finite x was clipped: its quotient v is larger than the largest code."""
    finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    return (stored & finite & (tl.abs(v) > MAX)).to(tl.int32)


def rope_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer: LayerPages,
    rope: tuple[Tensor, Tensor],
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.rope_write` on CUDA, equal in bytes. Both heads have norms, or neither."""
    assert (q_norm is None) == (k_norm is None)
    qkv = qkv.contiguous()
    rows, width, kv = len(qkv), layer.head_dim, layer.num_kv_heads
    queries = qkv.shape[1] // width - 2 * kv
    q = torch.empty(rows, queries, width, dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return q
    height = 1 if rows <= 64 else 16
    keys, values = codes_of(layer)
    key_scale, value_scale = (qkv if scale is None else scale for scale in (layer.key_scale, layer.value_scale))
    norms = (qkv if norm is None else norm for norm in (q_norm, k_norm))
    rope_heads_write[(triton.cdiv(rows, height), queries + 2 * kv)](
        qkv, positions, slots, *rope, *norms, q, keys, values, key_scale, value_scale, layer.saturated,
        rows, queries, kv, eps, layer.page_size,
        HALF=width // 2, NORM=q_norm is not None, SCALES=scales_of(layer),
        E4M3=layer.format is not None and layer.format.name == "e4m3",
        MAX=0.0 if layer.format is None else float(layer.format.max),
        BM=height, BN=triton.next_power_of_2(width // 2), num_warps=1 if height == 1 else 4, enable_fp_fusion=False,
        AHEAD=triton_launch.LAUNCH, launch_pdl=triton_launch.LAUNCH,
    )  # fmt: skip
    return q


def scales_of(layer: LayerPages) -> int:
    """Which of the three layouts the scales of a layer have."""
    return NONE if layer.key_scale is None else STATIC if layer.static else DYNAMIC


def codes_of(layer: LayerPages) -> tuple[Tensor, Tensor]:
    """Keys and values as they are stored to: bytes, or BF16."""
    held = layer.key_codes, layer.value_codes
    return held if layer.format is None else (held[0].view(torch.uint8), held[1].view(torch.uint8))


# --------------------------------------------------------------------------- what both readers do


@triton.jit
def ready(q, PLAIN: tl.constexpr):
    """Queries [rows, D] for the tensor core, and what their scores are to be multiplied by [rows]."""
    if PLAIN:
        return q, tl.full([q.shape[0]], 1.0, tl.float32)
    else:
        wide = q.to(tl.float32)
        exponent = tl.maximum(tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1) >> 23, 20)
        factor = ((264 - exponent) << 23).to(tl.float32, bitcast=True)  # the largest becomes 2^10 and more
        return (wide * factor[:, None]).to(tl.float16), ((exponent - 10) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rows_of(pages_ptr, start, at, inside, h, kv, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """Where the KEYS keys at the positions `at`, from `start` on, lie: rows of [pages * KV * PAGE], int64."""
    if PAGE % KEYS == 0:
        page = tl.load(pages_ptr + start // PAGE).to(tl.int64)
        return ((page * kv + h) * PAGE + start % PAGE) + tl.arange(0, KEYS)
    else:
        page = tl.load(pages_ptr + at // PAGE, mask=inside, other=0).to(tl.int64)
        return (page * kv + h) * PAGE + at % PAGE


@triton.jit
def largest_scale(ptr, pages_ptr, start, length, h, kv, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """The largest of the scales of KEYS keys from `start` on."""
    at = start + tl.arange(0, KEYS)
    inside = at < length
    row = rows_of(pages_ptr, start, at, inside, h, kv, PAGE, KEYS)
    return tl.max(tl.load(ptr + row, mask=inside, other=0.0), axis=0)


@triton.jit
def codes_at(ptr, rows, d, inside, D: tl.constexpr, PLAIN: tl.constexpr):
    """Keys or values [keys, BD], exactly: BF16 as they are, FP8 as FP16."""
    held = inside[:, None] & (d < D)[None, :] if d.shape[0] != D else inside[:, None]
    codes = tl.load(ptr + rows[:, None] * D + d[None, :], mask=held, other=0.0)
    if PLAIN:
        return codes
    else:
        return codes.to(tl.float16)


# --------------------------------------------------------------------------- decode


@triton.jit(do_not_specialize=["width", "parts"])
def attend_parts(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, pages_ptr, lengths_ptr, product_ptr, top_ptr, sum_ptr,
    kv, width, parts, scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr, PART: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every `num_programs(1)`-th partition of one sequence and key head; `scale` includes log2(e).

    product FP32 [S, KV, parts, GROUP, D], top and sum FP32 [S, KV, parts, GROUP]
    """
    enter(AHEAD)
    PLAIN: tl.constexpr = SCALES == 0
    sequence, h = tl.program_id(0) // kv, tl.program_id(0) % kv
    length = tl.load(lengths_ptr + sequence)
    count = tl.cdiv(length, PART)
    g, d = tl.arange(0, ROWS), tl.arange(0, BD)
    mine = (g < GROUP)[:, None] & (d < D)[None, :]
    q_at = (sequence.to(tl.int64) * kv + h) * GROUP + g
    q, factor = ready(tl.load(q_ptr + q_at[:, None] * D + d[None, :], mask=mine, other=0.0), PLAIN)
    factor = factor * scale
    value_unit = 1.0
    if SCALES == 1:
        factor = factor * tl.load(key_scale_ptr + h)
        value_unit = tl.load(value_scale_ptr + h)
    pages_ptr += sequence.to(tl.int64) * width
    for part in range(tl.program_id(1), count, tl.num_programs(1)):
        start = part * PART
        if SCALES == 2:
            value_unit = largest_scale(value_scale_ptr, pages_ptr, start, length, h, kv, PAGE, PART)
            again = factor_of(value_unit, True)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        product = tl.zeros([ROWS, BD], tl.float32)
        for k in range(start, tl.minimum(start + PART, length), KEYS):
            at = k + tl.arange(0, KEYS)
            seen = at < length
            row = rows_of(pages_ptr, k, at, seen, h, kv, PAGE, KEYS)
            keys = codes_at(keys_ptr, row, d, seen, D, PLAIN)
            values = codes_at(values_ptr, row, d, seen, D, PLAIN)
            scores = tl.dot(q, keys.T) * factor[:, None]
            if SCALES == 2:
                scores = scores * tl.load(key_scale_ptr + row, mask=seen, other=1.0)[None, :]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            most = tl.maximum(top, tl.max(scores, axis=1) - HEADROOM)
            weights = tl.exp2(scores - most[:, None])
            fade = tl.exp2(top - most)
            total = total * fade + tl.sum(weights, axis=1)
            if SCALES == 2:
                weights = weights * (tl.load(value_scale_ptr + row, mask=seen, other=0.0) * again)[None, :]
            product = tl.dot(weights.to(values.dtype), values, product * fade[:, None])
            top = most
        out = (tl.program_id(0).to(tl.int64) * parts + part) * GROUP + g
        tl.store(product_ptr + out[:, None] * D + d[None, :], product * value_unit, mask=mine)
        tl.store(top_ptr + out, top, mask=g < GROUP)
        tl.store(sum_ptr + out, total, mask=g < GROUP)


@triton.jit(do_not_specialize=["parts"])
def join_parts(
    product_ptr, top_ptr, sum_ptr, lengths_ptr, out_ptr, kv, parts,
    GROUP: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, JOINED: tl.constexpr, BD: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence: out [S, KV * GROUP, D]."""
    enter(AHEAD)
    sequence, head = tl.program_id(0) // (kv * GROUP), tl.program_id(0) % (kv * GROUP)
    count = tl.cdiv(tl.load(lengths_ptr + sequence), PART)
    d = tl.arange(0, BD)
    first = (sequence.to(tl.int64) * kv + head // GROUP) * parts * GROUP + head % GROUP
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    product = tl.zeros([BD], tl.float32)
    for start in range(0, count, JOINED):
        part = start + tl.arange(0, JOINED)
        at = first + part * GROUP
        there = part < count
        tops = tl.load(top_ptr + at, mask=there, other=float("-inf"))
        sums = tl.load(sum_ptr + at, mask=there, other=0.0)
        held = there[:, None] & (d < D)[None, :]
        products = tl.load(product_ptr + at[:, None] * D + d[None, :], mask=held, other=0.0)
        most = tl.maximum(top, tl.max(tops, axis=0))
        share, fade = tl.exp2(tops - most), tl.exp2(top - most)
        total = total * fade + tl.sum(sums * share, axis=0)
        product = product * fade + tl.sum(products * share[:, None], axis=0)
        top = most
    y = tl.where(count > 0, tl.div_rn(product, tl.broadcast_to(tl.where(count > 0, total, 1.0), [BD])), 0.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + d, y.to(tl.bfloat16), mask=d < D)


def attend_decode(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    """One row a sequence."""
    (sequences, heads, width), kv = q.shape, layer.num_kv_heads
    group, pages = heads // kv, batch.pages.shape[1]
    parts = triton.cdiv(pages * layer.page_size, PARTITION)
    lanes = min(parts, triton.cdiv(PROGRAMS, sequences * kv))
    product = torch.empty(sequences, kv, parts, group, width, device=q.device)
    top, total = torch.empty(2, sequences, kv, parts, group, device=q.device)
    out = torch.empty(sequences, heads * width, dtype=q.dtype, device=q.device)
    held = read_from(layer, q)
    wide = triton.next_power_of_2(width)
    attend_parts[(sequences * kv, lanes)](
        q, *held, batch.pages, batch.lengths, product, top, total, kv, pages, parts, scale * LOG2E,
        PAGE=layer.page_size, GROUP=group, D=width, SCALES=scales_of(layer), PART=PARTITION, KEYS=KEYS,
        ROWS=max(16, triton.next_power_of_2(group)), BD=max(wide, 16), num_warps=WARPS, num_stages=STAGES,
        maxnreg=REGISTERS, AHEAD=triton_launch.LAUNCH, launch_pdl=triton_launch.LAUNCH,
    )  # fmt: skip
    join_parts[(sequences * heads,)](
        product, top, total, batch.lengths, out, kv, parts,
        GROUP=group, D=width, PART=PARTITION, JOINED=JOINED, BD=wide, num_warps=2,
        AHEAD=triton_launch.LAUNCH, launch_pdl=triton_launch.LAUNCH,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------- chunks


@triton.jit(do_not_specialize=["width", "sequences"])
def attend_rows(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, pages_ptr, lengths_ptr, starts_ptr, positions_ptr,
    out_ptr, kv, width, sequences, scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """A block of ROWS // GROUP tokens of one sequence, with all query heads of key head program_id(0)."""
    PLAIN: tl.constexpr = SCALES == 0
    TOKENS: tl.constexpr = ROWS // GROUP
    h, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    i = tl.arange(0, SEQUENCES)
    begin = tl.load(starts_ptr + i, mask=i < sequences, other=0)
    blocks = (tl.load(starts_ptr + i + 1, mask=i < sequences, other=0) - begin + TOKENS - 1) // TOKENS
    ends = tl.cumsum(blocks, 0)
    sequence = tl.sum(((ends <= block) & (i < sequences)).to(tl.int32), 0)
    if sequence < sequences:
        first = tl.load(starts_ptr + sequence) + (block - tl.sum(tl.where(i < sequence, blocks, 0), 0)) * TOKENS
        last = tl.minimum(first + TOKENS, tl.load(starts_ptr + sequence + 1))
        r, d = tl.arange(0, ROWS), tl.arange(0, BD)
        token = first + r // GROUP
        mine = (token < last) & (r < TOKENS * GROUP)
        position = tl.load(positions_ptr + token, mask=mine, other=0)
        q_at = (token.to(tl.int64) * kv + h) * GROUP + r % GROUP
        held = mine[:, None] & (d < D)[None, :]
        q, factor = ready(tl.load(q_ptr + q_at[:, None] * D + d[None, :], mask=held, other=0.0), PLAIN)
        factor = factor * scale
        unit = 1.0
        if SCALES == 1:
            factor = factor * tl.load(key_scale_ptr + h)
            unit = tl.load(value_scale_ptr + h)
        length = tl.load(lengths_ptr + sequence)
        stop = tl.minimum(tl.load(positions_ptr + last - 1) + 1, length)
        clear = tl.minimum(tl.load(positions_ptr + first) + 1, length) // KEYS * KEYS  # up to here, all rows see all
        pages_ptr += sequence.to(tl.int64) * width
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        product = tl.zeros([ROWS, BD], tl.float32)
        unit = unit + tl.zeros([1], tl.float32)
        for k in range(0, clear, KEYS):
            top, total, product, unit = met(
                q, factor, top, total, product, unit, k, stop, position, keys_ptr, values_ptr, key_scale_ptr,
                value_scale_ptr, pages_ptr, h, kv, d, PAGE, D, SCALES, KEYS, False,
            )  # fmt: skip
        for k in range(clear, stop, KEYS):
            top, total, product, unit = met(
                q, factor, top, total, product, unit, k, stop, position, keys_ptr, values_ptr, key_scale_ptr,
                value_scale_ptr, pages_ptr, h, kv, d, PAGE, D, SCALES, KEYS, True,
            )  # fmt: skip
        y = tl.where(length > 0, product * (unit / tl.where(total > 0, total, 1.0))[:, None], 0.0)
        tl.store(out_ptr + q_at[:, None] * D + d[None, :], y.to(tl.bfloat16), mask=held)


@triton.jit
def met(
    q, factor, top, total, product, unit, k, stop, position, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    pages_ptr, h, kv, d, PAGE: tl.constexpr, D: tl.constexpr, SCALES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The state after KEYS more keys; `product` is in units of `unit` [1], which follows the values' scales."""
    PLAIN: tl.constexpr = SCALES == 0
    at = k + tl.arange(0, KEYS)
    seen = at < stop
    row = rows_of(pages_ptr, k, at, seen, h, kv, PAGE, KEYS)
    keys = codes_at(keys_ptr, row, d, seen, D, PLAIN)
    values = codes_at(values_ptr, row, d, seen, D, PLAIN)
    scores = tl.dot(q, keys.T) * factor[:, None]
    if SCALES == 2:
        scores = scores * tl.load(key_scale_ptr + row, mask=seen, other=1.0)[None, :]
    if MASKED:
        scores = tl.where(at[None, :] <= tl.minimum(position, stop - 1)[:, None], scores, float("-inf"))
    most = tl.maximum(top, tl.max(scores, axis=1) - HEADROOM)
    weights = tl.exp2(scores - most[:, None])
    fade = tl.exp2(top - most)
    total = total * fade + tl.sum(weights, axis=1)
    if SCALES == 2:
        value_scale = tl.load(value_scale_ptr + row, mask=seen, other=0.0)
        largest = tl.max(value_scale, axis=0) + tl.zeros([1], tl.float32)
        again = factor_of(largest, True)
        weights = weights * (value_scale * again)[None, :]
        fade = fade * (unit * again)
        unit = largest
    product = tl.dot(weights.to(values.dtype), values, product * fade[:, None])
    return most, total, product, unit


def attend_chunks(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    """Any number of rows a sequence."""
    (tokens, heads, width), kv = q.shape, layer.num_kv_heads
    group, sequences = heads // kv, len(batch.lengths)
    out = torch.zeros(tokens, heads * width, dtype=q.dtype, device=q.device)
    rows = max(ROWS, triton.next_power_of_2(group))
    blocks = triton.cdiv(tokens, rows // group) + sequences
    attend_rows[(kv, blocks)](
        q, *read_from(layer, q), batch.pages, batch.lengths, batch.starts, batch.positions, out,
        kv, batch.pages.shape[1], sequences, scale * LOG2E,
        PAGE=layer.page_size, GROUP=group, D=width, SCALES=scales_of(layer), KEYS=ROW_KEYS, ROWS=rows,
        BD=max(16, triton.next_power_of_2(width)), SEQUENCES=triton.next_power_of_2(sequences),
        num_warps=ROW_WARPS, num_stages=ROW_STAGES,
    )  # fmt: skip
    return out


def read_from(layer: LayerPages, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales, as the kernels read them."""
    scales = (q if scale is None else scale for scale in (layer.key_scale, layer.value_scale))
    return layer.key_codes, layer.value_codes, *scales  # type: ignore[return-value]


def attend(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    """`reference.attend` on CUDA, within the bound above."""
    run = attend_decode if batch.decode else attend_chunks
    return run(q.contiguous(), layer, batch, scale)
