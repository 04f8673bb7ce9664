"""A crowd against `fp8 serve` of a tiny model: whole answers, streams, and clients that vanish in the middle of one.

    PYTHONPATH=src:tests python tests/serve/soak.py [SECONDS 600] [CLIENTS 200]

Answers are greedy, so each prompt has one right answer: the first that anybody got. Few pages, so that sequences are
preempted. Prints what was counted, the server's memory over time, what it holds afterwards, and how it ended at
SIGTERM; exits with 1 where an answer was wrong or lost, a page is still held, or the server did not end well.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2

import tiny_models

PROMPTS = [f"{i:03d} " * random.Random(i).randrange(1, 16) for i in range(40)]
SAMPLES = 8  # of the server's memory
TOLD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")


class Crowd:
    """What the clients have seen so far."""

    def __init__(self, http: httpx2.AsyncClient, end: float) -> None:
        self.http, self.end = http, end
        self.counts: Counter[str] = Counter()
        self.answers: dict[int, str] = {}

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < self.end:
            how, prompt = draw.choice(("whole", "stream", "vanished")), draw.randrange(len(PROMPTS))
            try:
                text = await self.ask(how, prompt, stop_after=draw.randrange(4))
            except (httpx2.HTTPError, KeyError, ValueError) as error:
                self.counts[f"error: {type(error).__name__}"] += 1
                continue
            self.counts[how] += 1
            if how != "vanished" and self.answers.setdefault(prompt, text) != text:
                self.counts["wrong"] += 1

    async def ask(self, how: str, prompt: int, stop_after: int) -> str:
        body = {"prompt": PROMPTS[prompt], "max_tokens": 4 + prompt % 30, "temperature": 0, "ignore_eos": True}
        if how == "whole":
            answer = await self.http.post("/v1/completions", json=body)
            return answer.raise_for_status().json()["choices"][0]["text"]
        pieces: list[str] = []
        async with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if how == "vanished" and len(pieces) > stop_after:
                    break
        return "".join(pieces)


def started(folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server and its address."""
    flags = [
        "--port",
        "0",
        "--device",
        "cpu",
        "--max-num-seqs",
        "64",
        "--num-gpu-blocks-override",
        "120",
        "--block-size",
        "16",
    ]
    with log.open("w") as errors:
        server = subprocess.Popen([sys.executable, "-m", "fp8", "serve", str(folder), *flags], stderr=errors)
    while (found := re.search(r"running on (http://\S+)", log.read_text())) is None:
        if server.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)
    return server, found[1]


def resident(process: int) -> float:
    """MiB that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


async def run(url: str, process: int, seconds: float, clients: int) -> tuple[Counter[str], list[float], str]:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        crowd = Crowd(http, time.monotonic() + seconds)
        tasks = [asyncio.create_task(crowd.client(n)) for n in range(clients)]
        memory = []
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            memory.append(round(resident(process), 1))
        await asyncio.gather(*tasks)
        return crowd.counts, memory, (await http.get("/metrics")).text


def main() -> int:
    seconds, clients = (float(sys.argv[1]) if len(sys.argv) > 1 else 600.0), int((sys.argv[2:3] or ["200"])[0])
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        server, url = started(tiny_models.build(Path(place) / "tiny", "llama"), log)
        counts, memory, metrics = asyncio.run(run(url, server.pid, seconds, clients))
        server.send_signal(signal.SIGTERM)
        code, faults = server.wait(60), log.read_text().count("Traceback")
    print(dict(counts), f"\nresident MiB {memory}")
    held = {name: re.search(rf"^fp8:{name}\S* (\S+)", metrics, re.MULTILINE) for name in TOLD}
    print({name: found and found[1] for name, found in held.items()}, f"exit {code}, {faults} faults in the log")
    bad = any(name == "wrong" or name.startswith("error") for name in counts)
    left = any(found is None or float(found[1]) for name, found in held.items() if "preemptions" not in name)
    return int(bad or left or code != 0 or faults > 0)


if __name__ == "__main__":
    sys.exit(main())
