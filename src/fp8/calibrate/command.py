"""`fp8 quantize` and `fp8 verify`: the commands that need text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..errors import ConfigError
from .compensate import DAMPING
from .flags import HEAD, OUT, SCALES, SCHEME, SKIP, TOKENIZER

UNLIKE = (
    "[yellow]note:[/] --compensate chooses codes by a text, and Moby-Dick is like few that are served; on text of "
    "another kind such codes can be worse than the nearest. Give text like yours by --calibrate FILE."
)
RUN_RECIPES = {"dynamic": "rowwise", "block": "blockwise"}


def quantize_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors, or a run of `fp8 train`.")],
    out: OUT,
    scheme: SCHEME = "dynamic",
    skip: SKIP = None,
    head: HEAD = False,
    kv_cache: Annotated[
        bool | None, typer.Option("--kv-cache/--no-kv-cache", help="Calibrated scales of the KV cache, by head.")
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="A text, or JSON lines with a field 'text'; else Moby-Dick.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of text to calibrate on; every eighth is held out.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    observer: Annotated[
        str, typer.Option(help="max, percentile, mse, kl, or auto: whichever errs least on held-out text.")
    ] = "max",
    percentile: Annotated[float, typer.Option(help="For the observer percentile.")] = 99.99,
    budget: Annotated[
        str | None, typer.Option(help="The rise of perplexity that is allowed, as 0.5%: layers stay BF16 for it.")
    ] = None,
    budget_samples: Annotated[int, typer.Option(help="Rows of text that decide for --budget; as many check.")] = 8,
    tokenizer: TOKENIZER = None,
    scales: SCALES = "power_of_two",
    outliers: Annotated[
        str, typer.Option(help="none, rotate, smooth, both, or auto: what helps on held-out text, if anything.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the rotation's signs.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of what stays: auto (FP32 becomes BF16), bfloat16, float16, float32.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where text is run and weights are rounded: auto, cpu, cuda or cuda:N.")
    ] = "cpu",
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Round so that errors make up for each other on the text (GPTQ).")
    ] = False,
    damping: Annotated[float, typer.Option(help="For --compensate: how little the text is trusted.")] = DAMPING,
) -> None:
    """Write the FP8 checkpoint of a model, which vLLM, SGLang and transformers load.

    Weights pass one tensor at a time; after Ctrl-C the same command goes on. What a run of `fp8 train` learned
    in FP8 is written with its own codes.

    [bold]Examples[/]

    [cyan]fp8 quantize models/SmolLM2 out[/]  per-channel weights, per-token activations, a calibrated KV cache

    [cyan]fp8 quantize models/SmolLM2 out --scheme static --calibrate chats.jsonl[/]  calibrated activations

    [cyan]fp8 quantize models/SmolLM2 out --compensate --calibrate chats.jsonl[/]  codes chosen by what the text needs

    [cyan]fp8 quantize models/SmolLM2 out --skip '*.down_proj' --no-kv-cache[/]

    [cyan]fp8 quantize models/SmolLM2 out --budget 0.5%[/]  what costs most stays, until perplexity rises by less

    [cyan]fp8 quantize models/SmolLM2 out --outliers auto[/]  rotated or smoothed first, where that helps
    """
    from ..checkpoint.quantize import Options
    from ..train.finished import is_run
    from .budget import parse_budget

    options = Options(scheme, tuple(skip or ()), head, scales, dtype)
    if is_run(model):
        if kv_cache or calibrate or budget or compensate or outliers != "none" or options != Options(scheme):
            raise ConfigError(
                f"{model} is a run of `fp8 train` and is written as it was trained: --skip, --head, --kv-cache, "
                "--calibrate, --budget, --compensate, --outliers, --scales and --dtype are for Hugging Face models."
            )
        typer.echo(export_run(model, out, options))
        return
    given: dict[str, Any] = {
        "texts": tuple(calibrate or ("moby-dick",)), "samples": samples, "length": length, "observer": observer,
        "percentile": percentile, "tokenizer": tokenizer, "device": device,
        "scales": "none" if scales == "none" else "power_of_two",
    }  # fmt: skip
    try:
        if compensate and budget is not None:
            raise ConfigError(
                "--budget measures layers that are rounded to nearest, and --compensate rounds otherwise: choose one, "
                "or name with --skip what a run with --budget kept."
            )
        room = None if budget is None else (parse_budget(budget), budget_samples)
        console = Console(highlight=False, stderr=True)
        if compensate and not calibrate:
            console.print(UNLIKE, soft_wrap=True)
        steps = Steps(room, outliers, seed, damping if compensate else None)
        written = quantize(model, out, options, kv_cache, given, console, steps)
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was written is kept in {out}.partial, and the same command goes on.", err=True)
        raise typer.Exit(130) from None
    Console(highlight=False, soft_wrap=True).print(told(written))


@dataclass(frozen=True)
class Steps:
    """What is done beyond rounding: `room` is a budget in percent and its rows; `damping` comes with compensation."""

    room: tuple[float, int] | None = None
    outliers: str = "none"
    seed: int = 0
    damping: float | None = None


def quantize(
    model: Path, out: Path, options: Any, kv_cache: bool | None, given: dict[str, Any], console: Console,
    steps: Steps | None = None,
) -> Any:  # fmt: skip
    """`quantize_folder` with what it needs of calibration, and progress on a console."""
    from ..checkpoint.quantize import quantize_folder
    from ..checkpoint.source import Source
    from ..train.loop import device_of
    from .budget import Budget
    from .calibration import Calibration
    from .remedies import Remedies
    from .sequential import Compensation

    steps, remedy = steps or Steps(), None
    if steps.outliers != "none":
        remedy = Remedies(steps.outliers, options, Calibration(**given), steps.seed)
    static = options.layout.inputs == "static"
    if kv_cache is None:
        kv_cache = generates(Source.open(model))
    with bars(console) as (text, groups, blocks, bytes_):
        calibration = Calibration(**given, kv=kv_cache, inputs=static, progress=text) if kv_cache or static else None
        own = {name: given[name] for name in ("texts", "length", "tokenizer", "device")}
        budget = compensation = None
        if steps.room:
            budget = Budget(steps.room[0], samples=steps.room[1], **own, progress=groups)
        if steps.damping is not None:
            more = {"samples": given["samples"], "damping": steps.damping}
            compensation = Compensation(**own, **more, progress=blocks)
        asked = {"remedy": remedy, "choose": budget, "compensate": compensation}
        return quantize_folder(
            model, out, options, calibration, bytes_, **asked, device=str(device_of(given["device"]))
        )


def generates(source: Any) -> bool:
    """Whether a model has a KV cache."""
    from ..checkpoint.layers import model_class

    return bool(model_class(source.config).can_generate())


@contextmanager
def bars(console: Console) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Bars for rows of text, groups of layers, compensated layers and bytes, which appear when something moves."""
    rows, groups, blocks = (
        Progress(TextColumn(word), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
        for word in ("calibrating", "sensitivity", "compensating")
    )
    size = Progress(TextColumn("writing    "), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console)

    def mover(bar: Progress) -> Any:
        def move(done: int, total: int) -> None:
            if not bar.tasks:
                bar.start()
                bar.add_task("", total=total)
            bar.update(bar.tasks[0].id, completed=done)
            if done == total:
                bar.stop()

        return move

    try:
        yield mover(rows), mover(groups), mover(blocks), mover(size)
    finally:
        for bar in (rows, groups, blocks, size):
            if bar.live.is_started:
                bar.stop()


def told(written: Any) -> str:
    """What was made, what stayed and why, what held-out text says of the scales, and who cannot load it."""
    from ..checkpoint.fp8_folder import Fp8Folder
    from ..checkpoint.readers import readers

    lines = [str(written)]
    reasons: dict[str, list[str]] = {}
    for name, why in written.layers.kept.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        lines.append(
            f"  kept, {why}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        )
    if written.outliers:
        lines.append(told_of_outliers(written.outliers))
    how = written.scales.how
    for kind, seen in how.get("held_out", {}).items():
        mean, worst = (f"{100 * share:.4f} %" for share in (seen["saturated"], seen["worst"]["saturated"]))
        lines.append(
            f"  {kind} scales from {how['tokens']:,} tokens ({how['observer']}); of {how['held_out_tokens']:,} "
            f"held-out tokens they clip {mean}, at worst {worst} in {seen['worst']['module']}; largest magnitude "
            f"there / here: {seen['amax_ratio']:.2f}"
        )
        if won := how.get("observers", {}).get(kind):
            names = ", ".join(f"{name} {count}" for name, count in won["won"].items())
            lines.append(f"    observers: {names}; held-out squared error {won['error_to_max']['auto']:.4f} of max's")
    if made := written.compensation:
        share, worst = made["held_out"]["median"], made["held_out"]["worst"]
        lines.append(
            f"  {made['layers']} layers compensated on {made['tokens']:,} tokens; of {made['held_out_tokens']:,} "
            f"held-out tokens the outputs' squared error is {share:.0%} of plain rounding's in the median, at worst "
            f"{worst['share']:.0%} in {worst['layer']}"
        )
    lines += told_of_budget(written.choice.how)
    refused = [reader for reader in readers(Fp8Folder.open(written.folder)) if reader.verdict == "no"]
    return "\n".join([*lines, *(f"  {reader.name} cannot load it: {reader.reasons[0]}" for reader in refused)])


def told_of_budget(how: Mapping[str, Any]) -> list[str]:
    """What a budget chose, and what its check found."""
    if not how:
        return []
    check, seen = how["held_out"], how["sensitivity"]
    ends = {key: "{:+.2f} to {:+.2f}".format(*check[key]) for key in ("interval", "kl_interval")}
    rise = {key: f"{value:+.2f} %" for key, value in {**how, **check}.items() if key.endswith("percent")}
    lines = [
        f"  budget {how['percent']:g} % of perplexity: {len(how['kept'])} of {len(seen['groups'])} groups stay; "
        f"predicted {rise['predicted_percent']}, with all in FP8 {rise['all_in_fp8_percent']} "
        f"(KL on {seen['tokens']:,} tokens)",
        f"  checked on {check['tokens']:,} other tokens: perplexity {rise['percent']} ({ends['interval']}), "
        f"{check['verdict']}; by KL, which varies less, {rise['kl_percent']} ({ends['kl_interval']}), "
        f"{check['kl_verdict']}",
    ]
    if seen["not_measured"]:
        lines.append(f"  in FP8 and not measured: {len(seen['not_measured'])} experts")
    return lines


def told_of_outliers(told: Any) -> str:
    """What was applied, and what each remedy did to the loss on held-out text."""
    nats = ", ".join(f"{name} {value:.4f}" for name, value in told["nats"].items())
    gains = "; ".join(f"{name} lowers it by {told_of_gain(g)}" for name, g in told["gain"].items())
    untied = "; the head is untied from the embedding" if told["head"] == "untied" else ""
    return (
        f"  outliers: {told['applied']}{untied}\n"
        f"    nats a token on {told['held_out_tokens']:,} held-out tokens: {nats}\n"
        f"    against plain FP8 ('none'), 95 %: {gains}"
    )


def told_of_gain(gain: Any) -> str:
    width = f" +- {gain['half_width']:.4f}" if gain["half_width"] is not None else " (too few rows for an interval)"
    return f"{gain['mean']:.4f}{width}"


def export_run(run: Path, out: Path, options: Any) -> str:
    """The checkpoint of a training run: its own codes, or those of its masters where it was in high precision."""
    from ..checkpoint import save
    from ..nn import convert
    from ..train.finished import trained_decoder

    decoder, config = trained_decoder(run)
    own = config.fp8_recipe is not None
    if own and options.scheme != "dynamic":
        raise ConfigError(
            f"{run} was trained in FP8 and keeps its own codes; scheme={options.scheme!r} would quantize them again."
        )
    if not own:
        if options.scheme not in RUN_RECIPES:
            raise ConfigError(
                f"a run of `fp8 train` is exported as {' or '.join(RUN_RECIPES)}, not {options.scheme!r}."
            )
        convert(decoder, RUN_RECIPES[options.scheme])
    how = "its own codes, not quantized again" if own else "quantized from its FP32 masters"
    return f"{save(decoder, out, config.tokenizer)}; {how}"


# --------------------------------------------------------------------------- verify


def verify_command(
    out: Annotated[Path, typer.Argument(help="An FP8 checkpoint.")],
    against: Annotated[Path, typer.Option(help="What it was made of: a Hugging Face folder, or a run of `fp8 train`.")],
    prompts: Annotated[
        list[str] | None, typer.Option(help="Texts whose logits must be equal; else four of the calibration text.")
    ] = None,
    text: Annotated[str, typer.Option(help="The text for perplexity.")] = "moby-dick",
    tokens: Annotated[int, typer.Option(help="Tokens of it; 0: no perplexity.")] = 512,
    tokenizer: TOKENIZER = None,
    transformers: Annotated[bool, typer.Option(help="Also decode it with transformers.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of a table.")] = False,
) -> None:
    """Prove that a checkpoint is its source, quantized: codes, scales, decoded weights and logits, in bytes.

    Exit code 0: all equal; 1: something differs; 2: it could not be asked.

    [bold]Examples[/]

    [cyan]fp8 verify out --against models/SmolLM2[/]

    [cyan]fp8 verify out --against runs/mine --prompts "Call me" --json[/]
    """
    from ..checkpoint.verify import table, verify
    from ..train.finished import is_run, trained_decoder
    from .text import tokenizer_for

    if is_run(against):
        model, config = trained_decoder(against)
        made = model if config.fp8_recipe else converted(model, out)
        words = tokenizer_for(out, tokenizer or ("bytes" if config.tokenizer == "bytes" else None))
        verdict = verify(out, made, rows_of_prompts(words, prompts))
    else:
        from ..checkpoint.source import Source
        from .remedies import as_written

        words = tokenizer_for(out, tokenizer)
        source = as_written(Source.open(against), out)
        window = text_rows(words, text, tokens, out) if tokens else None
        verdict = verify(out, source, rows_of_prompts(words, prompts), window, transformers)
    if as_json:
        typer.echo(json.dumps(verdict.to_dict(), indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=200)).print(table(verdict.checks))
    if not verdict.passed:
        raise typer.Exit(1)


PROMPTS = (
    "Call me Ishmael. Some years ago", "The capital of France is",
    "def fibonacci(n):\n    if n < 2:", "Once upon a time, in a small village by the sea,",
)  # fmt: skip


def rows_of_prompts(tokenizer: Any, prompts: Sequence[str] | None) -> Tensor:
    """Prompts as rows of equal length [n, T]: each is cut to the shortest."""
    texts = list(prompts or PROMPTS)
    rows = [_encode(tokenizer, text) for text in texts]
    shortest = min(len(row) for row in rows)
    if shortest == 0:
        raise ConfigError("a prompt has no token: give one with text.")
    return torch.tensor([row[:shortest] for row in rows])


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: Any = tokenizer.encode(text)
    return [int(token) for token in ids]


def text_rows(tokenizer: Any, text: str, tokens: int, folder: Path) -> Tensor:
    """The text for perplexity, rows of at most 256 tokens."""
    from ..checkpoint.source import Source
    from .text import read_texts, rows_of

    length = min(256, tokens)
    vocabulary = int(Source.open(folder).config.get("vocab_size") or 1 << 62)
    return rows_of(read_texts([text]), tokenizer, max(tokens // length, 2), length, vocabulary)


def converted(model: Any, out: Path) -> Any:
    """A decoder in high precision with the FP8 layers that its export has."""
    from ..checkpoint.fp8_folder import Fp8Folder
    from ..nn import convert

    blocks = any(scheme.block for scheme in Fp8Folder.open(out).layers.values())
    convert(model, RUN_RECIPES["block" if blocks else "dynamic"])
    return model
