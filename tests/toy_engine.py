"""A model whose logits are a hash of the history that it reads back from its pages, and a cache that watches who
writes.

Wrong pages, slots, positions or lengths change the hash, so they show in the next token; and every position of the
history says which it is, so they show at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp8.serve import Batch, Engine, EngineOptions, Output, Request, SamplingParams

VOCABULARY = 40
POSITIONS = 200


def hashed(history: list[int]) -> np.ndarray:
    """Logits [V] after some tokens."""
    return np.random.default_rng([len(history), *history]).standard_normal(VOCABULARY).astype(np.float32) * 2


@dataclass
class ToyCache:
    """Token and position of every slot."""

    tokens: Tensor
    positions: Tensor
    page_size: int
    saturated: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes


class Toy:
    """The door of a `ServedModel`. `broken`: histories that end in this token have NaN logits."""

    def __init__(self, broken: int | None = None) -> None:
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_positions=POSITIONS)
        self.embedding = torch.zeros(1)
        self.broken = broken
        self.rows: list[int] = []  # of each call

    def new_cache(self, pages: int, page_size: int = 64, dtype: str = "fp8") -> ToyCache:
        slots = torch.full((pages * page_size,), -1)
        return ToyCache(slots, slots.clone(), page_size)

    def __call__(self, batch: Batch, cache: ToyCache) -> Tensor:
        self.check(batch, cache)
        self.rows.append(len(batch.tokens))
        kept = batch.slots >= 0
        assert len(batch.slots[kept].unique()) == kept.sum(), "two tokens in one slot"
        cache.tokens[batch.slots[kept]] = batch.tokens[kept]
        cache.positions[batch.slots[kept]] = batch.positions[kept].long()
        sequence = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.starts.diff().long())
        rows = [self.logits(batch, cache, row, int(sequence[row])) for row in batch.wanted.tolist()]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, VOCABULARY)

    def logits(self, batch: Batch, cache: ToyCache, row: int, sequence: int) -> np.ndarray:
        if not batch.lengths[sequence]:
            return np.zeros(VOCABULARY, dtype=np.float32)
        history = torch.arange(int(batch.positions[row]) + 1)
        slots = batch.pages[sequence][history // cache.page_size].long() * cache.page_size + history % cache.page_size
        assert torch.equal(cache.positions[slots], history), "a page of another place"
        tokens = cache.tokens[slots].tolist()
        return np.full(VOCABULARY, np.nan, np.float32) if tokens[-1] == self.broken else hashed(tokens)

    def check(self, batch: Batch, cache: ToyCache) -> None:
        assert batch.tokens.dtype == batch.slots.dtype == batch.wanted.dtype == torch.int64
        assert batch.positions.dtype == batch.starts.dtype == batch.lengths.dtype == batch.pages.dtype == torch.int32
        assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.tokens)
        assert not batch.decode or bool((batch.starts.diff() == 1).all())
        for s, length in enumerate(batch.lengths.tolist()):
            first, end = batch.starts[s : s + 2].tolist()
            assert not length or batch.positions[first:end].tolist() == list(range(length - end + first, length))
            assert batch.chunks is None or batch.chunks[s] == (length - end + first, end - first)
        assert batch.chunks is None or len(batch.chunks) == len(batch.lengths)


class Letters:
    """A tokenizer of one letter a token; token 39 ends an answer."""

    ends = frozenset({39})

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 65 for letter in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(65 + token) for token in tokens if token != 39 or not skip_special_tokens)


def engine(model: Any = None, tokenizer: Any = None, **options: Any) -> Engine:
    given = {"page_size": 4, "pages": 100, "max_running": 8, "max_step_tokens": 64}
    return Engine(model or Toy(), tokenizer, EngineOptions(**{**given, **options}))


def finish(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left; the outputs of each request."""
    outputs: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    return outputs


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.new_tokens]


def answer(prompt: list[int], params: SamplingParams, **options: Any) -> list[Output]:
    """What one request gets alone."""
    alone = engine(**options)
    alone.add(Request("alone", prompt, params))
    return finish(alone)["alone"]


def watch(engine: Engine) -> None:
    """Check from now on, before every step: who holds a page is counted, and no held position is written twice."""
    pool, model = engine.scheduler.pool, engine.model
    taken, written, take, check = [0] * pool.total, set(), pool.take, model.check

    def watched_take() -> int:
        page = take()
        taken[page] += 1
        return page

    def watched_check(batch: Batch, cache: Any) -> None:
        check(batch, cache)
        held = [page for sequence in engine.scheduler.running for page in sequence.pages]
        assert [held.count(page) for page in range(pool.total)] == pool.references
        assert pool.free == pool.references.count(0)
        for slot in batch.slots[batch.slots >= 0].tolist():
            once = slot, taken[slot // cache.page_size]
            assert once not in written, "a position was written twice"
            written.add(once)

    pool.take, model.check = watched_take, watched_check


def all_free(engine: Engine) -> bool:
    pool, scheduler = engine.scheduler.pool, engine.scheduler
    return pool.free == pool.total and not any(pool.references) and not scheduler.running and not scheduler.waiting
