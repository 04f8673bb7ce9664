"""What a person sees while models are measured: a bar with the figure so far; off a terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console

from .perplexity import perplexity

Record = dict[str, Any]
EVERY = 60.0  # seconds between two lines off a terminal
COLUMNS = (
    progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=24), progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[so_far]}"), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
)  # fmt: skip


def so_far(records: Sequence[Record]) -> str:
    """The figure that these records give, for the eye.

    >>> so_far([{"nll": 20.0, "tokens": 10}, {"nll": 40.0, "tokens": 10}])
    'perplexity 20.09'
    """
    if not records:
        return ""
    if "correct" in records[0]:
        return f"right {sum(record['correct'] for record in records) / len(records):.1%}"
    if "nll" in records[0]:
        nats = sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)
        return f"perplexity {perplexity(nats):.2f}"
    return ""


class Progress:
    """Shows measurements one after the other; silent without a console."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bar = progress.Progress(*COLUMNS, console=console) if console and console.is_terminal else None
        self._task: Any = None
        self._title, self._total = "", 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._began = self._said = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task(title, total=total, completed=done, so_far="")
        if done:
            self.say(f"{title}: {done} of {total} are on disk from before")

    def advance(self, records: Sequence[Record]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=len(records), so_far=so_far(records))
        elif time.monotonic() - self._said > EVERY:
            self.say(f"{self._title}: {', '.join(filter(None, [f'{len(records)} of {self._total}', so_far(records)]))}")
            self._said = time.monotonic()

    def finish(self, records: Sequence[Record]) -> float:
        """The seconds since `start`."""
        seconds = time.monotonic() - self._began
        if not self._bar and self._done < self._total:
            self.say(f"{self._title}: {', '.join(filter(None, [so_far(records), f'{seconds:.0f} s']))}")
        return seconds

    def say(self, text: str) -> None:
        if self.console:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
