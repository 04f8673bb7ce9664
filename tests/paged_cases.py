"""Paged caches and batches of every layout, and attention over them in FP64."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fp8.attention.paged import Chunk, PagedCache, reference
from fp8.fused.rope.reference import tables
from paged_batches import Sequence, batch_of

CACHES = ("fp8", "e5m2", "bf16", "static")


def made(kind: str, pages: int, page_size: int, kv: int, width: int, device: torch.device) -> PagedCache:
    scales = 2.0 ** torch.arange(-6, -6 + 2 * kv).view(1, 2, kv) * 1.3 if kind == "static" else None
    dtype = "fp8" if kind == "static" else kind
    return PagedCache(1, pages, page_size, kv, width, dtype=dtype, kv_scales=scales, device=device)


def a_batch(kind: str, case: tuple, device: torch.device):
    """A full cache, queries, and a batch of sequences whose pages lie in disorder; one more reads nothing."""
    lengths, heads, kv, width, page_size = case
    torch.manual_seed(1)
    needed = [-(-(stored + new) // page_size) for stored, new in lengths]
    numbers = torch.randperm(sum(needed) + 1).tolist()
    work = [(Sequence([0] * (a + b), [numbers.pop() for _ in range(n)], a), b)
            for (a, b), n in zip(lengths, needed, strict=True)]  # fmt: skip
    work.append((Sequence([0], [0]), 1))
    batch = batch_of(work, page_size)
    batch.lengths[-1] = 0
    cache = made(kind, sum(needed) + 1, page_size, kv, width, device)
    rows = cache.pages * page_size
    qkv = torch.randn(rows, 3 * kv * width) * torch.randn(rows, 1).exp2()
    rope = tables(rows, width, 1e4, torch.device("cpu"))
    cpu = made(kind, sum(needed) + 1, page_size, kv, width, torch.device("cpu"))
    at = torch.arange(rows)
    reference.rope_write(qkv.bfloat16(), at.int(), at, cpu.layers[0], rope)
    for ours, theirs in zip(vars(cache.layers[0]).values(), vars(cpu.layers[0]).values(), strict=True):
        if ours is not None:
            bits_of = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (ours, theirs))
            next(bits_of).copy_(next(bits_of))
    q = (2 * torch.randn(len(batch.tokens), heads, width)).bfloat16()
    return cache, cpu, q, batch


def exactly(layer, q: torch.Tensor, batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in FP64, and the same weighted sum of |v|: [T, H * D] each."""
    out, size = [], []
    for s in range(len(batch.lengths)):
        parts = list(reference.partitions(layer, batch.pages[s], int(batch.lengths[s])))
        for row in range(int(batch.starts[s]), int(batch.starts[s + 1])):
            if not parts:
                out.append(torch.zeros(q.shape[1] * q.shape[2], device=q.device).double())
                size.append(out[-1])
                continue
            keys, values = (torch.cat(t, 1)[:, : int(batch.positions[row]) + 1].double()
                            for t in zip(*parts, strict=True))  # fmt: skip
            heads = q[row].double().view(layer.num_kv_heads, -1, q.shape[2])
            weights = (heads @ keys.mT * scale).softmax(-1)
            out.append((weights @ values).flatten())
            size.append((weights @ values.abs()).flatten())
    return torch.stack(out), torch.stack(size)


def chunked(batch, counted: int):
    """The batch, which tells the host its chunks; the first `counted` sequences are read, and the others left out."""
    rows = int(batch.starts[counted])
    ends = batch.starts[: counted + 1].tolist()
    chunks = tuple(Chunk(int(batch.positions[a]), b - a) for a, b in itertools.pairwise(ends))
    kept = {name: getattr(batch, name)[:rows] for name in ("tokens", "positions", "slots", "wanted")}
    kept |= {"starts": batch.starts[: counted + 1], "lengths": batch.lengths[:counted], "pages": batch.pages[:counted]}
    return dataclasses.replace(batch, **kept, chunks=chunks, decode=False)
