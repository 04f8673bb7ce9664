"""A measurement in a process of its own: its memory is gone afterwards, and its fault is its own."""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import BackendError


def apart(work: Callable[..., Iterable[Any]], *arguments: Any, until: float = math.inf) -> Iterator[Any]:
    """What `work(*arguments)` yields, as it comes. `work` is a function of a module; all that passes can be pickled.

    Raises `BackendError`: it raised, its process died, or it was still at it when `time.monotonic()` passed `until`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_run, args=(theirs, work, arguments))
    worker.start()
    theirs.close()
    try:
        while (got := _next(ours, worker, until))[0] != "done":
            if got[0] == "failed":
                raise BackendError(got[1])
            yield got[1]
    finally:
        if worker.is_alive():
            worker.join(5)
            worker.terminate()
        worker.join()


def _next(pipe: Any, worker: Any, until: float) -> tuple[str, Any]:
    if not pipe.poll(None if until == math.inf else max(0.0, until - time.monotonic())):
        worker.terminate()
        raise BackendError("it had not answered when its time was over")
    try:
        return pipe.recv()
    except EOFError:
        worker.join()
        raise BackendError(f"its process ended with {worker.exitcode}") from None


def _run(pipe: Any, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    try:
        for what in work(*arguments):
            pipe.send(("sent", what))
        pipe.send(("done", None))
    except Exception as error:  # noqa: BLE001  whatever it is, it is told
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:300]))
