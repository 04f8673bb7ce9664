"""The engine: requests in, outputs out, one step at a time.

    add ─► Scheduler.plan ─► Forward ─► Sampler ─► Flight ─► settle ─► Output
               host            device launches      tokens on the way to the host

**One step ahead.** `step` plans and launches a step, and only then reads the tokens of the step before. So the device
has work while the host looks at tokens, writes text and plans, and nothing waits for the host between two tokens: the
newest token of a sequence goes from one step to the next on the device. The price: whether a token was the last one is
found when the next step is already under way. A sequence that met its end has one row in it that is dropped. (Ends by
length are known beforehand, and cost nothing.) On a CPU a launch is complete when it returns, and all the rest is the
same.

**Alone and in company.** What a request gets depends on its tokens and parameters only: the model's rows do not see
each other, the sampler's neither, and random numbers come from (seed, position). On a CPU that holds for every bit. On
a GPU the order of a product's sums may change with the number of its rows; `deterministic` gives every step the same
number, and the same kernel for attention.

**One bad request** does not harm others: what cannot be served is refused by `add`, with a reason; a row of logits that
is not finite ends its own request with finished="error", and its pages are not found by anybody again.

**Interrupted.** If launching raises (Ctrl-C, mostly), whoever was in that step is computed anew, and what the step
would have written is not found by anybody; the engine goes on. Not thread-safe: one thread calls everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, RequestError
from .forward import Forward
from .inputs import fetch, send
from .pages import PagePool
from .params import EngineOptions
from .request import EngineStats, Finish, Logprob, Output, Request, TokenLogprobs
from .sampler import Row, Sampler, Told, tell, uniform
from .scheduler import Scheduler, Work
from .sequence import Sequence
from .text import Writer
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Flight:
    """A step that was launched: whose tokens it samples, and what comes to the host from it."""

    sampled: list[Sequence]
    told: list[Work]
    tokens: Tensor  # int64 [sampled + 1]: -1 where there is none; last, the saturated writes so far
    logprobs: Told | None
    prompt_logprobs: Told | None
    event: Any


class Engine:
    """Serves requests with a model.

    model            a `ServedModel`, or whatever has its `config`, `new_cache` and call
    tokenizer        makes texts of tokens; without one outputs have no text, and stop texts are refused
    kv_cache_dtype   "fp8" (E4M3), "e5m2" or "bf16"
    device           None: where the model is

    Raises `ConfigError` for a cache that cannot be made.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        *,
        kv_cache_dtype: str = "fp8",
        device: torch.device | str | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.model, self.tokenizer = model, tokenizer
        self.device = torch.device(device) if device is not None else model.embedding.device
        held, asked = model.config.max_positions, self.options.max_model_len
        if asked is not None and asked > held:
            raise ConfigError(f"max_model_len={asked} is more than the {held} positions that the model was made for.")
        self.sampler = Sampler(self.options.max_running, model.config.vocab_size, self.device)
        self.forward = Forward(model, self.options, self.sampler.last)
        pages = self.options.pages or self.forward.affordable(kv_cache_dtype, asked or held)
        self.max_model_len = min(asked or held, pages * self.options.page_size + 1)
        if asked is not None and asked > self.max_model_len:
            raise ConfigError(
                f"max_model_len={asked} does not fit into a cache of {pages} pages of {self.options.page_size}: at "
                f"most {self.max_model_len}. Give it more memory (pages, memory_fraction), or a smaller max_model_len."
            )
        self.cache = model.new_cache(pages, self.options.page_size, kv_cache_dtype)
        self.scheduler = Scheduler(
            PagePool(pages),
            self.options.page_size,
            max_running=self.options.max_running,
            max_step_tokens=self.forward.most,
            prefix_caching=self.options.prefix_caching,
        )
        self.forward.open(self.cache, self.max_model_len)
        self._live: dict[str, Sequence] = {}
        self._flight: Flight | None = None
        self._ended: list[Output] = []
        self._arrived = self._saturated = self._prompt_tokens = self._generated = 0

    # ------------------------------------------------------------------ the door

    def add(self, request: Request) -> None:
        """Take a request. Raises `RequestError`, which says what is wrong with it and what would do."""
        self.check(request)
        p = request.params
        most = min(self.max_model_len, len(request.prompt) + (p.max_tokens or self.max_model_len))
        own = frozenset() if p.ignore_eos or self.tokenizer is None else self.tokenizer.ends
        writer = None
        if self.tokenizer is not None:
            decode = partial(self.tokenizer.decode, skip_special_tokens=p.skip_special_tokens)
            writer = Writer(decode, tuple(p.stop or ()), p.include_stop_str_in_output)
        sequence = Sequence(request, self._arrived, most, own | set(p.stop_token_ids or ()), writer)
        self._arrived += 1
        self._live[request.id] = sequence
        self.scheduler.add(sequence)

    def check(self, request: Request) -> None:
        """Refuse what cannot be served, as `add` does. Raises `RequestError`."""
        name, prompt, p, vocabulary = request.id, request.prompt, request.params, self.model.config.vocab_size
        if name in self._live:
            raise RequestError(f"there is a request {name!r} already that has not ended: give this one another id.")
        if not prompt:
            raise RequestError(f"the prompt of request {name!r} is empty: give at least one token.")
        if len(prompt) >= self.max_model_len:
            room = self.scheduler.pool.total * self.options.page_size
            more = (
                f", or give the engine more pages: its cache holds {room}"
                if room < self.model.config.max_positions
                else ""
            )
            raise RequestError(
                f"the prompt of request {name!r} has {len(prompt)} tokens; with one token of an answer, this engine "
                f"holds {self.max_model_len}: cut the prompt{more}."
            )
        named = {"the prompt": prompt, "logit_bias": p.logit_bias or {}, "stop_token_ids": p.stop_token_ids or ()}
        for what, tokens in named.items():
            if wrong := [t for t in tokens if not (isinstance(t, int) and 0 <= t < vocabulary)]:
                raise RequestError(
                    f"{what} of request {name!r} holds token {wrong[0]!r}, which is not in the vocabulary of "
                    f"{vocabulary}: another tokenizer made it."
                )
        if p.stop and self.tokenizer is None:
            raise RequestError(f"request {name!r} has stop texts, and this engine no tokenizer: give stop_token_ids.")

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages; the next step tells it. Harmless for an unknown id."""
        if (sequence := self._live.get(request_id)) is not None:
            self._ended.append(self._output(sequence, [], "", "abort"))
            self._end(sequence, "abort")

    def step(self) -> list[Output]:
        """Launch one more step, if there is work, and tell what became of requests in the step before."""
        work = self.scheduler.plan()
        try:
            with self.forward.there():
                launched = self._launch(work) if work else None
        except BaseException:
            self._undo(work)
            raise
        ended, self._ended = self._ended, []
        outputs = ended + (self._settle(self._flight) if self._flight else [])
        self._flight = launched
        return outputs

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._flight or self._ended)

    def stats(self) -> EngineStats:
        """What the engine holds now and has done so far, as far as the host knows; asks nothing of the device."""
        s = self.scheduler
        return EngineStats(
            running=len(s.running),
            waiting=len(s.waiting),
            pages_used=s.pool.total - s.pool.free,
            pages_total=s.pool.total,
            prefix_hit_tokens=s.hits,
            preemptions=s.preemptions,
            saturated_writes=self._saturated,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
        )

    # ------------------------------------------------------------------ launching

    @torch.no_grad()
    def _launch(self, work: list[Work]) -> Flight:
        for w in work:
            if w.fresh:
                self.sampler.seat(w.sequence)
        logits = self.forward(work)
        chosen, told = [w for w in work if w.sampled], [w for w in work if w.told]
        tokens = self.sampler(logits[: len(chosen)], [self._row(w) for w in chosen]) if chosen else logits.new_zeros(0)
        asked = max((w.sequence.request.params.logprobs or 0 for w in chosen), default=0)
        wants = any(w.sequence.request.params.logprobs is not None for w in chosen)
        logprobs = tell(logits[: len(chosen)], tokens, asked).fetched() if wants else None
        prompt_logprobs = self._tell_prompts(logits[len(chosen) :], told).fetched() if told else None
        tokens = fetch(torch.cat([tokens.long(), self.cache.saturated]))
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Flight([w.sequence for w in chosen], told, tokens, logprobs, prompt_logprobs, event)

    def _row(self, work: Work) -> Row:
        sequence, params = work.sequence, work.sequence.request.params
        position = work.start + work.new
        early = position - sequence.prompt_length < params.min_tokens
        banned = tuple(t for t in sequence.ends if t < self.sampler.vocab_size) if early else ()
        assert sequence.seat is not None
        u = uniform(sequence.request.seed, position) if params.temperature else 0.0
        return Row(params, sequence.seat, u, banned)

    def _tell_prompts(self, logits: Tensor, told: list[Work]) -> Told:
        tokens = np.array([w.sequence.tokens[p + 1] for w in told for p in w.told], dtype=np.int64)
        most = max(w.sequence.request.params.prompt_logprobs or 0 for w in told)
        return tell(logits[: len(tokens)], send({"tokens": tokens}, self.device)["tokens"], most)

    def _undo(self, work: list[Work]) -> None:
        """Take back a step that was planned and not launched; what the step before gave is told by the next one."""
        self.scheduler.undo(work)
        flight, self._flight = self._flight, None
        self._ended += self._settle(flight) if flight else []

    # ------------------------------------------------------------------ settling

    def _settle(self, flight: Flight) -> list[Output]:
        """Read what a step gave, and end whoever met an end."""
        if flight.event is not None:
            flight.event.synchronize()
        *tokens, self._saturated = flight.tokens.tolist()
        if flight.prompt_logprobs is not None:
            self._read_prompts(flight.told, flight.prompt_logprobs)
        outputs = []
        for i, (sequence, token) in enumerate(zip(flight.sampled, tokens, strict=True)):
            sequence.pending -= 1
            if sequence.finished is None:
                outputs.append(self._accept(sequence, token, flight.logprobs, i))
        return outputs

    def _accept(self, sequence: Sequence, token: int, told: Told | None, row: int) -> Output:
        """What one more token means for a sequence."""
        if token < 0:
            return self._fail(sequence)
        first = len(sequence.tokens) == sequence.prompt_length
        sequence.tokens.append(token)
        self._generated += 1
        self._prompt_tokens += sequence.prompt_length if first else 0
        self.scheduler.publish(sequence)
        finished, reason, text = self._judge(sequence, token)
        wanted = sequence.request.params.logprobs
        logprobs = None if told is None or wanted is None else [self._entry(told, row, token, wanted)]
        output = self._output(sequence, [token], text, finished, reason, logprobs, first)
        if finished is not None:
            self._end(sequence, finished)
        return output

    def _judge(self, sequence: Sequence, token: int) -> tuple[Finish | None, int | str | None, str]:
        """Whether the newest token ends the answer, why, and the text that it makes certain."""
        params, writer = sequence.request.params, sequence.writer
        count = len(sequence.tokens) - sequence.prompt_length
        if token in sequence.ends:
            reason = token if token in (params.stop_token_ids or ()) else None
            return "stop", reason, "" if writer is None else writer.end()
        text = "" if writer is None else writer.push(token, look=count >= params.min_tokens)
        if writer is not None and writer.found is not None:
            return "stop", writer.found, text
        if len(sequence.tokens) >= sequence.most:
            return "length", None, text + ("" if writer is None else writer.end())
        return None, None, text

    def _fail(self, sequence: Sequence) -> Output:
        self.scheduler.conceal(sequence)
        self._end(sequence, "error")
        why = (
            f"the logits that follow token {len(sequence.tokens)} of request {sequence.request.id!r} are not finite: a "
            "weight, an activation or a value of the cache is NaN or infinite. `fp8 lint` looks for such weights."
        )
        return self._output(sequence, [], "" if sequence.writer is None else sequence.writer.end(), "error", error=why)

    def _end(self, sequence: Sequence, how: Finish) -> None:
        sequence.finished = how
        self.scheduler.remove(sequence)
        del self._live[sequence.request.id]

    def _output(
        self,
        sequence: Sequence,
        tokens: list[int],
        text: str,
        finished: Finish | None,
        reason: int | str | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        first: bool = False,
        error: str | None = None,
    ) -> Output:
        params = sequence.request.params
        prompt = [None, *sequence.prompt_logprobs] if first and params.prompt_logprobs is not None else None
        cached = sequence.cached or 0
        return Output(
            sequence.request.id, tokens, text, finished, reason, logprobs, prompt, sequence.prompt_length, cached, error
        )

    # ------------------------------------------------------------------ log-probabilities

    def _read_prompts(self, told: list[Work], rows: Told) -> None:
        at = 0
        for w in told:
            most = w.sequence.request.params.prompt_logprobs or 0
            for row, position in enumerate(w.told, at):
                token = w.sequence.request.prompt[position + 1]
                w.sequence.prompt_logprobs.append(self._entry(rows, row, token, most))
            at += len(w.told)

    def _entry(self, told: Told, row: int, token: int, most: int) -> TokenLogprobs:
        """The token that came, and the `most` likeliest."""
        ids, top = told.ids[row, :most].tolist(), told.top[row, :most].tolist()
        likeliest = {
            i: Logprob(value, rank, self._text(i)) for rank, (i, value) in enumerate(zip(ids, top, strict=True), 1)
        }
        came = Logprob(float(told.chosen[row]), int(told.rank[row]), self._text(token))
        return {token: came} | likeliest | {token: came}

    def _text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)
