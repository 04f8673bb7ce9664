"""A server in a thread, at a port of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from fp8.serve import Engine
from fp8.serve.http.async_engine import AsyncEngine
from fp8.serve.http.door import Door, ServerOptions
from fp8.serve.http.server import DrainingServer, server_of
from toy_engine import Letters, Toy, engine


class Talkers(Letters):
    """Letters that also make a prompt of a conversation, and take any text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 39 for letter in text]

    def chat(self, messages: Sequence[Any], **template: Any) -> list[int]:
        return self.encode("".join(message["content"] for message in messages) + "A")


class Slow(Toy):
    """A toy whose steps take a while."""

    seconds = 0.01

    def __call__(self, *arguments: Any) -> Any:
        time.sleep(self.seconds)
        return super().__call__(*arguments)


def toy_door(model: Any = None, *, max_waiting: int = 1024, options: Any = None, **engine_options: Any) -> Door:
    held = engine(model, Talkers(), **engine_options)
    return Door(AsyncEngine(held, max_waiting=max_waiting), "toy", held.tokenizer, {}, options or ServerOptions())


@contextmanager
def serving(door: Door) -> Iterator[tuple[str, DrainingServer]]:
    """Serve; gives the address. At the end everything has left cleanly."""
    server = server_of(door, "127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not door.engine._thread.is_alive()


def wait_until(ready: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def idle(held: Engine) -> bool:
    """Nothing runs, nothing waits, and every page is free."""
    stats = held.stats()
    return (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def metric(url: str, name: str) -> float:
    """The sum of a metric's values."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"fp8:{name} ", f"fp8:{name}{{")))
