"""The clients of the online benchmark, against a server whose every chunk is known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fp8.bench import serve_online
from fp8.bench.serve_online import Answer, Load, figures, line, run_load
from fp8.errors import ConfigError

pytest.importorskip("httpx2")
PAUSE = 0.02


class Server:
    """Speaks just enough HTTP: streams three chunks, and refuses every prompt that begins with `bad`."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.bodies, self.open, self.most = bad, [], 0, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next((int(row.split(":")[1]) for row in head.splitlines() if "content-length" in row), 0)
                await self.answer(head, await reader.readexactly(length), writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()

    async def answer(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if head.startswith("get"):
            self.whole(writer, 200, {"data": [{"id": "known"}]})
            return
        self.bodies.append(json.loads(body))
        if self.bodies[-1]["prompt"][0] == self.bad:
            self.whole(writer, 429, {"error": {"message": "too many"}})
            return
        self.open += 1
        self.most = max(self.most, self.open)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for data in [{"choices": [{"text": "a"}]}] * 3 + [{"choices": [], "usage": {"completion_tokens": 5}}]:
            self.chunk(writer, json.dumps(data))
            await asyncio.sleep(PAUSE)
        self.chunk(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        self.open -= 1

    def chunk(self, writer: asyncio.StreamWriter, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))

    def whole(self, writer: asyncio.StreamWriter, status: int, data: Any) -> None:
        text = json.dumps(data).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))


@contextlib.contextmanager
def at(server: Server) -> Iterator[str]:
    """The server in a thread; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(asyncio.start_server(server, "127.0.0.1", 0), loop).result(10)
    try:
        yield f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}"
    finally:

        async def end() -> None:
            started.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await asyncio.sleep(0.02)  # transports close one turn later

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_times_and_tokens_are_those_of_the_server() -> None:
    server = Server()
    with at(server) as url:
        got = asyncio.run(run_load(url, Load(12, 200.0, prompt=5, tokens=3), "known"))
    assert got["requests"] == 12 and got["failed"] == {}
    assert got["itl"]["p50"] == pytest.approx(PAUSE, rel=0.6)
    assert got["e2e"]["p50"] >= 2 * PAUSE
    assert got["tokens_per_second"] == pytest.approx(60 / got["seconds"])
    assert {len(body["prompt"]) for body in server.bodies} == {5}
    assert server.most > 1, "nobody waits for the answer of another"


def test_a_refused_request_is_counted_by_its_reason_and_has_no_times() -> None:
    with at(Server(bad=2)) as url:
        got = asyncio.run(run_load(url, Load(5, 500.0, prompt=4), "known"))
    ((reason, count),) = got["failed"].items()
    assert count == 1 and reason.startswith("HTTP 429") and "too many" in reason
    assert " 1 " in line("BF16", 5.0, got)


def test_a_server_that_is_not_there_fails_every_request_and_is_told() -> None:
    got = asyncio.run(run_load("http://127.0.0.1:9", Load(3, 100.0), "known"))
    assert got == {"requests": 3, "failed": {"ConnectError": 3}}
    assert "ConnectError" in line("BF16", 1.0, got)
    with pytest.raises(ConfigError, match="no server answers at"):
        serve_online.main(["--url", "http://127.0.0.1:9"])


def test_arrivals_are_poisson_and_the_same_for_every_rate_but_for_the_scale() -> None:
    slow, fast = (list(Load(4000, rate, prompt=2).arrivals()) for rate in (1.0, 10.0))
    assert [prompt for _, prompt in slow] == [prompt for _, prompt in fast]
    assert all(a == pytest.approx(10 * b) for (a, _), (b, _) in zip(slow, fast, strict=True))
    gaps = [b - a for (a, _), (b, _) in pairwise(slow)]
    assert statistics.mean(gaps) == pytest.approx(1, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(1, rel=0.08)


def test_waiting_in_the_clients_own_queue_counts() -> None:
    """A request that was due at 1 and whose first chunk came at 4 took 3, whenever it was sent."""
    got = figures([Answer(1.0, [4.0, 5.0], 2), Answer(2.0, failed="x")], 0.0)
    assert got["ttft"]["p50"] == 3 and got["e2e"]["p99"] == 4 and got["itl"]["p50"] == 1
    assert got["failed"] == {"x": 1}


def test_the_command_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with at(Server()) as url:
        serve_online.main(["--url", f"{url}/v1/", "--rates", "50", "100", "--requests", "4", "--prompt", "3",
                           "--out", str(tmp_path)])  # fmt: skip
    written = json.loads((tmp_path / "serve_online.json").read_text())["results"]
    assert [row["rate"] for row in written["arms"][url]] == [50, 100]
    assert capsys.readouterr().out.count("server") == 2


def test_an_interrupted_run_keeps_the_rates_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve_online.run_load

    async def stopped(url: str, load: Load, *rest: Any) -> Any:
        if load.rate == 77:
            raise KeyboardInterrupt
        return await real(url, load, *rest)

    monkeypatch.setattr(serve_online, "run_load", stopped)
    with at(Server()) as url, pytest.raises(SystemExit) as left:
        serve_online.main(["--url", url, "--rates", "50", "77", "--requests", "2", "--out", str(tmp_path)])
    assert left.value.code == 130
    (rates,) = json.loads((tmp_path / "serve_online.json").read_text())["results"]["arms"].values()
    assert [row["rate"] for row in rates] == [50]


@pytest.mark.parametrize("arguments", [[], ["--url", "http://x", "--folder", "y"]])
def test_it_needs_a_server_or_a_folder(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="give --url"):
        serve_online.main(arguments)


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rate=0\.0 must be above 0"):
        Load(rate=0.0)
