"""When the GPU has nothing to do, and why.

The GPU works from a queue that the host fills. It is idle between two records when the queue was empty, and the time at
which the next kernel was launched says why:

    synchronized   the host waited for the GPU (`item`, a copy to the CPU, an explicit synchronization), and only then
                   went on launching: the wait ends as the gap begins
    host           no wait, but the next kernel was launched after the GPU had run dry: the host is slower than the GPU
    queue          the next kernel had been launched in time: another stream, an event, or a kernel's own start

Gaps below `SHORTEST` are a kernel's own start and count as queue. A pure function of the events.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from .events import Event

SHORTEST = 3.0  # microseconds
NEAR = 30.0  # a wait that ends this close to a gap belongs to it
CAUSES = ("synchronized", "host", "queue")


@dataclass(frozen=True)
class Gap:
    """The GPU idle from `start` for `duration` microseconds, before it runs `before`; the host was in `during`."""

    start: float
    duration: float
    cause: str
    before: str
    during: str = ""


def busy(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The times at which anything runs on the GPU, on any stream: disjoint, in order."""
    spans: list[tuple[float, float]] = []
    for event in sorted((e for e in events if e.on_gpu), key=lambda e: e.start):
        if spans and event.start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], event.end))
        else:
            spans.append((event.start, event.end))
    return spans


def gaps(events: list[Event]) -> list[Gap]:
    """Every time at which the GPU had nothing to do between its first record and its last."""
    spans = busy(events)
    first = {e.start: e for e in sorted((e for e in events if e.on_gpu), key=lambda e: -e.duration)}
    launches = {e.correlation: e for e in events if e.where == "runtime" and e.correlation}
    waits = sorted((e for e in events if e.synchronizes), key=lambda e: e.end)
    ops = sorted((e for e in events if e.where == "op"), key=lambda e: e.start)
    return [
        _gap(end, start, first[start], launches, waits, ops) for (_, end), (start, _) in pairwise(spans) if start > end
    ]


def _gap(end: float, start: float, after: Event, launches: dict[int, Event], waits: list[Event],
         ops: list[Event]) -> Gap:  # fmt: skip
    length, launch = start - end, launches.get(after.correlation)
    if length < SHORTEST or launch is None:
        return Gap(end, length, "queue", after.name)
    if wait := _wait(waits, end, start):
        return Gap(end, length, "synchronized", after.name, wait.name)
    if launch.end <= end:
        return Gap(end, length, "queue", after.name)
    return Gap(end, length, "host", after.name, _longest(ops, end, start))


def _wait(waits: list[Event], end: float, start: float) -> Event | None:
    """A wait of the host that ended between just before the GPU ran dry and the next kernel's start."""
    i = bisect.bisect_left(waits, end - NEAR, key=lambda e: e.end)
    while i < len(waits) and waits[i].end <= start:
        if waits[i].start <= end:
            return waits[i]
        i += 1
    return None


def _longest(ops: list[Event], end: float, start: float) -> str:
    """The operation of the host that covers most of a gap; the innermost where several cover all of it."""
    best, most = "", 0.0
    last = bisect.bisect_left(ops, start, key=lambda e: e.start)
    for op in ops[max(0, last - 200) : last]:
        shared = min(op.end, start) - max(op.start, end)
        if shared > 0 and shared >= most:
            best, most = op.name, shared
    return best
