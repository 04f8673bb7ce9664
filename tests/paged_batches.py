"""Sequences in pages, and the batches of their steps, as a scheduler would make them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import accumulate

import torch

from fp8.serve import Batch


@dataclass
class Sequence:
    """Tokens, the pages that hold their keys and values, and how many of them are stored."""

    tokens: list[int]
    pages: list[int]
    stored: int = 0
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


def batch_of(work: list[tuple[Sequence, int]], page_size: int = 16) -> Batch:
    """The next `n` tokens of each sequence; all their logits are wanted."""
    positions = [torch.arange(s.stored, s.stored + n) for s, n in work]
    pages = [torch.tensor(s.pages) for s, _ in work]
    slots = [p[at // page_size] * page_size + at % page_size for p, at in zip(pages, positions, strict=True)]
    tokens = [t for s, n in work for t in s.tokens[s.stored : s.stored + n]]
    return Batch(
        torch.tensor(tokens),
        torch.cat(positions).int(),
        torch.cat(slots),
        torch.tensor([0, *accumulate(n for _, n in work)], dtype=torch.int32),
        torch.tensor([s.stored + n for s, n in work], dtype=torch.int32),
        torch.nn.utils.rnn.pad_sequence([p.int() for p in pages], batch_first=True),
        torch.arange(len(tokens)),
        all(n == 1 for _, n in work),
    )


def on(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in held.items()})


def step(model, cache, work: list[tuple[Sequence, int]]) -> None:
    """Compute the next tokens of some sequences together, and keep the logits of each position, on the CPU."""
    batch = on(batch_of(work, cache.page_size), model.embedding.device)
    rows = iter(model(batch, cache).cpu())
    for s, n in work:
        s.logits |= {s.stored + i: next(rows) for i in range(n)}
        s.stored += n


def alone(model, tokens: list[int], dtype: str = "fp8", page_size: int = 16) -> torch.Tensor:
    """The logits `[T, V]` of a text in one piece, in a cache of its own."""
    pages = -(-len(tokens) // page_size)
    sequence = Sequence(tokens, list(range(pages)))
    step(model, model.new_cache(pages, page_size, dtype), [(sequence, len(tokens))])
    return torch.stack([sequence.logits[i] for i in range(len(tokens))])


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bytes: a zero and a minus zero differ, a NaN equals itself."""
    return x.contiguous().view(torch.uint8)
