"""Serving, offline: milliseconds a token in BF16, INT8, FP8 and FP8 with an FP8 cache, in one run.

    fp8 bench serve --out DIR [--model llama-3-8b] [--rows 1x1024 16x16384] [--arms BF16 FP8] [--seconds 230] [--peers]

A row is a batch of prompts of so many random tokens, all different, added at once and answered greedily
(`serve_row.py`); at least `--tokens` steps have every sequence in them. The model has random weights and is made on the
device, from a name of `fp8 plan` or a config.json; its layers are quantized as they are made, so nothing larger than a
layer is held twice.

    prefill       from the first step to the one that gave the last sequence its first token
    ttft          a sequence's first token, since the row began: median, 90th and 99th percentile
    itl           a step in which every sequence got a token, by the clock of the host: the same. A step's tokens are
                  read while the next one runs, so the clock sees the slower of host and device
    gpu, host     what of it is the captured step alone on the GPU, and what the host takes for a step: where host is
                  the larger, the GPU waits for it
    tokens/s      of those steps
    e2e           the whole answer
    floor         `fp8 estimate`'s, in the middle of the answer: weights and cache once, over the speed of reading; and
                  of the prompts: products, quantizing, attention
    share         floor / median itl, and floor / prefill, on a GPU
    joules        of the GPU's counter (NVML), over those steps, a token

The cache has room for the row and no more, and shares no beginnings. On a GPU the kernels of all arms are compiled
first, at once, by models of two layers; then each arm runs in a process of its own, so that a fault costs one arm, and
takes an equal part of the `--seconds` that are left: a row that is not done by then is said to be skipped. What has no
room says so, and the others go on. BF16 is always measured, and what the articles claim of a deployment stands beside
the row of their batch size. `--kernels ROW ...` ends with those rows' step in FP8 + FP8 KV, kernel by kernel. What is
measured is written at once: an interrupted run keeps its rows.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..advise.estimate import cache_token_bytes, decode_seconds, prompt_floor
from ..advise.models import LLAMAS, TIED, architecture
from ..cost import Architecture
from ..cost.datasheets import SHEETS, Datasheet
from ..errors import BackendError, ConfigError, suggest
from ..serve.models import ServedModel, random_model
from . import serve_peers
from .apart import apart
from .machine import machine, save
from .serve_plot import plot
from .serve_row import Clock, LateError, Row, engine_for, measure, requests, run_row
from .train import kernels

ARMS = {  # name: (quantization of the weights, format of the cache)
    "BF16": (None, "bf16"),
    "INT8 W8A8": ("int8", "bf16"),
    "FP8": ("fp8", "bf16"),
    "FP8 + FP8 KV": ("fp8", "fp8"),
}
ROWS = ((1, 1024), (16, 1024), (64, 1024), (16, 16384), (64, 8192))
ARTICLE = {"batch": 16, "latency": -0.368, "tokens/s": 0.587, "memory": -0.50}  # FP8 over BF16, as printed
PATIENCE = 30.0  # seconds that a process has to end in once its time is over
COMPILING = 0.35  # of all seconds, at most, before anything is measured


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


# --------------------------------------------------------------------------- one arm


def sheet_here() -> Datasheet:
    """The data sheet of this GPU; an H200's where there is none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((sheet for key, sheet in SHEETS.items() if key in name), SHEETS["H200"])


def floor_seconds(sizes: Architecture, arm: str, row: Row, sheet: Datasheet) -> float:
    """The least seconds of a step, in the middle of the answer."""
    kind, token = weights_of(arm), cache_token_bytes(sizes, ARMS[arm][1])
    return decode_seconds(sizes, kind, token, row.batch, row.context, sheet)


def weights_of(arm: str) -> str:
    """Weights as `fp8 estimate` calls them; INT8's take the bytes and the time of FP8's."""
    return "fp8" if ARMS[arm][0] else "bf16"


def shares(sizes: Architecture, arm: str, row: Row, got: Mapping[str, Any]) -> dict[str, float]:
    """The floors of a row, and the shares of them that were reached."""
    sheet = sheet_here()
    floor = floor_seconds(sizes, arm, row, sheet)
    prefill = row.batch * prompt_floor(sizes, weights_of(arm), row.prompt, sheet)
    return {
        "floor": floor, "share": floor / got["itl"]["p50"],
        "prefill_floor": prefill, "prefill_share": prefill / got["prefill_seconds"],
    }  # fmt: skip


def arm_figures(arm: str, model: str, rows: Sequence[Row], device: str, until: float) -> Iterator[dict[str, Any]]:
    """Bytes of an arm's weights, then each row as it is measured, or why one has no figures."""
    quantization, cache = ARMS[arm]
    served = random_model(config_of(model), device=device, quantization=quantization)
    yield {"weight_bytes": served.nbytes, "matrix_bytes": matrix_bytes(served)}
    for row in rows:
        release()
        got = row_figures(served, row, cache, until)
        if served.embedding.is_cuda and "itl" in got:
            got |= shares(architecture(model), arm, row, got)
        print(line(arm, row, got), flush=True)
        yield {"rows": {row.name: got}}


def row_figures(served: ServedModel, row: Row, cache: str, until: float) -> dict[str, Any]:
    """A row's figures, or `why_not`."""
    try:
        if time.monotonic() > until:
            raise LateError
        return run_row(served, row, cache, until)
    except LateError:
        return {"why_not": "skipped: no time is left (--seconds)"}
    except (torch.OutOfMemoryError, ConfigError) as error:
        return {"why_not": str(error).splitlines()[0]}
    except Exception as error:  # noqa: BLE001 - a kernel that fails costs its row, and is told
        traceback.print_exc()
        return {"why_not": f"{type(error).__name__}: {error}"[:300]}


def matrix_bytes(model: ServedModel) -> int:
    """Bytes of what is quantized: the linear layers of the blocks."""
    held = {t.data_ptr(): t.nbytes for layer in model.layers for t in layer.buffers() if t.dim() == 2}
    return sum(held.values())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --------------------------------------------------------------------------- every arm


class Budget:
    """Seconds, in equal parts for those who are still to come: what one leaves, the others get."""

    def __init__(self, seconds: float, users: int) -> None:
        self.end, self.users = time.monotonic() + seconds, users

    def next(self) -> float:
        """Until when (`time.monotonic`) the next one may go on."""
        now = time.monotonic()
        self.users -= 1
        return now + max(0.0, self.end - now) / (self.users + 1)


def run_arm(
    arm: str, model: str, rows: Sequence[Row], device: str, until: float, note: Callable[[], Any], into: dict[str, Any]
) -> None:
    """Measure an arm into a dictionary; `note` is called whenever there is more in it."""
    into["rows"] = {}
    work = arm, model, rows, device, until
    try:
        for part in apart(arm_figures, *work, until=until + PATIENCE) if device != "cpu" else arm_figures(*work):
            into["rows"] |= part.pop("rows", {})
            into |= part
            note()
    except BackendError as error:
        print(f"{arm}: {error}", flush=True)
        into["rows"] = {row.name: {"why_not": str(error)} for row in rows} | into["rows"]
        note()


def compile_kernels(arm: str, model: str, rows: Sequence[Row], device: str) -> Iterator[str]:
    """Make every kernel of an arm, by a few steps of each row through two layers (the last one computes fewer rows than
    the others); they are found on the disk later."""
    quantization, cache = ARMS[arm]
    served = random_model(config_of(model) | {"num_hidden_layers": 2}, device=device, quantization=quantization)
    for row in rows:
        measure(engine_for(served, row, cache), Row(row.batch, min(row.prompt, 64), 4))
        release()
        yield row.name


def prepare(arms: Sequence[str], model: str, rows: Sequence[Row], device: str, until: float) -> None:
    """`compile_kernels` of all arms at once. What fails here fails again where it is measured, and is told there."""

    def one(arm: str) -> None:
        with contextlib.suppress(BackendError):
            list(apart(compile_kernels, arm, model, rows, device, until=until))

    begun = time.monotonic()
    with ThreadPoolExecutor(len(arms)) as pool:
        list(pool.map(one, arms))
    print(f"kernels compiled, all arms at once: {time.monotonic() - begun:.0f} s", flush=True)


def step_kernels(model: str, rows: Sequence[Row], device: str) -> Iterator[dict[str, Any]]:
    """The kernels of one decode step of each row, FP8 + FP8 KV: name, microseconds in all, how often."""
    quantization, cache = ARMS["FP8 + FP8 KV"]
    served = random_model(config_of(model), device=device, quantization=quantization)
    for row in rows:
        release()
        engine, clock = engine_for(served, row, cache), Clock(row)
        for request in requests(row, engine.model.config.vocab_size):
            engine.add(request)
        while not clock.waiting:
            clock.tick(engine.step())
        yield {row.name: kernels(engine.step)}
        for i in range(row.batch):
            engine.abort(str(i))


def tell_kernels(model: str, rows: Sequence[Row], device: str, until: float) -> dict[str, Any]:
    """`step_kernels`, printed."""
    found: dict[str, Any] = {}
    try:
        for part in apart(step_kernels, model, rows, device, until=until + PATIENCE):
            found |= part
            for name, told in part.items():
                print(f"\n{name}, FP8 + FP8 KV: {sum(us for _, us, _ in told):,.1f} us of kernels in one step")
                print("\n".join(f"  {us:9.1f} us {count:5} x  {kernel[:90]}" for kernel, us, count in told[:25]))
    except BackendError as error:
        print(f"kernels: {error}", flush=True)
    return found


# --------------------------------------------------------------------------- the table


def line(arm: str, row: Row, got: Mapping[str, Any]) -> str:
    """A row of the table: milliseconds, but for the columns that say seconds."""
    start = f"{arm:20}{row.name:>11}"
    if "why_not" in got:
        return f"{start}  {got['why_not'].splitlines()[0][:120]}"
    itl = got["itl"]
    cells = [
        cell(1e3 * itl["p50"], "9.2f"), cell(1e3 * itl["p99"], "9.2f"),
        *(cell(got.get(name) and 1e3 * got[name], "8.2f") for name in ("device", "host", "floor")),
        cell(got.get("share"), "7.0%"), cell(got["tokens_per_second"], "10,.0f"), cell(got["ttft"]["p50"], "8.3f"),
        cell(got["prefill_seconds"], "11.3f"), cell(got.get("prefill_share"), "7.0%"), cell(got["e2e"]["p50"], "8.2f"),
        cell(got.get("joules_per_token"), "9.4f"), f"  {got['compiled']} compiled" if got.get("compiled") else "",
    ]  # fmt: skip
    return start + "".join(cells)


def cell(value: float | None, form: str) -> str:
    """A figure, or as many spaces."""
    return f"{value:{form}}" if value is not None else " " * int(form.partition(".")[0].rstrip(",") or 0)


HEAD = (
    f"{'arm':20}{'row':>11}{'itl ms':>9}{'p99':>9}{'gpu':>8}{'host':>8}{'floor':>8}{'share':>7}{'tokens/s':>10}"
    f"{'ttft s':>8}{'prefill s':>11}{'share':>7}{'e2e s':>8}{'J/token':>9}"
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
    options = options_of(arguments)
    rows = [row_of(text, options.tokens) for text in options.rows]
    kernel_rows = [row_of(text, options.tokens) for text in options.kernels]
    config, names = config_of(options.model), list(dict.fromkeys(["BF16", *options.arms]))
    sheet, arms = sheet_here(), {}
    results = {"model": options.model, "tokens": options.tokens, "article": ARTICLE, "arms": arms,
               "floors": {"gpu": sheet.name, "bytes_per_second": sheet.read}}  # fmt: skip
    note = lambda: save(options.out, "serve", results)  # noqa: E731
    budget = Budget(options.seconds, len(names) + bool(kernel_rows))
    print(json.dumps(machine()), HEAD, sep="\n", flush=True)
    try:
        if options.device != "cpu":
            prepare(names, options.model, rows, options.device, time.monotonic() + COMPILING * options.seconds)
        for arm in names:
            run_arm(arm, options.model, rows, options.device, budget.next(), note, arms.setdefault(arm, {}))
        arms |= serve_peers.run(options.peers, config, rows, options.device)
        print("\n".join(article(arms, rows)))
        if kernel_rows:
            results["kernels"] = tell_kernels(options.model, kernel_rows, options.device, budget.next())
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {note()}")
        raise SystemExit(130) from None
    print(f"written: {note()}")
    plot(results, Path(options.out) / "serve.png")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        "fp8 bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="bench/results", help="folder for serve.json and serve.png")
    parser.add_argument("--model", default="llama-3-8b", help="a name of fp8 plan, or a config.json")
    parser.add_argument("--rows", nargs="+", default=[f"{b}x{p}" for b, p in ROWS], help="batch x prompt, as 16x1024")
    parser.add_argument("--tokens", type=int, default=128, help="steps that have every sequence of a row")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all arms; what is left then is skipped")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="ROW", help="rows whose step is told by kernel")
    parser.add_argument("--peers", nargs="*", default=None, help="which peers; all that are installed without a name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


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
