"""`fp8 train`: its flags are the settings of `TrainConfig`, one flag a setting, with the help written there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .config import TrainConfig
from .loop import Result, train

KEYWORD = inspect.Parameter.KEYWORD_ONLY
SHORT = {"steps": "-n", "out": "-o", "recipe": "-r"}


def run_command(config: Path | None, resume: bool, overwrite: bool, **flags: Any) -> None:
    """Train a small Llama-family decoder on a text, in FP8 or in high precision, and show how it goes.

    [bold]Examples[/]

    [cyan]fp8 train --steps 200[/]  on Moby-Dick, recipe tensorwise

    [cyan]fp8 train settings.toml --recipe delayed --lr 0.0005[/]  a file of settings; flags win

    [cyan]fp8 train --text book.txt --recipe none --out runs/bf16[/]  high precision, to compare with

    [cyan]fp8 train settings.toml --resume[/]  on from the newest checkpoint, bit for bit
    """
    settings = settings_of(config, {name: value for name, value in flags.items() if value not in (None, [])})
    console = Console(highlight=False)
    result = train(settings, resume=resume, overwrite=overwrite, console=console)
    console.print(summary(result), highlight=False, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(130)


def settings_of(config: Path | None, flags: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_toml(config, **flags) if config else TrainConfig.from_dict(flags)


def summary(result: Result) -> str:
    """The last lines: how the run ended, and where everything is."""
    if result.interrupted:
        return f"stopped after step {result.step}, saved {result.checkpoint}. The same command with --resume goes on."
    return (
        f"validation loss {result.validation_loss:.4f}, perplexity {result.perplexity:.2f} after {result.step} steps "
        f"({result.tokens_per_second:,.0f} tokens/s)\ncheckpoint {result.checkpoint}\nmetrics    {result.metrics}"
    )


def command() -> Callable[..., None]:
    """The function that typer registers: `run_command` with a flag for each setting in its signature."""
    fixed = [
        inspect.Parameter("config", KEYWORD, default=None, annotation=CONFIG),
        inspect.Parameter("resume", KEYWORD, default=False, annotation=RESUME),
        inspect.Parameter("overwrite", KEYWORD, default=False, annotation=OVERWRITE),
    ]
    parameters = fixed + [flag(one) for one in dataclasses.fields(TrainConfig)]

    def run(**given: Any) -> None:
        run_command(**given)

    run.__name__, run.__doc__ = "train", run_command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def flag(one: dataclasses.Field[Any]) -> inspect.Parameter:
    """The flag of one setting; left out, it is None, and the file's value or the default counts."""
    name, kind, about = one.name, one.metadata["kind"], one.metadata["about"]
    names = [f"--{name.replace('_', '-')}", *([SHORT[name]] if name in SHORT else [])]
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    told = "" if one.default in (None, "", ()) else f" [{one.default}]"
    option = typer.Option(*names, help=about + told.replace("[", r"\["), show_default=False)
    python = list[str] if kind is tuple else str if name in ("loss_scale", "recipe") else kind
    default: Any = [] if kind is tuple else None
    return inspect.Parameter(name, KEYWORD, default=default, annotation=Annotated[python | None, option])


CONFIG = Annotated[Path | None, typer.Argument(help="A TOML file of settings.", show_default=False)]
RESUME = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint under --out.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Delete the run that --out holds, and start.")]
