"""`python -m fp8.bench.quality`: what each study is given, and where it goes."""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ...errors import DataError
from ...serve.models import load_model
from ...train.tokenizer import tokenizer_of
from ..machine import save
from . import tables
from .agreement import agreement
from .caches import KINDS
from .chunks import PAGE
from .long_keys import SINK, long_keys
from .needles import decoder
from .perplexity import perplexity
from .retrieval import retrieval
from .teaching import Lessons, teach

CALIBRATED = 1 << 15  # tokens, in texts as long as those judged: the mean of a key depends on its position


def read(path: Path) -> bytes:
    """A text, unpacked where it ends in .xz. Raises `DataError`."""
    try:
        return lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"cannot read the text {path}: {error}.") from None


def windows(asked: argparse.Namespace, path: Path, count: int, length: int, *, spread: bool = False) -> Tensor:
    """The first `count` windows of a text, or windows `spread` over all of it: tokens [count, length]. Fewer where the
    text is shorter; `DataError` where it has none."""
    raw = read(path)[: 40 * count * length if not spread else None]
    tokens = tokenizer_of(asked.tokenizer or str(asked.model)).encode(raw.decode("utf-8", "ignore")).astype(np.int64)
    fit = len(tokens) // length
    if not fit:
        raise DataError(f"{path} has {len(tokens)} tokens, and a window is {length}: give a longer text.")
    count = min(count, fit)
    first = np.arange(count) * (fit // count if spread else 1) * length
    return torch.from_numpy(np.stack([tokens[i : i + length] for i in first]))


def calibration(asked: argparse.Namespace) -> Tensor:
    count = asked.calibration_texts or max(1, CALIBRATED // asked.window)
    return windows(asked, asked.calibration, count, asked.window)


# --------------------------------------------------------------------------- the studies


def run_agreement(asked: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    prompts = windows(asked, asked.text, asked.prompts, asked.prompt, spread=True)
    load = partial(load_model, asked.model, device=asked.device)
    return agreement(
        lambda weights: load(quantization=weights), prompts.tolist(), asked.tokens, calibration(asked), say=say
    )


def run_perplexity(asked: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    """Targets follow windows without a gap: each window reads one token more, which the next begins with."""
    model = load_model(asked.model, device=asked.device)
    rows = windows(asked, asked.text, asked.windows, asked.window)
    following = torch.cat([rows[1:, :1], rows[:1, :1]])  # the last window has no next one, and is left out
    rows = torch.cat([rows, following], 1)[: max(1, len(rows) - 1)]
    return perplexity(model, rows, calibration(asked), kinds=asked.kinds, chunk=asked.chunk, say=say)


def run_needles(asked: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    """Teach, then ask."""
    text, test = (torch.frombuffer(bytearray(read(p)), dtype=torch.uint8) for p in (asked.text, asked.test))
    lengths = tuple(1 << i for i in range(6, 40) if 1 << i <= asked.longest)
    lessons = Lessons(lengths, asked.step_tokens, updates=asked.updates, cooldown=asked.cooldown, seconds=asked.seconds,
                      lr=asked.lr, seed=asked.seed)  # fmt: skip
    model = decoder(asked.longest, asked.hidden, asked.layers, asked.heads, asked.seed).to(asked.device)
    taught = teach(model, text.to(asked.device), lessons, say)
    asked_at = [length for length in lengths if length >= min(256, asked.longest)]
    found = retrieval(load_model(model, device=asked.device), test.to(asked.device), asked_at, asked.count, say=say)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "config": model.config.to_dict(),
             "updates": taught.updates, "seconds": round(taught.seconds, 1), "reached": taught.reached,
             "log": taught.log}  # fmt: skip
    return {"taught": about, "retrieval": found}


def run_long_keys(asked: argparse.Namespace, say: Callable[[str], Any]) -> dict[str, Any]:
    model = load_model(asked.model, device=asked.device)
    length = min(asked.window, model.config.max_positions) // PAGE * PAGE
    counts = sorted({n for n in (2048, 8192, 32768) if n < asked.keys} | {asked.keys})
    need = 1 + -(-max(0, asked.keys - length) // (length - SINK))
    rows = windows(asked, asked.text, need, length)
    if len(rows) < need:
        raise DataError(f"{asked.keys} keys need {need} windows of {length} tokens; {asked.text} has {len(rows)}.")
    return long_keys(model, rows, calibration(asked), counts, queries=asked.queries, say=say)


STUDIES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., Any]]] = {
    "agreement": (run_agreement, tables.agreement),
    "perplexity": (run_perplexity, tables.perplexity),
    "needles": (run_needles, tables.needles),
    "long-keys": (run_long_keys, tables.long_keys),
}


def parser() -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = argparse.ArgumentParser(prog="python -m fp8.bench.quality", description="what FP8 costs a served model")
    each = out.add_subparsers(dest="study", required=True)
    studies = {name: each.add_parser(name) for name in STUDIES}
    for name, one in studies.items():
        one.add_argument("--text", type=Path, required=True, help="a text file, or .xz")
        one.add_argument("--out", type=Path, default=Path("bench/results"))
        one.add_argument("--name", default=f"quality-{name}", help="of the JSON file")
        one.add_argument("--device", default=device)
        if name == "needles":
            continue
        one.add_argument("--model", type=Path, required=True, help="folder of a model with its tokenizer.json")
        one.add_argument("--calibration", type=Path, required=True, help="another text, for offsets and static scales")
        one.add_argument("--tokenizer", help="bytes, or a tokenizer.json, instead of the model's")
        one.add_argument("--calibration-texts", type=int, help="default: 32,768 tokens in all")
        one.add_argument("--window", type=int, default={"long-keys": 8192, "agreement": 512}.get(name, 1024))
    whole(studies["agreement"], prompts=192, prompt=256, tokens=128)
    whole(studies["perplexity"], windows=1 << 20, chunk=512)
    studies["perplexity"].add_argument("--kinds", nargs="+", default=list(KINDS), choices=[*KINDS], metavar="KIND")
    whole(studies["long-keys"], keys=131072, queries=8)
    one = studies["needles"]
    one.add_argument("--test", type=Path, required=True, help="the text between the needles that are asked for")
    whole(one, longest=4096, count=400, step_tokens=1 << 15, updates=8000, cooldown=600, hidden=256, layers=4, heads=4,
          seed=0)  # fmt: skip
    one.add_argument("--seconds", type=float, default=75.0, help="after which the lessons come to their end")
    one.add_argument("--lr", type=float, default=1e-3)
    return out


def whole(one: argparse.ArgumentParser, **defaults: int) -> None:
    """Options that are whole numbers."""
    for name, value in defaults.items():
        one.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study: a table on screen, `<out>/<name>.json` on disk."""
    asked = parser().parse_args(arguments)
    console = Console(highlight=False, width=200)
    run, draw = STUDIES[asked.study]
    told = run(asked, lambda line: console.print(line, style="dim"))
    given = {name: value for name, value in vars(asked).items() if name not in ("out", "study", "name")}
    options = {name: value.name if isinstance(value, Path) else value for name, value in given.items()}
    path = save(asked.out, asked.name, {"options": options, **told})
    console.print(draw(told))
    console.print(f"{path} has every number.")
