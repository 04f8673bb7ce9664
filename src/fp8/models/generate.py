"""Generating: feed the prompt once, then one token at a time over a KV cache.

    prefill   all tokens of the prompt in one pass; their keys and values enter the cache
    decode    the logits of the last position choose a token; that token alone is the next input

**Choosing.** Temperature 0 takes the largest logit, the lowest index where several are equal. Otherwise logits are
divided by the temperature, all but the `top_k` largest are dropped, and one uniform number u from torch's CPU
generator picks the first token whose cumulative probability exceeds u, in float64. One number a token: the same seed
and the same logits give the same text on any device, and nothing depends on what else is being generated.

`kv_cache_dtype=None` recomputes everything for every token; slow, and the yardstick for the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import KVCache
from ..errors import ConfigError, TensorError
from .llama import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy; `top_k` 0 keeps all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature!r}.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (all tokens) or the number of tokens to keep, not {self.top_k!r}.")


@dataclass(frozen=True)
class Generation:
    """New tokens (without the prompt and without the end-of-text token), why they end, and the cache they left."""

    tokens: list[int]
    stopped: str  # "end of text", "length" (as many as asked for) or "positions" (the model's limit)
    cache: KVCache | None


def generate(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int = 100,
    *,
    sampling: Sampling | None = None,
    end_of_text: int | Sequence[int] | None = None,
    kv_cache_dtype: str | None = "fp8",
) -> Generation:
    """All of `stream`, at once. Raises as it does."""
    cache = None if kv_cache_dtype is None else model.new_cache(dtype=kv_cache_dtype)
    ends = _ends(end_of_text)
    tokens = list(stream(model, prompt, max_new_tokens, sampling=sampling, end_of_text=ends, kv_cache_dtype=cache))
    if tokens and tokens[-1] in ends:
        return Generation(tokens[:-1], "end of text", cache)
    return Generation(tokens, "length" if len(tokens) == max_new_tokens else "positions", cache)


def stream(
    model: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int = 100,
    *,
    sampling: Sampling | None = None,
    end_of_text: int | Sequence[int] | None = None,
    kv_cache_dtype: str | KVCache | None = "fp8",
) -> Iterator[int]:
    """New tokens, one by one; the end-of-text token, if it comes, is the last one given.

    prompt           token numbers, at least one
    max_new_tokens   stop after so many, or at the model's `max_positions`
    kv_cache_dtype   "fp8" (E4M3), "e5m2", "bf16", "fp32", an empty cache of your own, or None: recompute everything

    Raises `ConfigError` for a prompt that is empty, too long, or not of this vocabulary; `TensorError` for NaN logits.
    """
    check(model, prompt, max_new_tokens)
    choose = sampler(sampling or Sampling())
    cache = model.new_cache(dtype=kv_cache_dtype) if isinstance(kv_cache_dtype, str) else kv_cache_dtype
    return _stream(model, list(prompt), max_new_tokens, choose, _ends(end_of_text), cache)


def _stream(
    model: Decoder,
    tokens: list[int],
    new: int,
    choose: Callable[[Tensor], int],
    ends: tuple[int, ...],
    cache: KVCache | None,
) -> Iterator[int]:
    given = tokens
    for _ in range(min(new, model.config.max_positions - len(tokens))):
        token = choose(next_logits(model, given, cache))
        yield token
        if token in ends:
            return
        tokens.append(token)
        given = tokens if cache is None else [token]


@torch.no_grad()
def next_logits(model: Decoder, tokens: Sequence[int], cache: KVCache | None) -> Tensor:
    """The logits `[V]` that follow the tokens, in FP32 on the CPU."""
    device = model.embedding.weight.device
    logits = model(torch.tensor([tokens], device=device), cache, last=True)[0, -1].float().cpu()
    if logits.isnan().any():
        raise TensorError("the model's logits are NaN: its weights or an activation are not finite.")
    return logits


def sampler(sampling: Sampling) -> Callable[[Tensor], int]:
    """A function from logits `[V]` to a token; it owns the random numbers of one text."""
    if sampling.temperature == 0:
        return lambda logits: int((logits == logits.max()).nonzero()[0])
    generator = torch.Generator().manual_seed(sampling.seed)
    return lambda logits: sample(logits, sampling, torch.rand((), generator=generator, dtype=torch.float64))


def sample(logits: Tensor, sampling: Sampling, u: Tensor) -> int:
    """The token at u (0 <= u < 1) of the cumulative probabilities."""
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scaled.numel():
        kept = scaled.topk(sampling.top_k).indices
        scaled = torch.full_like(scaled, float("-inf")).index_copy(0, kept, scaled[kept])
    cumulative = scaled.softmax(0).cumsum(0)
    return int(torch.searchsorted(cumulative / cumulative[-1], u, right=True))


def text_pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text for a screen, piece by piece: a character that spans several tokens is held back until it is whole."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if seen and (text := decode(seen)) != shown:
        yield text[len(shown) :]


def check(model: Decoder, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Refuse a prompt that the model cannot read."""
    limit, vocabulary = model.config.max_positions, model.config.vocab_size
    if not len(prompt):
        raise ConfigError("the prompt is empty: give at least one token (the end-of-text token will do).")
    if len(prompt) >= limit:
        raise ConfigError(f"the prompt has {len(prompt)} tokens; the model holds {limit}: cut the prompt.")
    if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ConfigError(f"token {wrong[0]} is not in the vocabulary of {vocabulary}: another tokenizer made it.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")


def _ends(end_of_text: int | Sequence[int] | None) -> tuple[int, ...]:
    if end_of_text is None:
        return ()
    return (end_of_text,) if isinstance(end_of_text, int) else tuple(end_of_text)
