"""Writing to and reading from a paged cache, as the definition: plain torch.

**`rope_write`.** From the joined product of a layer to queries, and to keys and values in their pages.

    q, k = RN(norm(q)), RN(norm(k))      a head at a time, where the model has such norms (Qwen3): `fused/norm`
    q, k = RN(rope(q)), RN(rope(k))      FP32, each product rounded: `fused/rope`
    codes = quantize(k), quantize(v)     of the BF16 values: a dynamic scale a token and head, or the head's own

RN rounds to BF16. The codes are those of `attention/cache.py`, byte for byte.

**`attend`.** With K and V decoded exactly, in FP32:

    score[j] = (q · k[j]) * scale        j <= the row's position
    out      = sum of exp(score[j] - max) v[j] / sum of exp(score[j] - max),   rounded once to BF16

**A row's result never depends on its company.** A sum in floating point depends on its order, and libraries choose the
order by the shape of what they are given. So the shape is always the same: keys are visited in partitions of
`PARTITION`, queries in blocks of `BLOCK` rows, both counted from position 0 of their sequence and filled up with zeros.
A position has its place in a block once and for all, whatever chunk it comes in. Each partition gives (max, sum,
weighted values), and these are combined in ascending order; a partition that a row cannot see leaves its state
untouched, bit by bit. What the row gets is then a function of its query, of the keys up to its position, and of nothing
else: not of the chunk that it came in, nor of the pages' numbers, nor of other sequences.

Split keys and their combination: Dao, "FlashAttention-2", 2023; "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...fused.norm.reference import rstd_of, values
from ...fused.rope.reference import rotate
from ...quantize import run_quantize
from ...tile import Tile
from .pages import LayerPages
from .rows import Rows

PARTITION = 256  # keys
BLOCK = 8  # query rows of one sequence

State = tuple[Tensor, Tensor, Tensor]  # [KV, G * BLOCK, 1], the same, [KV, G * BLOCK, D]


# --------------------------------------------------------------------------- writing


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
    keys = layer.num_kv_heads
    heads = qkv.view(qkv.shape[0], -1, layer.head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * keys, keys, keys], 1)
    q, k = normed(q, q_norm, eps), normed(k, k_norm, eps)
    cos, sin = (table[positions.long()].unsqueeze(1) for table in rope)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    write(layer, k, layer.key_codes, layer.key_scale, slots)
    write(layer, v, layer.value_codes, layer.value_scale, slots)
    return q


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm of each head of x [T, heads, D], or x itself."""
    if weight is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return values(rows, rstd_of(rows, eps), weight, x.dtype).view(x.shape)


def write(layer: LayerPages, x: Tensor, codes: Tensor, scale: Tensor | None, slots: Tensor) -> None:
    """Store x [T, KV, D] at its slots; -1 is no slot."""
    kept = slots >= 0
    x, slots = x[kept], slots[kept]
    page, offset = slots // layer.page_size, slots % layer.page_size
    if scale is None or layer.format is None:
        codes[page, :, offset] = x.to(codes.dtype)
        return
    rows = x.reshape(-1, layer.head_dim).contiguous()
    given = scale.repeat(x.shape[0]).unsqueeze(1) if layer.static else None
    made, measured, _ = run_quantize(rows, given, layer.format, Tile(1, 0), given is None)
    codes.view(torch.uint8)[page, :, offset] = made.view(torch.uint8).view(x.shape)
    if given is None:
        scale[page, :, offset] = measured.view(x.shape[:2])
    else:
        layer.saturated.add_(clipped(rows, given, layer.format.max))


def clipped(x: Tensor, scale: Tensor, largest: float) -> Tensor:
    """How many finite elements of x lie beyond the largest code."""
    return (x.isfinite() & ((x.float() / scale).abs() > largest)).sum()


# --------------------------------------------------------------------------- reading


def attend(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    tokens, heads, width = q.shape
    out = torch.zeros(tokens, heads * width, dtype=q.dtype, device=q.device)
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    for s, length in enumerate(lengths):
        if length:
            rows = slice(starts[s], starts[s + 1])
            parts = list(partitions(layer, batch.pages[s], length))
            out[rows] = attend_sequence(q[rows], parts, batch.positions[rows], scale).to(q.dtype)
    return out


def partitions(layer: LayerPages, pages: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values, FP32 `[KV, PARTITION, D]` each, of the positions from 0 on; zeros beyond `length`."""
    for start in range(0, length, PARTITION):
        position = torch.arange(start, min(start + PARTITION, length), device=pages.device)
        page, offset = pages[position // layer.page_size].long(), position % layer.page_size
        yield (
            decoded(layer.key_codes, layer.key_scale, page, offset),
            decoded(layer.value_codes, layer.value_scale, page, offset),
        )


def decoded(codes: Tensor, scale: Tensor | None, page: Tensor, offset: Tensor) -> Tensor:
    """`code * scale` in FP32 of some positions, filled up with zeros to `[KV, PARTITION, D]`."""
    raw = codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes  # FP8 has no gather of its own
    real = raw[page, :, offset].view(codes.dtype).float()
    if scale is not None:
        real = real * (scale if scale.dim() == 1 else scale[page, :, offset]).unsqueeze(-1)
    full = real.new_zeros(codes.shape[1], PARTITION, codes.shape[3])
    full[:, : len(page)] = real.transpose(0, 1)
    return full


def attend_sequence(q: Tensor, parts: list[tuple[Tensor, Tensor]], positions: Tensor, scale: float) -> Tensor:
    """`[T, H * D]` in FP32 of the rows q [T, H, D] of one sequence, at consecutive positions."""
    tokens, heads, width = q.shape
    before = int(positions[0]) % BLOCK
    blocks = -(-(before + tokens) // BLOCK)
    full = torch.zeros(blocks * BLOCK, heads, width, device=q.device)
    full[before : before + tokens] = q
    first = int(positions[0]) - before
    out = [attend_block(rows, parts, first + i * BLOCK, scale) for i, rows in enumerate(full.split(BLOCK))]
    return torch.cat(out)[before : before + tokens]


def attend_block(q: Tensor, parts: list[tuple[Tensor, Tensor]], first: int, scale: float) -> Tensor:
    """`[BLOCK, H * D]` of the rows q [BLOCK, H, D] from position `first` on: the queries of one key head lie one below
    the other."""
    keys, width = parts[0][0].shape[0], q.shape[2]
    grouped = q.view(BLOCK, keys, -1, width).permute(1, 2, 0, 3).reshape(keys, -1, width)
    last = torch.arange(first, first + BLOCK, device=q.device).repeat(grouped.shape[1] // BLOCK).view(1, -1, 1)
    state: State | None = None
    for i, part in enumerate(parts[: (first + BLOCK - 1) // PARTITION + 1]):
        state = combined(state, *part, grouped, last - i * PARTITION, scale)
    assert state is not None
    out = (state[2] / state[1]).view(keys, -1, BLOCK, width).permute(2, 0, 1, 3)
    return out.reshape(BLOCK, -1)


def combined(state: State | None, keys: Tensor, values: Tensor, q: Tensor, last: Tensor, scale: float) -> State:
    """The state after one more partition, whose keys up to `last` [1, rows, 1] are visible; below 0: none is."""
    seen = torch.arange(PARTITION, device=q.device) <= last
    scores = (torch.bmm(q, keys.mT) * scale).masked_fill(~seen, float("-inf"))
    most = scores.amax(-1, keepdim=True)
    top = most if state is None else torch.maximum(state[0], most)
    weights = (scores - top).exp()
    total, product = weights.sum(-1, keepdim=True), torch.bmm(weights, values)
    if state is None:
        return top, total, product
    again = (state[0] - top).exp()
    new = top, state[1] * again + total, state[2] * again + product
    visible = last >= 0
    return tuple(torch.where(visible, n, old) for n, old in zip(new, state, strict=True))  # type: ignore[return-value]
