"""Attention of chunks of prompts on a GPU: a batch in runs of one kind, and cuDNN's kernel for the long ones.

**Runs.** A step may hold rows that decode, short chunks and long ones. Consecutive sequences of one kind go together,
each kind where it is fastest: single rows and short chunks through the door again (one launch a run), a long chunk
alone to cuDNN, whose kernel is the only one at hand that keeps Hopper's tensor cores busy (three times `attend_rows`).
What is long is a count of (row, key) pairs. The host knows positions and lengths when it plans a step
(`Rows.chunks`), so that nothing waits for the device.

**A long chunk.** cuDNN reads contiguous BF16, so the keys of a call are gathered from their pages first, `code * scale`
rounded once to BF16: 6 KB a token of 8 heads of 128, which is less than the call reads anyway. Its mask is causal
from the first row and key, so the keys fall in two:

    positions   0 ........................... first ........ start ........ end
    keys        | past: all rows see all of it | causal: row p sees keys first .. p |
    rows                                       | nobody's     | the chunk's          |

`first` is `start` rounded down to a multiple of `BLOCK`. The rows between are nobody's (whatever lies before the chunk
in q): what they get is dropped. So the past has a length of which few kinds exist, and so has each call,

    causal     [first, end) filled up to a multiple of STEP     rows, and as many keys; those after `end` are zeros, and
                                                                seen by rows that are nobody's
    past       BLOCK, 2 BLOCK, 4 BLOCK, ... up to LARGEST keys  for the chunk's rows, filled up to a multiple of STEP

because cuDNN plans for each shape that it has not met, which takes the host 60 ms, once: 116 shapes at most for chunks
of up to 8192 tokens, however long a prompt is. The keys of one call are gathered at a time, so memory does not grow
with the prompt, but for the results of its calls.

**Joining.** Call i gives o_i, rounded to BF16, and the logarithm l_i of its sum of exponentials:

    out = sum of exp(l_i - top) o_i / sum of exp(l_i - top)           FP32, rounded once

**Bound.** With A the weighted sum of |v| over all keys: cuDNN rounds the weights to BF16 (2^-8 of themselves), each o_i
is rounded to BF16, and so is the result, so

    |out - exact| <= 2^-8 |out| + 2^-7 A

A power of two times a code is exact in BF16, and a BF16 cache is what it is. Static scales round k and v: 2^-8 of v
adds 2^-8 A, and a score moves by at most 2^-8 S, where S is the largest scale * sum of |q||k|, which adds 2^-7 S A.

On a CPU the same plan runs over plain torch, for the tests: `gathered`, `fused` and `joined` here are definitions.

Left out: cuDNN reads pages itself (BF16 ones only, and not through torch); ragged batches, where torch plans anew at
each call. Two parts and their join: Dao, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...backends import function, why_not_triton
from .pages import LayerPages
from .reference import decoded
from .rows import Chunk, Rows

STEP = 512  # rows of a call are a multiple of it
BLOCK = 2048  # so is where the causal part begins
LARGEST = 1 << 16  # keys of one call over the past
LEAST_ROWS, LEAST_PAIRS = 256, 1 << 20  # of a chunk for which three launches pay

Part = tuple[Tensor, Tensor]  # BF16 [T, H, D], FP32 [H, T]: what a call gives to the rows of a chunk
KERNELS = "fp8.attention.paged.triton_chunks"


@dataclass(frozen=True)
class Call:
    """Attention of the rows at positions first_row .. first_row + rows - 1 over keys first_key .. + keys - 1."""

    first_row: int
    rows: int
    first_key: int
    keys: int
    causal: bool


@dataclass(frozen=True)
class Run:
    """Consecutive sequences of a batch, as a batch (`Rows`)."""

    positions: Tensor
    starts: Tensor
    lengths: Tensor
    pages: Tensor
    decode: bool
    chunks: None = None


# --------------------------------------------------------------------------- what goes where


def why_not(q: Tensor, layer: LayerPages, batch: Rows) -> str | None:
    """Why a batch is not taken apart; None when it is."""
    if (reason := why_not_triton(q.device)) is not None:
        return reason
    if batch.decode or batch.chunks is None:
        return "it takes chunks of prompts that the host knows"
    kinds = {kind(chunk, q, layer) for chunk in batch.chunks}
    return "all chunks are short" if kinds == {"short"} else None


def kind(chunk: Chunk, q: Tensor, layer: LayerPages) -> str:
    """What a sequence of a batch is: "single", "short" or "long"."""
    if chunk.rows == 1:
        return "single"
    many = chunk.rows >= LEAST_ROWS and chunk.rows * (chunk.start + chunk.rows / 2) >= LEAST_PAIRS
    able = many and why_not_cudnn(q.device, q.shape[1], layer.num_kv_heads, layer.head_dim) is None
    return "long" if able else "short"


@cache
def why_not_cudnn(device: torch.device, heads: int, kv: int, width: int) -> str | None:
    """Why cuDNN does not take such heads; None when it does. On a CPU there is a definition in its place."""
    if device.type == "cpu":
        return None
    q, k = (torch.empty(1, h, 2, width, dtype=torch.bfloat16, device=device) for h in (heads, kv))
    asked = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, heads != kv)
    able = torch.backends.cudnn.is_available() and torch.backends.cuda.can_use_cudnn_attention(asked)
    return None if able else f"cuDNN has no attention for {heads} and {kv} heads of {width}"


def calls_of(chunk: Chunk) -> list[Call]:
    """The calls that a long chunk is made of, the causal one first."""
    first = chunk.start // BLOCK * BLOCK
    square = _filled(chunk.start + chunk.rows - first)
    calls, at = [Call(first, square, first, square, True)], 0
    while at < first:
        keys = min(LARGEST, BLOCK << ((first - at) // BLOCK).bit_length() - 1)
        calls.append(Call(chunk.start, _filled(chunk.rows), at, keys, False))
        at += keys
    return calls


def _filled(rows: int) -> int:
    return -(-rows // STEP) * STEP


# --------------------------------------------------------------------------- the whole


def attend(q: Tensor, layer: LayerPages, batch: Rows, scale: float) -> Tensor:
    """`reference.attend` of a batch with chunks, within the bound above."""
    assert batch.chunks is not None
    out = q.new_empty(len(q), q.shape[1] * q.shape[2])
    join = function(KERNELS, "joined") if q.device.type == "cuda" else joined
    row = sequence = 0
    for what, chunks in runs(batch.chunks, q, layer):
        rows, those = sum(c.rows for c in chunks), slice(sequence, sequence + len(chunks))
        mine = slice(row, row + rows)
        if what == "long":
            parts = parts_of(q, row, layer, batch.pages[sequence], chunks[0], scale)
            if len(parts) == len(batch.chunks) == 1:
                return parts[0][0].flatten(1)
            join(parts, out[mine])
        else:
            starts = batch.starts[those.start : those.stop + 1] - row
            run = Run(batch.positions[mine], starts, batch.lengths[those], batch.pages[those], what == "single")
            out[mine] = function("fp8.attention.paged", "attend")(q[mine], layer, run, scale)
        row, sequence = mine.stop, those.stop
    return out


def runs(chunks: tuple[Chunk, ...], q: Tensor, layer: LayerPages) -> Iterator[tuple[str, list[Chunk]]]:
    """Consecutive chunks of one kind; a long one alone."""
    for what, group in groupby(chunks, lambda chunk: kind(chunk, q, layer)):
        held = list(group)
        yield from ([(what, [chunk]) for chunk in held] if what == "long" else [(what, held)])


def parts_of(q: Tensor, row: int, layer: LayerPages, pages: Tensor, chunk: Chunk, scale: float) -> list[Part]:
    """What each call gives to a long chunk, whose first row in q [T, H, D] is `row`."""
    on_gpu = q.device.type == "cuda"
    gather, call_of = (function(KERNELS, "gathered"), cudnn) if on_gpu else (gathered, fused)
    parts = []
    for call in calls_of(chunk):
        before = chunk.start - call.first_row
        keys, values = gather(layer, pages, call.first_key, call.keys, chunk.start + chunk.rows)
        given, lse = call_of(framed(q, row - before, call.rows), keys, values, call.causal, scale)
        parts.append((given[before : before + chunk.rows], lse[:, before : before + chunk.rows]))
    return parts


def framed(q: Tensor, start: int, rows: int) -> Tensor:
    """`rows` rows of q from row `start` on; where it has none, anything."""
    if start >= 0 and start + rows <= len(q):
        return q[start : start + rows]
    low, high = max(start, 0), min(start + rows, len(q))
    full = q.new_empty(rows, *q.shape[1:])
    full[low - start : high - start] = q[low:high]
    return full


def cudnn(q: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> Part:
    """`fused` by cuDNN. Layouts stay: a token's heads lie side by side."""
    heads = [x.transpose(0, 1)[None] for x in (q, keys, values)]
    given, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads, None, True, 0.0, causal, False, scale=scale
    )
    return given[0].transpose(0, 1), lse.view(q.shape[1], -1)


# --------------------------------------------------------------------------- definitions


def gathered(layer: LayerPages, pages: Tensor, first: int, count: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values, BF16 [count, KV, D] each, of the positions from `first` on; zeros from `stop` on.

    pages   int32 [most pages]: those of the sequence
    """
    keys, values = decoded(layer, pages, first, min(first + count, stop))
    more = (0, 0, 0, 0, 0, count - len(keys))
    return pad(keys.bfloat16(), more), pad(values.bfloat16(), more)


def fused(q: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> Part:
    """Attention of q [R, H, D] over keys and values [K, KV, D], BF16; the logarithm of each sum of exponentials too.

    causal   row i sees keys 0 .. i
    """
    spread = q.shape[1] // keys.shape[1]
    k, v = (x.float().repeat_interleave(spread, 1).transpose(0, 1) for x in (keys, values))
    scores = torch.bmm(q.float().transpose(0, 1), k.mT) * scale
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1).to(q.dtype), scores.logsumexp(-1)


def joined(parts: list[Part], out: Tensor) -> None:
    """What the parts make together, to out [T, H * D]."""
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    total = sum(w.t()[..., None] * given.float() for w, (given, _) in zip(weights, parts, strict=True))
    assert isinstance(total, Tensor)
    out.copy_(total.flatten(1))
