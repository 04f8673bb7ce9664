"""What may be asked: of one request (`SamplingParams`, in vLLM's words) and of an engine (`EngineOptions`).

How the numbers of a `SamplingParams` act on logits is at the top of `sampler.py`; what is refused, and why, is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeGuard

from ..errors import ConfigError, RequestError

MOST_LOGPROBS = 20  # alternatives a token
MOST_TEXTS = 1 << 14  # of one prompt
RANGES = {  # of what a logit or a probability is changed by; beyond them FP32 overflows sooner or later
    "temperature": (0.0, math.inf),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, when they end, and what is told of them. Raises `RequestError`.

    n                    texts of one prompt, at most 16384
    temperature          0: the likeliest token
    top_k, top_p, min_p  keep the k likeliest (0 or -1: all), the likeliest that make up a probability of top_p,
                         those at least min_p times as likely as the likeliest (0: all)
    presence_penalty, frequency_penalty   taken from a logit once, or for each time that the text has the token; -2 to 2
    repetition_penalty   divides (or, below 0, multiplies) the logits of tokens that prompt or text have; 1: none; 0.01
                         to 100
    logit_bias           added to the logits of some tokens, by number; -100 to 100
    seed                 the same seed gives the same text, in whatever company; None: another one each time
    stop                 texts that end the answer, which does not contain them unless `include_stop_str_in_output`
    stop_token_ids       tokens that end the answer, beside the model's own ends, which `ignore_eos` turns off
    max_tokens           None: as many as the model holds
    min_tokens           before so many, nothing but the maximum ends the answer
    logprobs             tell each token's log-probability and those of so many likeliest ones; of the model's own
                         distribution, before temperature, bias and penalties
    prompt_logprobs      the same of each token of the prompt but the first
    skip_special_tokens  leave marks such as <|im_end|> out of the text
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", _numbered(self.logit_bias or {}))
        self._check_counts()
        self._check_numbers()
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop={stop!r} holds what is not a text of at least one character: leave it out.")

    def _check_counts(self) -> None:
        least = {"n": 1, "top_k": -1, "min_tokens": 0, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "logprobs", "prompt_logprobs"):
                continue
            if not _whole(value) or value < low:
                raise RequestError(f"{name}={value!r} must be a whole number, at least {low}.")
        if self.n > MOST_TEXTS:
            raise RequestError(f"n={self.n}: at most {MOST_TEXTS} texts of one prompt.")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > MOST_LOGPROBS:
                raise RequestError(f"{name}={getattr(self, name)}: at most {MOST_LOGPROBS} likeliest tokens are told.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}.")
        if self.seed is not None and not _whole(self.seed):
            raise RequestError(f"seed={self.seed!r} must be a whole number, or None.")
        if wrong := [token for token in self.stop_token_ids or () if not _whole(token)]:
            raise RequestError(f"stop_token_ids holds {wrong[0]!r}, which is not a token number.")

    def _check_numbers(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not _number(value) or not low <= value <= high:
                above = "" if high == math.inf else f" and {high:g}"
                raise RequestError(f"{name}={value!r} must be {'between' if above else 'at least'} {low:g}{above}.")
        if not _number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p={self.top_p!r} must be above 0 and at most 1 (all tokens).")
        if wrong := [v for v in (self.logit_bias or {}).values() if not _number(v) or not -BIAS <= v <= BIAS]:
            raise RequestError(f"logit_bias holds {wrong[0]!r}, which is not between {-BIAS:g} and {BIAS:g}.")

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the next logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def plain(self) -> bool:
        """Whether the largest logit, as it comes, is the next token."""
        return self.temperature == 0 and not self.penalized and not self.logit_bias


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The sizes of an engine. Raises `ConfigError`.

    page_size         positions that share a page of the cache; a multiple of 16
    pages             pages of the cache; None: as many as fit into `memory_fraction` of a GPU's memory beside the
                      model, or into a GiB on a CPU
    max_running       sequences in one step
    max_step_tokens   new tokens in one step: a longer prompt enters in chunks, so that others are not kept waiting.
                      More of them read prompts faster: `fp8.LLM`, whose answers nobody watches, takes 16384
    prefix_caching    prompts that begin alike share their pages
    graphs            on a GPU, a decode step is one CUDA graph
    graph_sizes       numbers of rows that are captured; None: up to max_running, a third or less apart
    deterministic     every step has max_running rows, filled up: products of one shape, so that on a GPU no result
                      depends on the company. On a CPU that is so without it
    max_model_len     most tokens of prompt and answer; None: the model's
    """

    page_size: int = 64
    memory_fraction: float = 0.9
    pages: int | None = None
    max_running: int = 256
    max_step_tokens: int = 8192
    prefix_caching: bool = True
    graphs: bool = True
    graph_sizes: tuple[int, ...] | None = None
    deterministic: bool = False
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("page_size", "pages", "max_running", "max_step_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is None and name in ("pages", "max_model_len"):
                continue
            if not _whole(value) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number above 0.")
        if wrong := [size for size in self.graph_sizes or () if not _whole(size) or size < 1]:
            raise ConfigError(f"graph_sizes holds {wrong[0]!r}, which is no number of rows.")
        if not _number(self.memory_fraction) or not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction={self.memory_fraction!r} must be above 0 and at most 1.")


def _numbered(bias: Mapping[Any, float]) -> dict[int, float]:
    """By token number: JSON writes it as a text."""
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias={bias!r} must give a number for each token, by its number.") from None


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
