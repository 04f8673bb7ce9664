"""uvicorn around the application: how it logs, and how it leaves.

**Leaving.** At the first SIGTERM or SIGINT the server stays where it is and drains: new requests are answered 503 (so
that a load balancer, which sees /health fail, loses none on the way), running ones go on. When the last has ended, or
after `drain_timeout`, or at a second signal, what is left is ended with an error that says so, and the process exits
with 0.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from types import FrameType
from typing import Any

import uvicorn

from .app import build_app
from .async_engine import StoppedError
from .door import Door

log = logging.getLogger("fp8.serve")


class DrainingServer(uvicorn.Server):
    """A server that finishes what it has begun."""

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self.door = door
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, the second ends it."""
        wait = 0.0 if self.door.draining else self.door.options.drain_timeout
        self.door.draining, self._deadline = True, time.monotonic() + wait

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to exit."""
        if self._deadline is not None and self._drained(self._deadline):
            return True
        return await super().on_tick(counter)

    def _drained(self, deadline: float) -> bool:
        late = time.monotonic() >= deadline
        if late and self.door.engine.live:
            log.warning("drained for too long", extra={"told": {"ended": self.door.engine.live}})
            self.door.engine.stop_all(StoppedError("this server had to leave before the answer was finished."))
        return late or self.door.open == 0


def server_of(door: Door, host: str, port: int) -> DrainingServer:
    """A server that is yet to be run."""
    config = uvicorn.Config(
        build_app(door), host=host, port=port, log_config=None, access_log=False, lifespan="on",
        timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip
    return DrainingServer(config, door)


def log_to_stderr(form: str) -> None:
    """One line an event: `form` "text" or "json". What a request was asked or answered is never written down."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name in ("fp8.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class TextLines(logging.Formatter):
    """`2026-11-24 17:30:02 INFO request method=POST path=/v1/completions status=200 ...`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name of logging's
        told = (f"{name}={plain(value)}" for name, value in fields(record).items())
        return " ".join((super().formatMessage(record), *told))


class JsonLines(logging.Formatter):
    """`{"time": ..., "level": "INFO", "event": "request", "method": "POST", ...}`"""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname, "event": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | fields(record))


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "told", {})


def plain(value: Any) -> str:
    """A field of a line of text: quoted where it could be taken for more than one.

    >>> plain("/a b"), plain("/v1"), plain(200)
    ('"/a b"', '/v1', '200')
    """
    text = str(value)
    return text if text.isprintable() and not set(' "=') & set(text) else json.dumps(text)
