"""The engine behind an event loop: one thread owns it, and nobody else touches it.

    handlers (event loop)                     the engine's thread
    ─────────────────────                     ───────────────────
    generate ── call ──► queue ─────────────► take commands, then one step
       ▲                                                │
       └── one mailbox a request ◄── deliver ◄── its outputs, one call_soon_threadsafe a step

Commands are functions of no arguments: the thread runs all that have come, then steps; with nothing to do it sleeps in
the queue. A group is the requests of one HTTP request (several prompts, n > 1): it is admitted whole or not at all, and
whoever stops listening to it ends it. So a client that leaves frees its pages by leaving.

**Failure.** An exception out of `step` means that the device or the engine's state is not to be trusted. Every request
under way then ends with the reason, every later one is refused with it, `failure` is set for the health check, and the
thread does nothing but refuse. Nothing is retried: a supervisor that sees the health check fail starts a new process.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from ..engine import Engine
from ..request import EngineStats, Output, Request
from .metrics import Metrics

log = logging.getLogger("fp8.serve")


class EngineDeadError(RuntimeError):
    """The engine failed, and serves nothing any more."""


class BusyError(RuntimeError):
    """More requests wait already than may."""


class StoppedError(RuntimeError):
    """The server ended a request before it was finished: it took too long, or the server is leaving."""


class Mailbox:
    """Outputs of one group on their way to its listener, or why there are no more; when each sequence last spoke."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.outputs: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self.left = {request.id: request.arrival for request in requests}
        self.began = {request.id: request.arrival for request in requests}


class AsyncEngine:
    """An `Engine` for the handlers of one event loop.

    engine        owned by the thread from `start` on
    max_waiting   sequences beyond those that fit into a step; more are refused (`BusyError`)
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 1024) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.metrics = Metrics()
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._boxes: dict[str, Mailbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="fp8-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; what is under way stays unfinished."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def live(self) -> int:
        """Sequences that have not ended."""
        return len(self._boxes)

    @property
    def capacity(self) -> int:
        """Sequences that may be there at once, running and waiting."""
        return self.engine.options.max_running + self.max_waiting

    async def generate(self, requests: Sequence[Request], timeout: float | None = None) -> AsyncGenerator[Output]:
        """The outputs of a group as they come, until all its requests have ended; closing this ends them.

        Raises `RequestError` (nothing was admitted), `BusyError`, `EngineDeadError`, and, after `timeout` seconds or
        when the server leaves, `StoppedError`.
        """
        if self.live + len(requests) > self.capacity:
            raise BusyError(f"{self.live} requests are there already, and at most {self.capacity} may be: come later.")
        box, admitted = Mailbox(requests), False
        self._boxes |= dict.fromkeys(box.left, box)
        late = StoppedError(f"not finished after {timeout} seconds, the most that this server gives a request.")
        alarm = (
            None if timeout is None else asyncio.get_running_loop().call_later(timeout, box.outputs.put_nowait, late)
        )
        try:
            await self._call(lambda: self._admit(requests))
            admitted = True
            while box.left:
                output = await box.outputs.get()
                if isinstance(output, Exception):
                    raise output
                if output.finished is not None:
                    del box.left[output.id]
                yield output
        finally:
            if alarm is not None:
                alarm.cancel()
            gone = [name for name in box.began if self._boxes.pop(name, None) is not None]
            self._commands.put(lambda: self._abort(gone))
            self.metrics.forget(gone if admitted else ())

    async def stats(self) -> EngineStats:
        """What the engine holds; asked of it between two steps."""
        return await self._call(self.engine.stats)

    def stop_all(self, error: Exception) -> None:
        """End every request with an error, at once."""
        for box in set(self._boxes.values()):
            box.outputs.put_nowait(error)

    # ------------------------------------------------------------------ from the event loop to the thread

    async def _call(self, work: Callable[[], Any]) -> Any:
        """Run something between two steps and wait for what it gives or raises."""
        assert self._loop is not None, "start() comes first"
        future, loop = self._loop.create_future(), self._loop

        def command() -> None:
            try:
                self._tell(loop, settle, future, work(), None)
            except Exception as error:  # noqa: BLE001  goes to whoever asked
                self._tell(loop, settle, future, None, error)

        if self.failure is not None:
            raise EngineDeadError(self.failure)
        self._commands.put(command)
        return await future

    def _admit(self, requests: Sequence[Request]) -> None:
        """All of a group or nothing of it."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        for request in requests:
            self.engine.check(request)
        for request in requests:
            self.engine.add(request)

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._take():
            if self.failure is None and self.engine.has_work():
                try:
                    outputs = self.engine.step()
                except Exception as error:
                    log.exception("the engine failed")
                    self._fail(f"the engine failed and serves nothing any more: {type(error).__name__}: {error}")
                else:
                    self._send(outputs)

    def _take(self) -> bool:
        """Run the commands that have come, waiting for one where there is nothing else to do; False: stop."""
        idle = self.failure is not None or not self.engine.has_work()
        while idle or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            idle = False
        return True

    def _fail(self, why: str) -> None:
        self.failure = why
        if self._loop is not None:
            self._tell(self._loop, self.stop_all, EngineDeadError(why))

    def _send(self, outputs: list[Output]) -> None:
        if outputs and self._loop is not None:
            self._tell(self._loop, self._deliver, outputs, time.monotonic())

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
        """Run something in the event loop, unless that has gone: then nobody listens."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(call, *arguments)

    # ------------------------------------------------------------------ from the thread to the event loop

    def _deliver(self, outputs: list[Output], now: float) -> None:
        for output in outputs:
            if (box := self._boxes.get(output.id)) is None:
                continue
            self.metrics.observe(output, now - box.left[output.id], now - box.began[output.id])
            box.left[output.id] = now if output.new_tokens else box.left[output.id]
            box.outputs.put_nowait(output)
            if output.finished is not None:
                del self._boxes[output.id]


def settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Give a future what it waits for, unless nobody does."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
