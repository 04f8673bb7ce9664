"""Counters and histograms for Prometheus, in its text format; names are vLLM's with the prefix `fp8:`.

    counter     only grows; its name ends in _total
    gauge       what is so now
    histogram   how many observations were at most each bound (cumulative), their sum and their number

Times are seconds, as the format asks. All of it is touched by the event loop only. What the engine counts itself
(`EngineStats`) is read when somebody asks, so it costs nothing between two scrapes.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from ..request import EngineStats, Output

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Observations by bounds.

    >>> h = Histogram((0.1, 1.0))
    >>> for value in (0.05, 0.1, 0.5, 7): h.observe(value)
    >>> list(h.cumulative()), h.count
    ([2, 3, 4], 4)
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> Iterator[int]:
        """How many were at most each bound; last, all."""
        total = 0
        for count in self._counts:
            yield (total := total + count)


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.first, self.between, self.whole = Histogram(FIRST), Histogram(BETWEEN), Histogram(WHOLE)
        self.finished: Counter[str] = Counter()
        self.responses: Counter[tuple[str, str]] = Counter()  # by path and status
        self.cached = 0
        self._begun: set[str] = set()

    def observe(self, output: Output, since_last: float, since_arrival: float) -> None:
        """Take what one output tells: the time to the first token, or between two; at the end, the whole."""
        if output.new_tokens:
            (self.between if output.id in self._begun else self.first).observe(since_last)
            self._begun.add(output.id)
        if output.finished is not None:
            self._begun.discard(output.id)
            self.finished[output.finished] += 1
            self.whole.observe(since_arrival)

    def forget(self, names: Iterable[str]) -> None:
        """These went away before their end."""
        for name in names:
            self._begun.discard(name)
            self.finished["abort"] += 1

    def text(self, stats: EngineStats | None, model: str) -> str:
        """Everything, as Prometheus reads it; without what the engine counts where there is none to ask."""
        label: Labels = (("model_name", model),)
        finished: dict[Labels, float] = {
            (*label, ("finished_reason", how)): n for how, n in sorted(self.finished.items())
        }
        responses: dict[Labels, float] = {
            (("path", path), ("status", status)): n for (path, status), n in sorted(self.responses.items())
        }
        lines = [*self._of_engine(stats, label)] if stats is not None else []
        lines += family("request_success_total", "counter", "Requests that ended, by how.", finished)
        lines += family("http_requests_total", "counter", "HTTP responses, by path and status.", responses)
        for name, told, held in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", self.first),
            ("inter_token_latency_seconds", "Between two tokens of a request.", self.between),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", self.whole),
        ):
            lines += histogram(name, told, held, label)
        return "\n".join(lines) + "\n"

    @staticmethod
    def _of_engine(s: EngineStats, label: Labels) -> Iterator[str]:
        rows = (
            ("num_requests_running", "gauge", "Sequences in the steps.", s.running),
            ("num_requests_waiting", "gauge", "Sequences that wait for a seat or for pages.", s.waiting),
            ("kv_cache_usage_perc", "gauge", "Share of the pages in use; 1 is all.", s.pages_used / s.pages_total),
            ("prefix_cache_hits_total", "counter", "Prompt tokens found in the cache.", s.prefix_hit_tokens),
            ("num_preemptions_total", "counter", "Sequences that gave their pages back and began anew.", s.preemptions),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", s.prompt_tokens),
            ("generation_tokens_total", "counter", "Tokens made.", s.generated_tokens),
            ("kv_cache_saturated_writes_total", "counter", "Keys and values beyond a static scale's range.",
             s.saturated_writes),
        )  # fmt: skip
        for name, kind, told, value in rows:
            yield from family(name, kind, told, {label: value})


def family(name: str, kind: str, told: str, values: Mapping[Labels, float]) -> list[str]:
    """One metric: its help, its type, a line for each set of labels."""
    head = [f"# HELP fp8:{name} {told}", f"# TYPE fp8:{name} {kind}"]
    return head + [f"fp8:{name}{braces(labels)} {value:g}" if isinstance(value, float)
                   else f"fp8:{name}{braces(labels)} {value}" for labels, value in values.items()]  # fmt: skip


def histogram(name: str, told: str, held: Histogram, label: Labels) -> list[str]:
    """A histogram's lines."""
    bounds = (*(f"{bound:g}" for bound in held.bounds), "+Inf")
    rows = zip(bounds, held.cumulative(), strict=True)
    return [
        f"# HELP fp8:{name} {told}",
        f"# TYPE fp8:{name} histogram",
        *(f"fp8:{name}_bucket{braces((*label, ('le', bound)))} {count}" for bound, count in rows),
        f"fp8:{name}_sum{braces(label)} {held.sum!r}",
        f"fp8:{name}_count{braces(label)} {held.count}",
    ]


def braces(labels: Labels) -> str:
    r"""Labels, with what the format cannot hold escaped.

    >>> braces((("path", 'a"b'),))
    '{path="a\\"b"}'
    """

    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}"
