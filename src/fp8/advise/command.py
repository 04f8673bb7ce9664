"""`fp8 plan`, `fp8 profile` and `fp8 estimate`: flags to the public functions, and their answers to the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

TOKENS = typer.Option("--tokens", "-t", help="Tokens of one step on one GPU.")
SEQUENCE = typer.Option("--sequence", "-s", help="Tokens of a sequence; else 8192, or all.")
RECIPE = typer.Option("--recipe", "-r", help="tensorwise, delayed, rowwise, blockwise, or a recipe's JSON file.")
AS_JSON = typer.Option("--json", help="Print data instead of a table.")


def plan_command(
    model: Annotated[str, typer.Argument(help="A name, a config.json or its folder, or a run of fp8 train.")],
    tokens: Annotated[int, TOKENS] = 16384,
    sequence: Annotated[int | None, SEQUENCE] = None,
    recipe: Annotated[str, RECIPE] = "tensorwise",
    gpu: Annotated[str, typer.Option(help="H200 or H100.")] = "H200",
    gpus: Annotated[int, typer.Option(help="How many share the training.")] = 1,
    total_tokens: Annotated[float | None, typer.Option(help="Of the whole training, as in 1e12: gives days.")] = None,
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour: with --total-tokens gives cost.")] = None,
    fused: Annotated[bool, typer.Option("--fused", help="fp8.TransformerLayer, whose producers emit codes.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="The step in a CUDA graph.")] = False,
    head: Annotated[bool, typer.Option("--head", help="Also the output head in FP8.")] = False,
    state: Annotated[str, typer.Option(help="Type of parameters, gradients and moments: fp32 or bf16.")] = "fp32",
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Predict what FP8 would bring to a training: layers, step time, memory, days, cost, and a verdict. Needs no GPU.

    [bold]Examples[/]

    [cyan]fp8 plan llama-3-8b --gpus 8[/]  16384 tokens a step on each of 8 H200s

    [cyan]fp8 plan llama-3.2-1b --tokens 16384 --gpus 8 --total-tokens 1e12 --price 3.50[/]  days and cost

    [cyan]fp8 plan path/to/config.json --recipe blockwise --json[/]  a Hugging Face model, as data
    """
    from ..train.config import read_recipe
    from .plan import check, plan
    from .table import draw_plan

    rule = read_recipe(recipe)
    found = plan(
        model, tokens, sequence=sequence, recipe=rule or recipe, gpu=gpu, gpus=gpus, total_tokens=total_tokens,
        price=price, fused=fused, eager=eager, graph=graph, head=head, state=state,
    )  # fmt: skip
    _show(found.to_dict() if as_json else draw_plan(found), as_json)
    check(found)


def profile_command(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION; the function is the step, or returns it.")],
    warmup: Annotated[int, typer.Option(help="Steps before; compiling happens in them.")] = 3,
    steps: Annotated[int, typer.Option("--steps", "-n", help="Steps that are recorded.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report as JSON.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace (chrome://tracing, Perfetto).")] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Record a training step of yours: where its time goes, what makes it wait, and the way out.

    [bold]Examples[/]

    [cyan]fp8 profile train.py:step[/]  train.py is imported, step() is one training step

    [cyan]fp8 profile train.py:build --out profile.json --trace trace.json[/]  build() returns the step
    """
    from .profile import profile
    from .profile_table import draw_profile
    from .script import load_step

    found = profile(load_step(target), warmup=warmup, steps=steps, trace=trace)
    if out is not None:
        found.save(out)
    _show(found.to_dict() if as_json else draw_profile(found), as_json)


def estimate_command(
    model: Annotated[str, typer.Argument(help="A name, a config.json or its folder, or a run of fp8 train.")],
    gpu: Annotated[list[str] | None, typer.Option(help="A100, H100, H200, B200, MI300X, MI355X, or all.")] = None,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens that each sequence holds.")] = 8192,
    batch: Annotated[int | None, typer.Option("--batch", "-b", help="Sequences at a time; else what fits.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt; else those of --context.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars of one GPU for an hour.")] = None,
    share: Annotated[float, typer.Option(help="Of the floor's speed that is reached; fp8 bench serve tells.")] = 1.0,
    memory_fraction: Annotated[float, typer.Option(help="Of the GPU's memory that the server takes.")] = 0.9,
    max_running: Annotated[int, typer.Option(help="Most sequences at a time.")] = 256,
    static_scales: Annotated[bool, typer.Option("--static-scales", help="The file has the cache's scales.")] = False,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Estimate serving a model: memory, users, ms a token, prompts, dollars, in BF16 and FP8. Needs no GPU.

    [bold]Examples[/]

    [cyan]fp8 estimate llama-3-8b --gpu H200 --price 3.50[/]  one GPU in full

    [cyan]fp8 estimate llama-3-70b --gpu all --context 4096[/]  the GPUs side by side
    """
    from ..cost.datasheets import SHEETS
    from .estimate import estimate
    from .estimate_table import draw_estimate, draw_estimates

    names = gpu or ["H200"]
    names = list(SHEETS) if [name.lower() for name in names] == ["all"] else names
    found = [
        estimate(
            model, name, context=context, batch=batch, prompt=prompt, price=price, share=share,
            memory_fraction=memory_fraction, max_running=max_running, static_scales=static_scales,
        )
        for name in names
    ]  # fmt: skip
    if as_json:
        _show([one.to_dict() for one in found] if len(found) > 1 else found[0].to_dict(), as_json)
    else:
        _show(draw_estimate(found[0]) if len(found) == 1 else draw_estimates(found), as_json)


def _show(what: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(what, indent=2, allow_nan=False))
        return
    screen = Console(highlight=False)
    (screen if screen.is_terminal else Console(highlight=False, width=160)).print(what)
