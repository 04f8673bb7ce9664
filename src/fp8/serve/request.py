"""What goes into an engine and what comes out: `Request`, and the `Output`s that tell of it, a few tokens at a time."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from .params import SamplingParams

Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability, its rank among all (1: the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # by token: the one that came, and the likeliest ones


@dataclass(frozen=True)
class Request:
    """One sequence to go on from.

    id       a name that no other unfinished request has
    prompt   token numbers, at least one
    seed     what its random numbers are made of: the parameters', or drawn here
    """

    id: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    arrival: float = 0.0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        given = self.params.seed
        object.__setattr__(self, "seed", secrets.randbits(64) if given is None else given)


@dataclass(frozen=True)
class Output:
    """What became of a request since the last step.

    new_tokens        token numbers, the one that ended the answer among them
    new_text          text that is certain: no half characters, nothing that may turn out to begin a stop text
    finished          None while it goes on; "stop" (a stop text, stop token or end of text), "length", "abort", "error"
    stop_reason       which stop text or stop token; None for the model's own end
    logprobs          one entry a new token, if asked for
    prompt_logprobs   one entry a token of the prompt, None for the first; once, with the first output
    prompt_tokens, cached_tokens   length of the prompt, and how much of it was found in the cache
    error             why, where `finished` is "error"
    """

    id: str
    new_tokens: list[int]
    new_text: str
    finished: Finish | None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment: what it holds now, and what it has done so far."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prefix_hit_tokens: int
    preemptions: int
    saturated_writes: int
    prompt_tokens: int
    generated_tokens: int
