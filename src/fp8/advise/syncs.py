"""Which line of Python makes the host wait for the GPU.

torch tells of every wait that it causes itself (`torch.cuda.set_sync_debug_mode`), as a warning. What counts is where
in the user's program it happened, so the stack is taken when the warning is given: the innermost line outside of torch
and of this package. Explicit `torch.cuda.synchronize()` and the `synchronize` of events and streams are not warned of,
so they are watched while the step runs.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .findings import Sync

READ = "a value is read on the host (.item(), .tolist(), .cpu(), an if on a tensor, nonzero, a copy that waits)"
HERE = str(Path(__file__).parent.parent)
TORCH = str(Path(torch.__file__).parent)
BETWEEN = (HERE, TORCH, warnings.__file__, contextlib.__file__)  # files whose lines are nobody's own
EXPLICIT: tuple[tuple[Any, str, str], ...] = (
    (torch.cuda, "synchronize", "torch.cuda.synchronize()"),
    (torch.cuda.Event, "synchronize", "Event.synchronize()"),
    (torch.cuda.Stream, "synchronize", "Stream.synchronize()"),
)


def find_syncs(step: Callable[[], Any]) -> tuple[Sync, ...]:
    """Run a step once and tell each wait, with the line that caused it and how often."""
    seen: Counter[tuple[str, str]] = Counter()
    with _warned(seen), _watched(seen):
        step()
    return tuple(Sync(what, line, times) for (what, line), times in seen.most_common())


@contextmanager
def _warned(seen: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count torch's own waits. Other warnings go on to whoever showed them before."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            seen[READ, calling_line()] += 1
        else:
            shown(message, category, *rest, **more)

    on_gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
        warnings.showwarning = show
        before = torch.cuda.get_sync_debug_mode() if on_gpu else 0
        try:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            yield
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _watched(seen: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count explicit synchronizations."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in EXPLICIT]
    for (owner, name, called), (_, _, told) in zip(originals, EXPLICIT, strict=True):
        setattr(owner, name, _counting(called, told, seen))
    try:
        yield
    finally:
        for owner, name, called in originals:
            setattr(owner, name, called)


def _counting(called: Callable[..., Any], told: str, seen: Counter[tuple[str, str]]) -> Callable[..., Any]:
    def run(*args: Any, **keywords: Any) -> Any:
        seen[told, calling_line()] += 1
        return called(*args, **keywords)

    return run


def calling_line() -> str:
    """The innermost line outside of torch and of this package, with its text: "train.py:12 in step: loss.item()"."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(BETWEEN)]
    if not frames:
        return "an unknown line"
    frame = frames[-1]
    text = f": {frame.line}" if frame.line else ""
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}{text}"
