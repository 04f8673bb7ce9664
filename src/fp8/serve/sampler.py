"""From logits to tokens, on the device, all rows at once; a row's token does not depend on the other rows.

In this order, each row with its own parameters:

    1. bias          added; tokens that may not come yet (ends, before `min_tokens`) get -inf
    2. penalties     repetition: x / r, or x * r below 0, for tokens of prompt or answer; then
                     x - frequency * count - presence * [count > 0], counted in the answer
    3. temperature 0: the largest logit, the lowest number among equals. Otherwise
       weights       w = floor(2^32 exp((x - max) / temperature))
       min_p         keeps exp(...) >= min_p; then top_k keeps the k largest; then top_p those before which less than
                     top_p of the weight so far kept lies
       draw          the first token, in the order of their numbers, whose cumulative weight exceeds u * (all weight)

**Weights are whole numbers.** The order of a floating-point sum is the library's choice, and on a GPU it changes with
the number of rows; sums of integers have no order. With V <= 2^18 tokens they stay below 2^50, which float64 holds
exactly, so that u * (all weight) is rounded once. A token less likely than the likeliest by 2^32 is never drawn.

**Random numbers** are made on the host from the request's seed and the token's position alone: a counter-based
generator has no state that a preemption, a batch or another request could move.

**Log-probabilities** are of the model's distribution: log-softmax of the logits as they came.

A row with a NaN, or with no finite largest logit, has no token: it is told as -1, so that its request alone ends.
What is kept on the device: the last token of each seat, which the next step begins with before the host has read it,
and, from the first request with penalties on, how often each seat's answer has each token.

Order and meaning are vLLM's (v1), so that the same words give the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .inputs import Arrays, fetch, send
from .params import SamplingParams
from .sequence import Sequence

BITS = 32  # of a weight
MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 bits, the same for the same seed and position: two rounds of SplitMix64's mixing
    (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).

    >>> uniform(1, 2) == uniform(1, 2) != uniform(1, 3)
    True
    """
    return (_mixed(_mixed(seed & MASK) + position & MASK) >> 11) * 2.0**-53


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


@dataclass(frozen=True)
class Row:
    """What one row of logits is sampled with. `banned`: tokens that may not come."""

    params: SamplingParams
    seat: int
    u: float
    banned: tuple[int, ...] = ()


class Told(NamedTuple):
    """Log-probabilities of R rows: `chosen` [R] of the token, its `rank` [R]; `top` [R, n] of the likeliest, `ids`."""

    chosen: Tensor
    rank: Tensor
    top: Tensor
    ids: Tensor

    def fetched(self) -> Told:
        return Told(*(fetch(tensor) for tensor in self))


class Sampler:
    """Owns `last`, int64 [seats], and the counts of seats with penalties."""

    def __init__(self, seats: int, vocab_size: int, device: torch.device) -> None:
        self.last = torch.zeros(seats, dtype=torch.int64, device=device)
        self.vocab_size, self.device = vocab_size, device
        self._counts: Tensor | None = None  # int32 [seats, V]
        self._prompt: Tensor | None = None  # bool [seats, V]

    def seat(self, sequence: Sequence) -> None:
        """Prepare the seat of a sequence that was admitted: its counts start from the tokens known so far."""
        if not sequence.request.params.penalized:
            return
        if self._counts is None or self._prompt is None:
            self._counts = torch.zeros(len(self.last), self.vocab_size, dtype=torch.int32, device=self.device)
            self._prompt = torch.zeros_like(self._counts, dtype=torch.bool)
        prompt, answer = np.split(np.array(sequence.tokens), [sequence.prompt_length])
        counts = np.bincount(answer.astype(np.int64), minlength=self.vocab_size).astype(np.int32)
        sent = send({"prompt": prompt, "counts": counts}, self.device)
        self._counts[sequence.seat] = sent["counts"]
        self._prompt[sequence.seat] = torch.zeros_like(self._prompt[0]).index_fill_(0, sent["prompt"], True)

    def __call__(self, logits: Tensor, rows: Rows[Row]) -> Tensor:
        """A token for each row of logits [R, V], int64 [R], which becomes its seat's last; -1: the row has none."""
        sent = send(arrays_of(rows, self.vocab_size), self.device)
        if any(row.params.logit_bias or row.banned for row in rows):
            logits = logits.index_put((sent["bias_row"], sent["bias_token"]), sent["bias"], accumulate=True)
        if penalized := any(row.params.penalized for row in rows):
            logits = self._penalized(logits, sent)
        top, tokens = logits.max(-1, keepdim=True)
        tokens = tokens.squeeze(-1)
        if any(row.params.temperature > 0 for row in rows):
            keep = any(row.params.top_k > 0 or row.params.top_p < 1 for row in rows)
            tokens = torch.where(sent["temperature"] == 0, tokens, drawn(logits, top, sent, keep))
        self.last[sent["seat"]] = tokens
        if penalized:
            assert self._counts is not None
            self._counts[sent["seat"], tokens] += 1
        return torch.where(top.squeeze(-1).isfinite(), tokens, -1)

    def _penalized(self, logits: Tensor, sent: dict[str, Tensor]) -> Tensor:
        assert self._counts is not None and self._prompt is not None
        counts, prompt = self._counts[sent["seat"]], self._prompt[sent["seat"]]
        r = sent["repetition_penalty"].unsqueeze(1)
        lowered = torch.where(logits > 0, logits / r, logits * r)
        logits = torch.where(prompt | (counts > 0), lowered, logits)
        logits = logits - sent["frequency_penalty"].unsqueeze(1) * counts
        return logits - sent["presence_penalty"].unsqueeze(1) * (counts > 0)


def arrays_of(rows: Rows[Row], vocab_size: int) -> Arrays:
    """The parameters of the rows, an array each, and all changes of single logits; of rows that all take the largest
    logit as it is, their seats alone."""
    params, seats = [row.params for row in rows], {"seat": np.array([row.seat for row in rows])}
    if all(row.params.plain and not row.banned for row in rows):
        return seats
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    kept = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    changes = [dict(row.params.logit_bias or {}) | dict.fromkeys(row.banned, -np.inf) for row in rows]
    flat = [(i, token, value) for i, change in enumerate(changes) for token, value in change.items()]
    return (
        seats
        | {name: np.array([getattr(p, name) for p in params], dtype=np.float32) for name in floats}
        | {
            "u": np.array([row.u for row in rows]),
            "top_k": np.array(kept),
            "bias_row": np.array([i for i, _, _ in flat], dtype=np.int64),
            "bias_token": np.array([token for _, token, _ in flat], dtype=np.int64),
            "bias": np.array([value for _, _, value in flat], dtype=np.float32),
        }
    )


def drawn(logits: Tensor, top: Tensor, sent: dict[str, Tensor], keep: bool) -> Tensor:
    """A token drawn from each row, int64 [R]. `keep`: some row has a top_k or a top_p."""
    temperature = sent["temperature"].unsqueeze(1)
    scaled = (logits - top) / torch.where(temperature == 0, 1.0, temperature)
    likely = scaled.exp()
    weights = (likely * 2.0**BITS).nan_to_num(0).to(torch.int64)
    weights = torch.where(likely >= sent["min_p"].unsqueeze(1), weights, 0)
    if keep:
        weights = torch.where(nucleus(scaled, weights, sent["top_k"], sent["top_p"]), weights, 0)
    cumulative = weights.cumsum(-1)
    whole = cumulative[:, -1:]
    target = (sent["u"].unsqueeze(1) * whole.double()).to(torch.int64).clamp(max=whole - 1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def nucleus(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top_k and top_p keep, bool [R, V]; among equals the lower number comes first."""
    order = scaled.sort(dim=-1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    first = torch.arange(scaled.shape[1], device=scaled.device) < top_k.unsqueeze(1)
    ranked = torch.where(first, ranked, 0)
    cumulative = ranked.cumsum(-1)
    share = top_p.double().unsqueeze(1) * cumulative[:, -1:].double()
    kept = first & ((cumulative - ranked).double() < share)
    return torch.zeros_like(kept).scatter(1, order, kept)


def tell(logits: Tensor, tokens: Tensor, most: int) -> Told:
    """Log-probabilities of the tokens [R] under logits [R, V], and of the `most` likeliest."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1))
    top, ids = (part[:, :most] for part in logprobs.sort(dim=-1, descending=True, stable=True))
    return Told(chosen.squeeze(1), (logprobs > chosen).sum(-1) + 1, top, ids)
