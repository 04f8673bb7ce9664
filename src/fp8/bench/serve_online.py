"""Serving, online: requests that come when they come, against a server that speaks OpenAI's HTTP.

    fp8 bench serve_online --url http://127.0.0.1:8000 --rates 1 4 16     ours, vLLM, SGLang, anybody's
    fp8 bench serve_online --folder MODEL --arms BF16 FP8                  each arm behind `fp8 serve`

Requests arrive as a Poisson process (gaps drawn from an exponential distribution, the same at every rate but for the
scale), whether or not earlier ones have been answered: a server that is too slow gathers a queue, and its times grow,
as they do for its users. A request is a prompt of random tokens, streamed from /v1/completions, greedy, without an end.

    ttft   from the moment it should have been sent to the first chunk with text, token or finish
    itl    between two chunks of one answer. A server may put several tokens into a chunk
    e2e    to the last chunk
    tokens/s   completion tokens, as the server counts them (`usage`), over the seconds from first arrival to last

Requests that fail are counted, by their reason, and have no times. Prompts differ from each other in their first token,
so no prefix cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import BackendError, ConfigError
from .machine import machine, save
from .serve import ARMS
from .serve_row import percentiles


@dataclass(frozen=True)
class Load:
    """What clients do: requests in all, a second, tokens of prompt and answer, tokens there are."""

    requests: int = 200
    rate: float = 4.0
    prompt: int = 512
    tokens: int = 128
    vocabulary: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "rate", "prompt", "tokens", "vocabulary"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be above 0.")

    def arrivals(self) -> Iterator[tuple[float, list[int]]]:
        """(seconds after the beginning, prompt)."""
        draw, at = random.Random(self.seed), 0.0
        for i in range(self.requests):
            yield at, [i % self.vocabulary, *draw.choices(range(self.vocabulary), k=self.prompt - 1)]
            at += draw.expovariate(1.0) / self.rate


@dataclass
class Answer:
    """One request: when it was due, when chunks came, tokens, and why it failed."""

    due: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: str | None = None


async def ask(client: Any, body: dict[str, Any], answer: Answer) -> None:
    """Send one request and note when its chunks come."""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.failed = (
                    f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:120]}"
                )
                return
            async for chunk in events(response):
                if chunk.get("choices"):
                    answer.chunks.append(time.perf_counter())
                if "error" in chunk:
                    answer.failed = str(chunk["error"])[:120]
                answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
    except Exception as error:  # noqa: BLE001 - whatever a client meets is a figure of the server
        answer.failed = type(error).__name__
    if not answer.chunks and answer.failed is None:
        answer.failed = "no chunk came"


async def events(response: Any) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


async def run_load(url: str, load: Load, model: str, api_key: str | None = None) -> dict[str, Any]:
    """Every request when it is due; the figures."""
    httpx2 = need_httpx()
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=600.0, limits=limits) as client:
        start, answers, tasks = time.perf_counter(), [], []
        for at, prompt in load.arrivals():
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            answers.append(Answer(start + at))
            body = {"model": model, "prompt": prompt, "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True,
                    "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
            tasks.append(asyncio.create_task(ask(client, body, answers[-1])))
        await asyncio.gather(*tasks)
    return figures(answers, start)


def figures(answers: list[Answer], start: float) -> dict[str, Any]:
    """Percentiles of those that were answered."""
    done = [a for a in answers if a.failed is None]
    found: dict[str, Any] = {
        "requests": len(answers), "failed": dict(Counter(a.failed for a in answers if a.failed is not None)),
    }  # fmt: skip
    if not done:
        return found
    seconds = max(a.chunks[-1] for a in done) - start
    gaps = [later - earlier for a in done for earlier, later in pairwise(a.chunks)]
    return found | {
        "seconds": seconds,
        "tokens_per_second": sum(a.tokens for a in done) / seconds,
        "ttft": percentiles([a.chunks[0] - a.due for a in done]),
        "itl": percentiles(gaps or [0.0]),
        "e2e": percentiles([a.chunks[-1] - a.due for a in done]),
    }


def need_httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise BackendError("the clients need httpx2: pip install 'fp8[serve]'.") from None
    return httpx2


# --------------------------------------------------------------------------- servers


@contextlib.contextmanager
def served(folder: Path, arm: str, patience: float = 600.0) -> Iterator[str]:
    """`fp8 serve` of an arm in a process of its own; its address. SIGTERM at the end."""
    quantization, cache = ARMS[arm]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fp8", "serve", str(folder), "--port", str(port), "--kv-cache-dtype", cache]
    command += ["--served-model-name", "bench", *(["--quantization", quantization] if quantization else [])]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, patience)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], patience: float) -> None:
    """Until /health answers. Raises `BackendError` where the server ends before, or takes too long."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BackendError(f"the server ended with {process.returncode} before it answered; its reason is above.")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.1)
    raise BackendError(f"the server did not answer at {url}/health within {patience:.0f} s.")


def name_at(url: str, api_key: str | None) -> str:
    """The first model that a server has. Raises `ConfigError` where none answers."""
    request = urllib.request.Request(f"{url}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"no server answers at {url}/v1/models: {error}. Start one, or give --folder.") from None


# --------------------------------------------------------------------------- the table


HEAD = f"{'arm':16}{'rate':>7}{'failed':>8}{'tokens/s':>10}" + "".join(
    f"{name + ' ' + p:>11}" for name in ("ttft", "itl", "e2e") for p in ("p50", "p90", "p99")
)


def line(arm: str, rate: float, got: dict[str, Any]) -> str:
    """A row: milliseconds."""
    start = f"{arm:16}{rate:7.1f}{sum(got['failed'].values()):8}"
    if "ttft" not in got:
        return f"{start}  {next(iter(got['failed']))}"
    times = "".join(f"{1e3 * got[name][p]:11.1f}" for name in ("ttft", "itl", "e2e") for p in ("p50", "p90", "p99"))
    return f"{start}{got['tokens_per_second']:10,.0f}{times}"


def run_rates(arm: str, url: str, options: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """One server at every rate, after a few requests to warm up."""
    more = {"prompt": options.prompt, "tokens": options.tokens, "vocabulary": options.vocabulary, "seed": options.seed}
    asyncio.run(run_load(url, Load(4, 100.0, **more | {"seed": options.seed + 1}), model, options.api_key))
    for rate in options.rates:
        got = asyncio.run(run_load(url, Load(options.requests, rate, **more), model, options.api_key))
        print(line(arm, rate, got), flush=True)
        yield {"rate": rate} | got


def run_servers(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of the server at `--url`, or of each arm behind one of our own, as they come."""
    if options.url is not None:
        url = options.url.rstrip("/").removesuffix("/v1")
        for got in run_rates("server", url, options, name_at(url, options.api_key)):
            yield url, got
        return
    for arm in options.arms:
        with served(options.folder, arm) as url:
            for got in run_rates(arm, url, options, "bench"):
                yield arm, got


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        "fp8 bench serve_online", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--folder", type=Path, help="a checkpoint in BF16, served by `fp8 serve` in each arm")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="with --folder")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 4.0, 16.0], help="requests a second")
    parser.add_argument("--requests", type=int, default=200, help="at each rate")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--vocabulary", type=int, default=256, help="prompts are of tokens below it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--out", default="bench/results", help="folder for serve_online.json")
    options = parser.parse_args(arguments)
    if (options.url is None) == (options.folder is None):
        raise ConfigError("give --url of a server that runs, or --folder of a checkpoint to serve.")
    print(json.dumps(machine()), HEAD, sep="\n", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    told = {name: getattr(options, name) for name in ("requests", "prompt", "tokens", "seed")}
    note = lambda: save(options.out, "serve_online", {"load": told, "arms": found})  # noqa: E731
    try:
        for arm, got in run_servers(options):
            found.setdefault(arm, []).append(got)
            note()
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {note()}")
        raise SystemExit(130) from None
    print(f"written: {note()}")


if __name__ == "__main__":
    main()
