"""One row of `fp8 bench serve`: a batch of prompts through an engine, and what the clock says of it.

Prompts are added at once and enter a chunk a step, so the first sequences already get tokens while the last ones are
read; answers are longer by as many steps. Once every sequence has its first token, and on a GPU,

    host      seconds of `step` while the device has nothing to do: planning, copying, launching and reading are all
              that it then takes, for nothing is waited for. Median of `PROBES`
    device    seconds of the captured decode step, replayed back to back: the GPU's own time, without host and sampler.
              The seats' newest tokens are put back as they were, so a replay writes the same codes to the same places

Then come `tokens` steps by the clock, which sees the slower of host and device. The engine compiled what it needs when
it was made, and a pass over short prompts comes before, and one over a single prompt of the row's length, because
libraries plan for each new shape. A pass in which a Triton kernel was made or loaded all the same is told (`compiled`),
and repeated if there is time for three.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..serve import Engine, EngineOptions, Output, Request, SamplingParams
from ..serve.models import ServedModel
from .train import joules

PAGE, CHUNK = 64, EngineOptions().max_step_tokens
PROBES, REPLAYS = 5, 20
GIB = 2**30


class LateError(Exception):
    """There is no time left for this row."""


@dataclass(frozen=True)
class Row:
    """A batch of prompts, and the steps that have all of them."""

    batch: int
    prompt: int
    tokens: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.prompt}"

    @property
    def answer(self) -> int:
        """Tokens of each answer: also those of the probes, and those that the first sequence gets before the last one
        has its first."""
        return self.tokens + 1 + PROBES + math.ceil(self.batch * self.prompt / max(1, CHUNK - self.batch))

    @property
    def longest(self) -> int:
        return self.prompt + self.answer

    @property
    def context(self) -> int:
        """Tokens of a sequence in the middle of its answer."""
        return (self.prompt + self.longest) // 2


def run_row(model: ServedModel, row: Row, cache: str, until: float = math.inf) -> dict[str, Any]:
    """Measure a row: seconds, bytes, joules. Raises `LateError` when `time.monotonic()` passes `until`."""
    engine = engine_for(model, row, cache)
    measure(engine, Row(row.batch, min(row.prompt, 64), 4), until)
    measure(engine, Row(1, row.prompt, 4), until)
    found = measured(engine, row, until)
    found["cache_bytes"] = engine.cache.nbytes
    if model.embedding.is_cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def engine_for(model: ServedModel, row: Row, cache: str) -> Engine:
    """An engine with room for the row and no more, that shares no beginnings, and captures one graph."""
    options = EngineOptions(
        page_size=PAGE,
        pages=row.batch * -(-row.longest // PAGE) + 1,
        max_running=row.batch,
        max_step_tokens=CHUNK,
        prefix_caching=False,
        max_model_len=row.longest + 1,
        graph_sizes=(row.batch,),
    )
    return Engine(model, options=options, kv_cache_dtype=cache)


def measured(engine: Engine, row: Row, until: float) -> dict[str, Any]:
    """A pass, and another one if kernels were made in it and there is time for three."""
    begun = time.monotonic()
    with compiling() as made:
        found = measure(engine, row, until)
    took = time.monotonic() - begun
    if made and until - time.monotonic() > 3 * took:
        with compiling() as made:
            found = measure(engine, row, until)
    return found | {"compiled": len(made)}


def measure(engine: Engine, row: Row, until: float = math.inf) -> dict[str, Any]:
    """One pass: every prompt at once, then steps until all have ended."""
    for request in requests(row, engine.model.config.vocab_size):
        engine.add(request)
    clock, probed = Clock(row), {}
    while engine.has_work():
        if time.monotonic() > until:
            for i in range(row.batch):
                engine.abort(str(i))
            raise LateError
        clock.tick(engine.step())
        if clock.waiting:
            probed = probe(engine, clock) if engine.device.type == "cuda" else {}
            clock.open()
    return clock.figures() | probed


def requests(row: Row, vocabulary: int) -> Iterable[Request]:
    """Prompts of random tokens, the same each time."""
    drawn = torch.randint(vocabulary, (row.batch, row.prompt), generator=torch.Generator().manual_seed(row.prompt))
    params = SamplingParams(temperature=0, max_tokens=row.answer, ignore_eos=True)
    return (Request(str(i), tokens, params) for i, tokens in enumerate(drawn.tolist()))


def probe(engine: Engine, clock: Clock) -> dict[str, float]:
    """Seconds of the host alone and of the device alone; some steps pass."""
    host, last = [], engine.sampler.last
    before = last.clone()
    for _ in range(PROBES):
        before.copy_(last)
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = engine.step()
        host.append(time.perf_counter() - start)
        clock.tick(outputs)
    found = {"host": statistics.median(host)}
    if engine.forward.graphs is not None and (graph := engine.forward.graphs.of(clock.row.batch)) is not None:
        after = last.clone()
        last.copy_(before)
        found["device"] = replayed(graph)
        last.copy_(after)
    return found


def replayed(graph: Any) -> float:
    """Seconds of one replay among many, on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(REPLAYS + 2):
        if i == 2:
            start.record()
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPLAYS


@contextlib.contextmanager
def compiling() -> Iterator[list[str]]:
    """The names of Triton kernels that are made, or loaded from the disk, meanwhile."""
    made: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield made
        return
    before = getattr(knobs.runtime, "jit_post_compile_hook", None)

    def note(**what: Any) -> bool:
        made.append(str(getattr(what.get("fn"), "name", what.get("repr"))))
        return False

    knobs.runtime.jit_post_compile_hook = note  # type: ignore[assignment]
    try:
        yield made
    finally:
        knobs.runtime.jit_post_compile_hook = before


class Clock:
    """What the outputs of each step say about time."""

    def __init__(self, row: Row) -> None:
        self.row, self.start = row, time.perf_counter()
        self.last = self.start
        self.first: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.steps: list[float] = []
        self.energy: list[float | None] = []  # when the steps that count begin, and when the first sequence ends

    @property
    def waiting(self) -> bool:
        """Whether every sequence has its first token, and the steps that count have not begun."""
        return len(self.first) == self.row.batch and not self.energy

    def open(self) -> None:
        """The steps that count begin."""
        self.energy.append(joules())
        self.last = time.perf_counter()

    def tick(self, outputs: Sequence[Output]) -> None:
        now = time.perf_counter()
        came = {o.id for o in outputs if o.new_tokens}
        if self.energy and len(came) == self.row.batch:
            self.steps.append(now - self.last)
        for name in came:
            self.first.setdefault(name, now)
        self.ended |= {o.id: now for o in outputs if o.finished}
        if self.ended and len(self.energy) == 1:
            self.energy.append(joules())
        self.last = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        (before, after), made = self.energy, self.row.batch * len(self.steps)
        since = sorted(t - self.start for t in self.first.values())
        return {
            "prefill_seconds": since[-1],
            "ttft": percentiles(since),
            "itl": percentiles(self.steps),
            "e2e": percentiles([t - self.start for t in self.ended.values()]),
            "tokens_per_second": made / sum(self.steps),
            "joules_per_token": None if before is None or after is None else (after - before) / made,
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile; of what was measured, without interpolation above."""
    ordered = sorted(seconds)
    at = lambda q: ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]  # noqa: E731
    return {"p50": statistics.median(ordered), "p90": at(0.9), "p99": at(0.99)}
