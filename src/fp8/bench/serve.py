"""Serving, offline: milliseconds a token in BF16, INT8, FP8 and FP8 with an FP8 cache, in one run.

    python -m fp8.bench.serve --out DIR [--model llama-3-8b] [--rows 1x1024 16x16384] [--arms BF16 FP8] [--peers]

A row is a batch of prompts of so many random tokens, all different, added at once and answered greedily. Prompts
enter a chunk a step, so the first sequences already get tokens while the last ones are read; answers are longer by as
many steps, and at least `--tokens` steps have every sequence in them. The model has random weights and is made on the
device, from a name of `fp8 plan` or a config.json; its layers are quantized as they are made, so nothing larger than a
layer is held twice.

    prefill       from the first step to the one that gave the last sequence its first token
    ttft          a sequence's first token, since the row began: median, 90th and 99th percentile
    itl           a step in which every sequence got a token, by the clock of the host: the same. A step's tokens are
                  read while the next one runs, so the clock sees the slower of host and device
    tokens/s      of those steps
    e2e           the whole answer
    floor         `fp8 estimate`'s, in the middle of the answer: weights and cache once, over the speed of reading
    share         floor / median itl, on a GPU
    joules        of the GPU's counter (NVML), over those steps, a token

Each arm runs every row once to warm up (compiling, capturing) and once measured. The cache has room for the row and no
more, and shares no beginnings. An arm that does not fit says so, and the others go on. BF16 is always measured, and
what the articles claim of a deployment stands beside the row of their batch size.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..advise.estimate import cache_token_bytes, decode_seconds
from ..advise.models import LLAMAS, TIED, architecture
from ..cost import Architecture
from ..cost.datasheets import SHEETS, Datasheet
from ..errors import ConfigError, suggest
from ..serve import Engine, EngineOptions, Output, Request, SamplingParams
from ..serve.models import ServedModel, random_model
from .machine import machine, save
from .train import joules

ARMS = {  # name: (quantization of the weights, format of the cache)
    "BF16": (None, "bf16"),
    "INT8 W8A8": ("int8", "bf16"),
    "FP8": ("fp8", "bf16"),
    "FP8 + FP8 KV": ("fp8", "fp8"),
}
ROWS = ((1, 1024), (16, 1024), (64, 1024), (16, 16384), (64, 8192))
ARTICLE = {"batch": 16, "latency": -0.368, "tokens/s": 0.587, "memory": -0.50}  # FP8 over BF16, as printed
PAGE, CHUNK = 64, 8192
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A batch of prompts, and the steps that have all of them."""

    batch: int
    prompt: int
    tokens: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.prompt}"

    @property
    def answer(self) -> int:
        """Tokens of each answer: also those that the first sequence gets before the last one has its first."""
        return self.tokens + 1 + math.ceil(self.batch * self.prompt / max(1, CHUNK - self.batch))

    @property
    def longest(self) -> int:
        return self.prompt + self.answer


def config_of(model: str) -> dict[str, Any]:
    """The `config.json` of a name of `fp8 plan`, or of a file or folder. Raises `ConfigError`."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if model not in LLAMAS:
        raise ConfigError(f"there is no model {model!r}, and no file or folder of that name. {suggest(model, LLAMAS)}")
    hidden, ffn, layers, heads, kv_heads, vocabulary = LLAMAS[model]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "max_position_embeddings": 32768, "tie_word_embeddings": model in TIED, "torch_dtype": "bfloat16",
    }  # fmt: skip


# --------------------------------------------------------------------------- one row of one arm


def run_row(model: ServedModel, row: Row, cache: str) -> dict[str, Any]:
    """Measure a row: seconds, bytes, joules."""
    pages = row.batch * -(-row.longest // PAGE) + 1
    options = EngineOptions(
        page_size=PAGE,
        pages=pages,
        max_running=row.batch,
        max_step_tokens=CHUNK,
        prefix_caching=False,
        max_model_len=row.longest + 1,
    )
    engine = Engine(model, options=options, kv_cache_dtype=cache)
    measure(engine, Row(row.batch, row.prompt, 4))
    found = measure(engine, row)
    found["cache_bytes"] = engine.cache.nbytes
    if model.embedding.is_cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def measure(engine: Engine, row: Row) -> dict[str, Any]:
    """One pass: every prompt at once, then steps until all have ended."""
    for request in requests(row, engine.model.config.vocab_size):
        engine.add(request)
    clock = Clock(row)
    while engine.has_work():
        clock.tick(engine.step())
    return clock.figures()


def requests(row: Row, vocabulary: int) -> Iterable[Request]:
    """Prompts of random tokens, the same each time."""
    drawn = torch.randint(vocabulary, (row.batch, row.prompt), generator=torch.Generator().manual_seed(row.prompt))
    params = SamplingParams(temperature=0, max_tokens=row.answer, ignore_eos=True)
    return (Request(str(i), tokens, params) for i, tokens in enumerate(drawn.tolist()))


class Clock:
    """What the outputs of each step say about time."""

    def __init__(self, row: Row) -> None:
        self.row, self.start = row, time.perf_counter()
        self.last = self.start
        self.first: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.steps: list[float] = []
        self.energy: list[float | None] = []  # when all had their first token, and when the first of them ended

    def tick(self, outputs: Sequence[Output]) -> None:
        now = time.perf_counter()
        came = {o.id for o in outputs if o.new_tokens}
        if len(came) == len(self.first) == self.row.batch:
            self.steps.append(now - self.last)
        for name in came:
            self.first.setdefault(name, now)
        self.ended |= {o.id: now for o in outputs if o.finished}
        self.last = now
        begun = len(self.first) == self.row.batch
        if (begun and not self.energy) or (self.ended and len(self.energy) == 1):
            self.energy.append(joules())

    def figures(self) -> dict[str, Any]:
        (before, after), made = self.energy, self.row.batch * len(self.steps)
        since = sorted(t - self.start for t in self.first.values())
        return {
            "prefill_seconds": since[-1],
            "ttft": percentiles(since),
            "itl": percentiles(self.steps),
            "e2e": percentiles([t - self.start for t in self.ended.values()]),
            "tokens_per_second": made / sum(self.steps),
            "joules_per_token": None if before is None or after is None else (after - before) / made,
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile; of what was measured, without interpolation above."""
    ordered = sorted(seconds)
    at = lambda q: ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]  # noqa: E731
    return {"p50": statistics.median(ordered), "p90": at(0.9), "p99": at(0.99)}


# --------------------------------------------------------------------------- every arm


def sheet_here() -> Datasheet:
    """The data sheet of this GPU; an H200's where there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((sheet for key, sheet in SHEETS.items() if key in name), SHEETS["H200"])


def floor_seconds(sizes: Architecture, arm: str, row: Row, sheet: Datasheet) -> float:
    """The least seconds of a step, in the middle of the answer."""
    quantization, cache = ARMS[arm]
    token = cache_token_bytes(sizes, cache)
    return decode_seconds(
        sizes, "fp8" if quantization else "bf16", token, row.batch, (row.prompt + row.longest) // 2, sheet
    )


def run_arm(arm: str, model: str, rows: Sequence[Row], device: str) -> dict[str, Any]:
    """Every row of an arm, or why one has no figures."""
    quantization, cache = ARMS[arm]
    served = random_model(config_of(model), device=device, quantization=quantization)
    sizes, sheet = architecture(model), sheet_here()
    found: dict[str, Any] = {"weight_bytes": served.nbytes, "matrix_bytes": matrix_bytes(served), "rows": {}}
    for row in rows:
        try:
            got = run_row(served, row, cache)
            if served.embedding.is_cuda:
                got["floor"] = floor_seconds(sizes, arm, row, sheet)
                got["share"] = got["floor"] / got["itl"]["p50"]
        except (torch.OutOfMemoryError, ConfigError) as error:
            got = {"why_not": str(error).splitlines()[0]}
        found["rows"][row.name] = got
        print(line(arm, row, got), flush=True)
        release()
    return found


def matrix_bytes(model: ServedModel) -> int:
    """Bytes of what is quantized: the linear layers of the blocks."""
    held = {t.data_ptr(): t.nbytes for layer in model.layers for t in layer.buffers() if t.dim() == 2}
    return sum(held.values())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def line(arm: str, row: Row, got: Mapping[str, Any]) -> str:
    """A row of the table."""
    start = f"{arm:24}{row.name:>12}"
    if "why_not" in got:
        return f"{start}  {got['why_not'][:100]}"
    itl, ttft, energy = got["itl"], got["ttft"], got.get("joules_per_token")
    share = f"{got['share']:7.0%}{1e3 * got['floor']:8.2f}" if "share" in got else 15 * " "
    more = f"{energy:9.3f}" if energy is not None else ""
    return (
        f"{start}{1e3 * itl['p50']:9.2f}{1e3 * itl['p99']:9.2f}{share}{got['tokens_per_second']:11,.0f}"
        f"{ttft['p50']:9.3f}{got['prefill_seconds']:9.3f}{got['e2e']['p50']:9.3f}{more}"
    )


HEAD = (
    f"{'arm':24}{'row':>12}{'itl ms':>9}{'p99':>9}{'share':>7}{'floor':>8}{'tokens/s':>11}{'ttft s':>9}{'prefill':>9}"
    f"{'e2e s':>9}{'J/token':>9}"
)


def article(arms: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The articles' deployment table, FP8 over BF16 at batch 16, beside ours at the first row of that batch."""
    row = next((r.name for r in rows if r.batch == ARTICLE["batch"]), None)
    pair = [arms.get(name, {}).get("rows", {}).get(row, {}) for name in ("BF16", "FP8 + FP8 KV")]
    if row is None or any("itl" not in one for one in pair):
        return []
    high, low = pair
    held = [
        arms[name]["weight_bytes"] + one["cache_bytes"]
        for name, one in zip(("BF16", "FP8 + FP8 KV"), pair, strict=True)
    ]
    matrices = arms["FP8 + FP8 KV"]["matrix_bytes"] / arms["BF16"]["matrix_bytes"] - 1
    ours = {
        "latency": low["itl"]["p50"] / high["itl"]["p50"] - 1,
        "tokens/s": low["tokens_per_second"] / high["tokens_per_second"] - 1,
        "memory": held[1] / held[0] - 1,
    }
    told = [f"FP8 + FP8 KV against BF16, {row}: the article's deployment table (no source, no model), and here"]
    told += [f"  {name:10}{ARTICLE[name]:+8.1%}{value:+9.1%}" for name, value in ours.items()]
    return [*told, f"  {'':10}{'':8}{matrices:+9.1%}  quantized matrices alone"]


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="bench/results", help="folder for serve.json and serve.png")
    parser.add_argument("--model", default="llama-3-8b", help="a name of fp8 plan, or a config.json")
    parser.add_argument("--rows", nargs="+", default=[f"{b}x{p}" for b, p in ROWS], help="batch x prompt, as 16x1024")
    parser.add_argument("--tokens", type=int, default=128, help="steps that have every sequence of a row")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--peers", nargs="*", default=None, help="which peers; all that are installed without a name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    rows = [row_of(text, options.tokens) for text in options.rows]
    print(json.dumps(machine()), HEAD, sep="\n", flush=True)
    arms = {arm: run_arm(arm, options.model, rows, options.device) for arm in dict.fromkeys(["BF16", *options.arms])}
    from . import serve_peers

    arms |= serve_peers.run(options.peers, config_of(options.model), rows, options.device)
    print("\n".join(article(arms, rows)))
    results = {"model": options.model, "tokens": options.tokens, "article": ARTICLE, "arms": arms}
    print(f"written: {save(options.out, 'serve', results)}")
    from .serve_plot import plot

    plot(results, Path(options.out) / "serve.png")


def row_of(text: str, tokens: int) -> Row:
    """A row from "16x1024". Raises `ConfigError`."""
    batch, _, prompt = text.partition("x")
    if not (batch.isdecimal() and prompt.isdecimal() and int(batch) and int(prompt)) or tokens < 4:
        raise ConfigError(
            f"a row is batch x prompt, as 16x1024, with answers of at least 4 tokens; not {text!r}, {tokens}."
        )
    return Row(int(batch), int(prompt), tokens)


if __name__ == "__main__":
    main()
