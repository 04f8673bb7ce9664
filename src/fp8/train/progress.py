"""What a person sees while a run trains: a bar with loss, speed and learning rate, and a line for each evaluation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics import Record

COLUMNS = (
    TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s  lr {task.fields[lr]:.2e}"),
    TimeRemainingColumn(),
)  # fmt: skip


class Show:
    """Shows the records of a run on a console; with no console it is silent. Off a terminal it prints lines, no bar."""

    def __init__(self, console: Console | None, title: str, step: int, steps: int) -> None:
        self.console = console
        self._bar = Progress(*COLUMNS, console=console, transient=True) if console and console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task(title, total=steps, completed=step, loss=float("nan"), speed=0.0, lr=0.0)

    def __enter__(self) -> Show:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        if self.console:
            self.console.print(text, highlight=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.say(
                f"step {record['step']}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}"
            )
        elif self._bar:
            fields = {"loss": record["loss"], "speed": record["tokens_per_second"], "lr": record["lr"]}
            self._bar.update(self._task, completed=record["step"], **fields)
