"""From a plan to tensors on the device, in one copy.

A step's inputs are some dozen small arrays. They are laid one behind the other into one buffer, sent at once, and
looked at there as what they are. On a GPU the buffer is pinned: a copy from ordinary memory would wait until
everything launched before has run, and the host could never be a step ahead.

A token that the host does not know yet is not sent but fetched, on the device, from the seat where the step before
will have put it: `pending` is that seat, or -1.

`gather` fills up to `rows` rows, with sequences of no keys, tokens that are stored nowhere and logits that nobody
reads: for a CUDA graph, which has one shape (one row a sequence), and for products whose shape shall not depend on the
company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.paged import Chunk
from .batch import Batch
from .scheduler import Work

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[int, torch.dtype, tuple[int, ...]]]  # first byte, type, shape
ALIGNMENT = 16


def gather(work: Sequence[Work], page_size: int, *, rows: int = 0, width: int = 0) -> Arrays:
    """The fields of a `Batch`, and `pending`; at least `rows` rows, and `width` pages a sequence.

    Rows whose logits are wanted come in this order: those that are sampled, then those of prompts.
    """
    starts = np.cumsum([0, *(w.new for w in work)], dtype=np.int32)
    positions = np.concatenate([np.arange(w.start, w.start + w.new, dtype=np.int32) for w in work])
    pages = _table([w.sequence.pages for w in work], width)
    page = np.repeat(np.arange(len(work)), [w.new for w in work])
    slots = pages[page, positions // page_size].astype(np.int64) * page_size + positions % page_size
    known = [w.sequence.tokens[w.start : w.start + w.new] for w in work]
    tokens = np.concatenate([np.array([*t, 0][: w.new], dtype=np.int64) for t, w in zip(known, work, strict=True)])
    pending = np.full(len(tokens), -1, dtype=np.int64)
    for w, end in zip(work, starts[1:], strict=True):
        if w.start + w.new > len(w.sequence.tokens):
            assert w.sequence.seat is not None
            pending[end - 1] = w.sequence.seat
    sampled = [end - 1 for w, end in zip(work, starts[1:], strict=True) if w.sampled]
    told = [start + p - w.start for w, start in zip(work, starts, strict=False) for p in w.told]
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "starts": starts,
        "lengths": np.array([w.start + w.new for w in work], dtype=np.int32),
        "pages": pages,
        "wanted": np.array([*sampled, *told], dtype=np.int64),
        "pending": pending,
    }
    return filled(arrays, rows) if rows else arrays


def filled(arrays: Arrays, rows: int) -> Arrays:
    """The same with `rows` rows. Each row more is a sequence of its own where every sequence has one; else they are one
    sequence."""
    have, sequences = len(arrays["tokens"]), len(arrays["lengths"])
    more = rows - have
    new = more if sequences == have else min(more, 1)
    ends = have + np.arange(1, new + 1, dtype=np.int32) if new == more else np.array([rows] * new, dtype=np.int32)
    wanted = arrays["wanted"]
    nothing = {"tokens": 0, "positions": 0, "slots": -1, "pending": -1}
    out = {name: _lengthened(arrays[name], rows, value) for name, value in nothing.items()}
    return out | {
        "starts": np.concatenate([arrays["starts"], ends]).astype(np.int32),
        "lengths": _lengthened(arrays["lengths"], sequences + new, 0),
        "pages": _lengthened(arrays["pages"], sequences + new, 0),
        "wanted": _lengthened(wanted, rows, rows - 1),
    }


def empty(rows: int, width: int) -> Arrays:
    """A batch of `rows` rows that reads and stores nothing: for warming up and capturing."""
    nothing = np.zeros(0, dtype=np.int64)
    start = dict.fromkeys(("tokens", "slots", "wanted", "pending"), nothing)
    small = nothing.astype(np.int32)
    return filled(
        start
        | {"positions": small, "lengths": small, "starts": np.zeros(1, np.int32), "pages": small.reshape(0, width)},
        rows,
    ) | {"wanted": np.arange(rows)}


def batch_of(
    sent: Mapping[str, Tensor], last: Tensor, *, one_kernel: bool = False, chunks: tuple[Chunk, ...] | None = None
) -> Batch:
    """The batch behind what was sent; `last` int64 [seats] has the newest token of each running sequence.

    one_kernel   never call it a decode batch: on a GPU, attention adds in another order for those
    chunks       as in `Batch`
    """
    pending = sent["pending"]
    tokens = torch.where(pending >= 0, last[pending.clamp(min=0)], sent["tokens"])
    fields: dict[str, Any] = {n: sent[n] for n in ("positions", "slots", "starts", "lengths", "pages", "wanted")}
    decode = not one_kernel and len(sent["lengths"]) == len(tokens)
    return Batch(tokens=tokens, decode=decode, chunks=chunks, **fields)


def pack(arrays: Arrays, pin: bool) -> tuple[Tensor, Layout]:
    """All arrays in one buffer on the host, and where in it each one is."""
    layout, size = {}, 0
    for name, array in arrays.items():
        layout[name] = (size, torch.from_numpy(array[:0]).dtype, array.shape)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for name, view in unpack(buffer, layout).items():
        view.copy_(torch.from_numpy(arrays[name]))
    return buffer, layout


def unpack(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The arrays in a buffer, wherever it is."""
    sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (_, dtype, shape) in layout.items()}
    return {n: buffer[at : at + sizes[n]].view(dtype).view(shape) for n, (at, dtype, shape) in layout.items()}


def send(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays on the device, without waiting for it."""
    buffer, layout = pack(arrays, device.type == "cuda")
    return unpack(buffer.to(device, non_blocking=True), layout)


def fetch(tensor: Tensor) -> Tensor:
    """A copy on the host that is complete once an event recorded after this has passed."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _table(lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
    table = np.zeros((len(lists), max(width, *(len(pages) for pages in lists), 1)), dtype=np.int32)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    return table


def _lengthened(array: np.ndarray, length: int, value: int) -> np.ndarray:
    more = np.full((length - len(array), *array.shape[1:]), value, dtype=array.dtype)
    return np.concatenate([array, more])
