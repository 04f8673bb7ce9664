"""What a task is made of, whatever it asks: items, and how they are answered.

    Choice      the likeliest of several continuations          right or not
    Ending      one continuation                                right if greedy decoding gives it; its nats
    Answer      text that is generated                          right if what is found in it is the answer
    Pair        two sentences                                   their cosine, held against a score by people

A continuation's log-likelihood is the sum over its tokens, given the context before it, of log p; both are tokenized
together, so that no token is cut at the seam that the model would not see in running text (`answering.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """`answer` is the index of the right one of `choices`, each a continuation of `context`. `by_length` divides a
    log-likelihood by the characters of its choice, the blank before it left out, as lm-eval's `acc_norm` does."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int
    by_length: bool = False


@dataclass(frozen=True)
class Ending:
    id: str
    context: str
    ending: str


@dataclass(frozen=True)
class Answer:
    """Generation ends at the end of the text, at any string of `stop`, or after `most` tokens."""

    id: str
    prompt: str
    answer: str
    stop: tuple[str, ...] = ()
    most: int = 256


@dataclass(frozen=True)
class Pair:
    id: str
    first: str
    second: str
    score: float


Item = Choice | Ending | Answer | Pair


def as_written(text: str) -> str:
    """Generated text as the answer, without blanks around it."""
    return text.strip()


@dataclass(frozen=True)
class Task:
    """Items of one kind. `found` turns generated text into an answer."""

    name: str
    items: Sequence[Item]
    found: Callable[[str], str] = field(default=as_written, compare=False)

    @property
    def kind(self) -> type:
        return type(self.items[0])

    def fingerprint(self) -> str:
        """Changes with any item."""
        plain = json.dumps([self.name, [asdict(item) for item in self.items]])
        return hashlib.sha256(plain.encode()).hexdigest()
