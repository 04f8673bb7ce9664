"""Who computes what in the next step: continuous batching, chunked prompts, preemption, shared beginnings.

**One rule.** Every sequence has some tokens to do (`sequence.py`); a step has room for `max_step_tokens`. Room is given

    1. to running sequences with one token to do: each of them gives a token to somebody who waits for it
    2. to running sequences in the middle of their prompt: as much as still fits, a chunk
    3. to waiting sequences, in the order of arrival, while there are seats and pages

**Pages run out** when running sequences grow. Then the youngest of those that have no place in this step yet gives all
its pages back and waits again, at the head of the queue; it may be the one that asked. Later everything that it had is
computed anew, in chunks ("recomputation"): the same tokens, hence the same bits, and its own pages are often still
in the cache. The oldest is never preempted for a younger one, so that it ends, and then the next: nobody waits for
ever. A sequence is admitted only when its whole length fits, so nobody is in a step that preempted: what a preempted
one gave back, less what it was for, is less than it needs.

**Shared beginnings.** A page is named (`pages.py`) as soon as the step that fills it is planned and its tokens are
known. Within a step each layer writes all keys and values before any are read, and steps run in order, so a sequence
planned later, even in the same step, may read what was planned before: several texts of one prompt that arrive together
compute it once. At least one token is always computed, for without a row there are no logits. A request that wants
log-probabilities of its prompt needs all its rows and shares nothing until it has them.

**Ahead of the host.** A plan is made before the tokens of the step before are known. Whether a sequence met its end in
that step is then unknown too: it gets one more row, which is dropped (`engine.py`). Its pages may be given away at once
all the same, because the device works in the order of launches.

Continuous batching: Yu et al., "Orca", OSDI 2022. Pages, recomputation: Kwon et al., "PagedAttention", SOSP 2023.
Chunked prompts beside decoding: Agrawal et al., "Sarathi-Serve", OSDI 2024.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from .pages import PagePool
from .sequence import Sequence

MOST_TOLD = 256  # rows of a prompt that give logits in one step: FP32 rows as wide as the vocabulary


@dataclass(frozen=True)
class Work:
    """Tokens `start .. start + new - 1` of a sequence, to be computed in this step.

    told     the positions of the prompt whose next tokens' log-probabilities are wanted
    sampled  whether the last row gives a token
    fresh    whether the sequence was admitted just now
    """

    sequence: Sequence
    start: int
    new: int
    told: range
    sampled: bool
    fresh: bool


class Scheduler:
    """Waiting and running sequences, and the pages that they hold."""

    def __init__(
        self, pool: PagePool, page_size: int, *, max_running: int, max_step_tokens: int, prefix_caching: bool = True
    ) -> None:
        self.pool, self.page_size = pool, page_size
        self.max_step_tokens, self.prefix_caching = max_step_tokens, prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.preemptions = self.hits = 0
        self._left = 0  # tokens that the step being planned has still room for
        self._seats = list(range(max_running))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> list[Work]:
        """The next step's work, at most `max_step_tokens` in all, the longest chunk last; the sequences count as
        computed so far."""
        work: list[Work] = []
        self._left = self.max_step_tokens
        for sequence in sorted(self.running, key=lambda s: s.to_do > 1):  # stable: the oldest first in both halves
            new = self._room(sequence)
            if sequence.seat is not None and new > 0 and self._grow(sequence, new, work):
                work.append(self._advance(sequence, new))
        self._admit(work)
        return sorted(work, key=lambda w: w.new)  # attention takes neighbours of one kind together

    def undo(self, work: list[Work]) -> None:
        """Take back a plan that was not carried out: its sequences wait again, and none of the pages it was to write is
        found."""
        for w in sorted(work, key=lambda w: w.sequence.order, reverse=True):
            for page in w.sequence.pages[w.start // self.page_size :]:
                self.pool.forget(page)
            w.sequence.pending -= w.sampled
            w.sequence.told -= len(w.told)
            self._preempt(w.sequence)

    def remove(self, sequence: Sequence) -> None:
        """Free everything that a finished sequence holds, wherever it is."""
        if sequence.seat is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find its pages that are full and whose tokens are known."""
        full = min(sequence.computed, len(sequence.tokens)) // self.page_size
        if self.prefix_caching and sequence.seat is not None and full > sequence.published:
            for i in range(sequence.published, full):
                self.pool.name(sequence.pages[i], sequence.name(i, self.page_size))
            sequence.published = full

    def conceal(self, sequence: Sequence) -> None:
        """Let nobody find its pages, unless somebody shares them: what they hold is not to be trusted."""
        for page in self.pool.find(sequence.names):
            if self.pool.references[page] <= 1:
                self.pool.forget(page)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # ------------------------------------------------------------------ steps of a plan

    def _room(self, sequence: Sequence) -> int:
        """How many tokens of a sequence may enter this step."""
        return min(sequence.to_do, self._left, MOST_TOLD if sequence.to_tell else self._left)

    def _grow(self, sequence: Sequence, new: int, work: list[Work]) -> bool:
        """Give a running sequence pages for its new tokens, at the cost of younger ones; False: it was preempted."""
        need = self.pages_for(sequence.computed + new) - len(sequence.pages)
        while self.pool.free < need:
            planned = {w.sequence for w in work}
            youngest = next(s for s in reversed(self.running) if s not in planned)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += [self.pool.take() for _ in range(need)]
        return True

    def _advance(self, sequence: Sequence, new: int, fresh: bool = False) -> Work:
        start, end = sequence.computed, sequence.computed + new
        told = range(max(start, sequence.told), min(end, sequence.prompt_length - 1)) if sequence.to_tell else range(0)
        sequence.told += len(told)
        sampled = end == sequence.length
        sequence.computed = end
        self._left -= new
        sequence.pending += sampled
        self.publish(sequence)
        return Work(sequence, start, new, told, sampled, fresh)

    def _admit(self, work: list[Work]) -> None:
        while self.waiting and self._seats and self._left:
            sequence = self.waiting[0]
            shared = self._shared(sequence)
            need = self.pages_for(sequence.length) - len(shared)
            if need > self.pool.free - sum(self.pool.references[page] == 0 for page in shared):
                return
            self._enter(self.waiting.popleft(), shared)
            new = self._room(sequence)
            grown = self._grow(sequence, new, work)
            assert grown, "the whole length fits"
            work.append(self._advance(sequence, new, fresh=True))

    def _shared(self, sequence: Sequence) -> list[int]:
        """The pages of its beginning that are in the cache, leaving at least one token to compute."""
        if sequence.to_tell:
            return []
        full = (sequence.length - 1) // self.page_size
        return self.pool.find(sequence.name(i, self.page_size) for i in range(full))

    def _enter(self, sequence: Sequence, shared: list[int]) -> None:
        for page in shared:
            self.pool.share(page)
        sequence.pages, sequence.published = list(shared), len(shared)
        sequence.computed = len(shared) * self.page_size
        sequence.seat = self._seats.pop()
        if sequence.cached is None:
            sequence.cached = sequence.computed
            self.hits += sequence.computed
        insort(self.running, sequence, key=lambda s: s.order)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.seat is not None
        self.pool.release(sequence.pages)
        self._seats.append(sequence.seat)
        self.running.remove(sequence)
        sequence.pages, sequence.computed, sequence.published, sequence.seat = [], 0, 0, None

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
