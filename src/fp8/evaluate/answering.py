"""Asking a model a task's items, and what it answered, item by item.

**The seam.** A context and its continuation are tokenized together, and the continuation's tokens are those behind the
tokens of the context alone; blanks at the end of the context go to the continuation, and an empty context becomes the
end-of-text token (lm-eval's rules). So " B" after "Answer:" is the token that running text would have.

**Length.** What does not fit is cut on the left, behind the begin-of-text token: the model sees the last tokens.

**Sharing.** The continuations of an item that differ in their last token only (letters) are read off one row of logits.
Rows are filled up on the right with token 0, which no earlier position sees; a batch holds at most so many rows. Items
go through in order of length, longest first, so that a batch wastes little and memory is short at once or never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from .subject import Causal
from .tasks import Answer, Choice, Ending, Item, Pair, Task

Record = dict[str, Any]


class Request(NamedTuple):
    """Tokens to read, and those to score behind them."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The sum of log-probabilities of a continuation, and whether each token was the likeliest."""

    total: float
    greedy: bool


# --------------------------------------------------------------------------- likelihoods


def request(model: Causal, context: str, continuation: str, bos: int | None = None) -> Request:
    """Tokenize a context and its continuation. Raises `DataError` where there is nothing to read or to score."""
    bare = context.rstrip()
    begin = (bos,) if bos is not None else () if bare else tuple(model.ends[:1])
    whole = tuple(int(t) for t in model.words.encode(context + continuation))
    split = len(model.words.encode(bare))
    before, after = whole[:split], whole[split:]
    if not begin + before or not after:
        raise DataError(f"nothing to {'read first' if after else 'score'}: {context[-40:]!r} + {continuation!r}.")
    return Request(last(begin, before, model.max_positions + 1 - len(after)), after)


def last(begin: tuple[int, ...], tokens: tuple[int, ...], room: int) -> tuple[int, ...]:
    """A begin-of-text token, if there is one, and the last of the tokens, as many as there is room for."""
    if room < len(begin) + 1:
        raise DataError(f"there is room for {max(room, 0)} tokens before what is to be scored: the model is too short.")
    return begin + tokens[-(room - len(begin)) :]


def likelihoods(model: Causal, requests: Sequence[Request], rows: int = 8) -> list[Likelihood]:
    """One for each request, in order; at most so many rows are computed at a time."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(requests):
        shared.setdefault((one.context + one.continuation)[:-1], []).append(i)
    out: dict[int, Likelihood] = {}
    read = sorted(shared, key=len, reverse=True)
    for start in range(0, len(read), rows):
        group = read[start : start + rows]
        for row, logits in zip(group, model.logits(filled_up(group)), strict=True):
            for i in shared[row]:
                out[i] = likelihood(logits[: len(row)], requests[i].continuation)
    return [out[i] for i in range(len(requests))]


def filled_up(rows: Sequence[Sequence[int]]) -> Tensor:
    """Tokens `[rows, the longest]`, with zeros on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def likelihood(logits: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Of the last tokens of a row: logits `[T, V]`."""
    given = logits[-len(continuation) :].float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=given.device)
    total = given.gather(1, wanted[:, None]).double().sum()
    return Likelihood(float(total), bool((given.argmax(-1) == wanted).all()))


# --------------------------------------------------------------------------- items


def batches(task: Task, size: int) -> Iterator[list[Item]]:
    """The items in batches, longest first."""
    ordered = sorted(task.items, key=length, reverse=True)
    for start in range(0, len(ordered), size):
        yield list(ordered[start : start + size])


def length(item: Item) -> int:
    if isinstance(item, Pair):
        return len(item.first) + len(item.second)
    return len(item.prompt if isinstance(item, Answer) else item.context)


def answer(model: Any, task: Task, batch: Sequence[Item], bos: int | None = None) -> list[Record]:
    """What a model (`Causal`, or an `Encoder` for pairs) makes of a batch of items: a record each."""
    kind = type(batch[0])
    if kind is Pair:
        return pairs(model, batch)  # type: ignore[arg-type]
    if kind is Choice:
        return choices(model, batch, bos)  # type: ignore[arg-type]
    if kind is Ending:
        return endings(model, batch, bos)  # type: ignore[arg-type]
    return [generated(model, task, item, bos) for item in batch]  # type: ignore[arg-type]


def choices(model: Causal, batch: Sequence[Choice], bos: int | None) -> list[Record]:
    asked = [(item, request(model, item.context, choice, bos)) for item in batch for choice in item.choices]
    told = zip(asked, likelihoods(model, [one for _, one in asked], len(batch)), strict=True)
    out = []
    for item, group in groupby(told, key=lambda pair: pair[0][0]):
        totals = [found.total for _, found in group]
        sizes = [len(choice.removeprefix(" ")) if item.by_length else 1 for choice in item.choices]
        scores = [total / max(size, 1) for total, size in zip(totals, sizes, strict=True)]
        chosen = scores.index(max(scores))
        right = int(chosen == item.answer)
        out.append({"id": item.id, "correct": right, "chosen": chosen, "log_likelihoods": totals,
                    "chance": 1 / len(totals)})  # fmt: skip
    return out


def endings(model: Causal, batch: Sequence[Ending], bos: int | None) -> list[Record]:
    asked = [request(model, item.context, item.ending, bos) for item in batch]
    told = zip(batch, asked, likelihoods(model, asked, len(batch)), strict=True)
    return [
        {"id": item.id, "correct": int(found.greedy), "nll": 0.0 - found.total, "tokens": len(one.continuation)}
        for item, one, found in told
    ]


def generated(model: Causal, task: Task, item: Answer, bos: int | None) -> Record:
    text = until(model, item.prompt, item.stop, item.most, bos)
    told = task.found(text)
    return {"id": item.id, "correct": int(told == item.answer), "answer": told, "text": text}


def until(model: Causal, prompt: str, stop: Sequence[str], most: int, bos: int | None = None) -> str:
    """The likeliest text behind a prompt, up to the first of the strings in `stop`."""
    begin = () if bos is None else (bos,)
    tokens = last(begin, tuple(int(t) for t in model.words.encode(prompt)), model.max_positions - most)
    seen: list[int] = []
    for token in model.go_on(tokens, most):
        seen.append(token)
        text = model.words.decode(seen)
        if any(end in text for end in stop):
            return text[: min(text.index(end) for end in stop if end in text)]
    return model.words.decode(seen)


def pairs(model: Any, batch: Sequence[Pair]) -> list[Record]:
    vectors = model.embed([sentence for item in batch for sentence in (item.first, item.second)])
    cosines = (vectors[0::2] * vectors[1::2]).sum(1).tolist()
    return [{"id": item.id, "cosine": c, "score": item.score} for item, c in zip(batch, cosines, strict=True)]
