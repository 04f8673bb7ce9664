"""`fp8 eval`: its flags, and the table that it ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..train.text import text_path
from .intervals import Estimate
from .judge import Judgement, StoppedError, judge, variants
from .lm_harness import LmEvalMeasurement
from .measurement import Measurement, TaskMeasurement, TextMeasurement
from .measures import PERPLEXITY, UNITS, Figure
from .subject import ModelSpec
from .tasks import load_task
from .verdict import LIMIT, UNINFORMATIVE, WITHIN


def command(
    models: Annotated[list[Path], typer.Argument(help="Folders: Hugging Face models, or checkpoints of fp8.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to take the perplexity of, or moby-dick; may be repeated.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="lambada, mmlu, mmlu-options, gsm8k, stsb, or FILE.jsonl of your own; with commas.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="The folder with the tasks' public files.")] = None,
    lm_eval: Annotated[str, typer.Option(help="Tasks of the package lm-eval, whose data are on disk.")] = "",
    against: Annotated[Path | None, typer.Option(help="The base; else the first model.")] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Also the base as: dynamic, block, weight-only, int8, a preset or a recipe's .json."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also the base in INT8 W8A8.")] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="KV cache of all but the base: fp8, e5m2, bf16, stored or scale-1; else as the file says."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that a window reads.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between two windows; else half a window.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N windows, and N items of each task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a question of mmlu or gsm8k; else 5.")] = None,
    bos: Annotated[
        str | None, typer.Option(help="A begin-of-text token, as '<s>', before each window or item.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows, or items, at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; auto: fp32 on a CPU, bf16 on a GPU.")] = "auto",
    engine: Annotated[str, typer.Option(help="fp8 (our decoder), transformers; auto: fp8 where it can.")] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="'bytes', a tokenizer.json or its folder; else the model's.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Points (or percent of perplexity) that may be lost.")] = LIMIT,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print figures and every item's outcome as data; the table goes to stderr.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for partial results.")] = Path("runs/eval"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what is in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Judge models side by side on texts and tasks: what each loses, with its paired interval, and a verdict.

    Works offline on files that you have. After Ctrl-C the same command goes on where it stopped.

    [bold]Examples[/]

    [cyan]fp8 eval runs/demo/fp8 --text moby-dick --window 128 --limit 50[/]  what `fp8 demo` exported

    [cyan]fp8 eval smollm2 --text wiki.test.raw --scheme dynamic --int8[/]  FP8 and INT8 before anything is exported

    [cyan]fp8 eval smollm2-fp8 --against smollm2 --tasks lambada,mmlu --data evals --json > out.json[/]  as data too

    [cyan]fp8 eval smollm2 --kv-cache fp8 --tasks mine.jsonl[/]  the cache alone, on a task of your own

    KV caches: fp8 and e5m2 measure a scale a token and head; stored goes by the scales in the file, which is what a
    checkpoint that has some is judged by; scale-1 goes without, as servers do where a file has none.
    """
    if named := next((path for path in models if path.suffix == ".json"), None):
        raise ConfigError(f"{named} is no model; --json is a flag: fp8 eval ... --json > {named}.")
    base = against or models[0]
    folders = [base, *(folder for folder in models if folder.resolve() != base.resolve())]
    specs = [
        ModelSpec(folder, "none", kv_cache if i else None, dtype, engine, device, tokenizer)
        for i, folder in enumerate(folders)
    ]
    schemes = [*(scheme or ()), *(["int8"] if int8 else ())]
    if kv_cache is not None and len(specs) == 1 and not schemes:
        schemes = ["none"]  # the cache alone
    specs += variants(specs[0], schemes, kv_cache)
    if (limit is not None and limit < 1) or batch < 1:
        raise ConfigError(f"limit and batch must be at least 1, not {limit} and {batch}.")
    stride = max(window // 2, 1) if stride is None else stride
    asked = [load_task(name, data, shots=shots, limit=limit) for name in words(tasks)]
    texts = [text_path(str(path)) for path in text or ()]
    measurements: list[Measurement] = [TextMeasurement(path, window, stride, limit, batch, bos) for path in texts]
    measurements += [TaskMeasurement(task, batch, bos) for task in asked]
    measurements += [LmEvalMeasurement(name, limit, shots, batch) for name in words(lm_eval)]
    console = Console(highlight=False, stderr=as_json)
    console = console if console.is_terminal else Console(highlight=False, width=160, stderr=as_json)
    try:
        told = judge(specs, measurements, out=out, fresh=fresh, limit=tolerance, console=console)
    except StoppedError as stopped:
        typer.echo(str(stopped))
        raise typer.Exit(130) from None
    console.print(drawing(told))
    for name, about in told.about.items():
        console.print(f"{name}: {about}", markup=False)
    console.print(legend(told.limit))
    if as_json:
        typer.echo(json.dumps(told.to_dict(), indent=1, allow_nan=False))


def words(listed: str) -> list[str]:
    """Names with commas between them.

    >>> words("lambada, mine.jsonl")
    ['lambada', 'mine.jsonl']
    """
    return [word.strip() for word in listed.split(",") if word.strip()]


def drawing(told: Judgement) -> Table:
    """The table: a row for each measure of each model."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("measured", "model", "items", "value", "95 % interval", "loss", "95 % interval", "verdict"):
        out.add_column(column, justify="left" if column in ("measured", "model", "verdict") else "right")
    count = len(told.models)
    for start in range(0, len(told.outcomes), count):
        group = told.outcomes[start : start + count]
        for i, figure in enumerate(group[0].figures):
            for outcome in group:
                first = outcome is group[0]
                title = f"{outcome.measurement}, {figure.measure}" if first else ""
                out.add_row(title, outcome.model.name, *cells(outcome.figures[i]), end_section=outcome is group[-1])
    return out


def cells(figure: Figure) -> Sequence[str]:
    """What a row says of one figure."""
    value = figure.value
    digits = 3 if figure.measure == PERPLEXITY else 2
    told = [str(value.units), f"{value.value:.{digits}f}", ends(value, digits)]
    if figure.loss is None:
        return [*told, "", "", "base"]
    unit = "%" if UNITS[figure.measure] == "%" else ""
    return [*told, f"{figure.loss.value:+.2f}{unit}", ends(figure.loss, 2, "+"), coloured(figure.verdict or "")]


def ends(estimate: Estimate, digits: int, sign: str = "") -> str:
    if not math.isfinite(estimate.high - estimate.low):
        return "unknown"
    return f"{estimate.low:{sign}.{digits}f} to {estimate.high:{sign}.{digits}f}"


def coloured(word: str) -> str:
    colour = {WITHIN: "green", UNINFORMATIVE: "dim"}.get(word, "yellow" if word != "worse" else "red")
    return f"[{colour}]{word}[/]"


def legend(limit: float) -> str:
    return (
        f"[dim]loss: percent of perplexity, or points; positive is worse. within: the whole interval at or below "
        f"{limit:g}; worse: above it; uninformative: the base is within five standard errors of chance.[/]"
    )
