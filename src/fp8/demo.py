"""The demo: one small decoder trained twice on Moby-Dick, in high precision and in FP8, and everything that follows.

    train        both arms, same seed and data; the FP8 arm is probed on the way (scales, saturation, codes)
    write        the FP8 checkpoint, with the codes that the layers multiply by
    read         it again, and evaluate what was read
    generate     text from it, over an FP8 KV cache
    measure      the noise of the gradient, FP8 against high precision at the same weights
    report       one table, `demo.json` with every number, `report.html` with the pictures

Interrupted by Ctrl-C, the same command goes on from the last checkpoint; finished, it starts anew.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import checkpoint
from .errors import ConfigError
from .evaluate.comparison import peak_memory, run_arm, settings, surroundings, unfinished
from .evaluate.gradient_noise import gradient_noise
from .evaluate.perplexity import perplexity, token_loss, validation_loss, validation_rows
from .evaluate.probe import Watch, probe
from .models import Sampling, generate
from .recipe import Recipe
from .report import table
from .report.page import write_json, write_page
from .train import Result, TrainConfig, tokenizer_of
from .train.tokens import batches

ALL = ("tensorwise", "delayed", "rowwise", "blockwise")
PROBES, NOISE_BATCHES = 20, 8
PROMPT, TEMPERATURE, TOP_K = "Call me Ishmael.", 0.7, 40


class StoppedError(Exception):
    """Ctrl-C during a run; its last step is saved."""


@dataclass(frozen=True)
class Demo:
    """What was asked for. `changes` replace settings of the runs, as in `TrainConfig` (tests make them small)."""

    recipes: Sequence[str | Recipe] = ("tensorwise",)
    out: Path = Path("runs/demo")
    seed: int = 0
    device: str = "auto"
    new_tokens: int = 200
    changes: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    def config(self, recipe: str | Recipe | None) -> TrainConfig:
        """The settings of one arm, in a folder of its own."""
        name = "high" if recipe is None else Recipe.of(recipe).name
        return settings(recipe, self.out / "train" / name, device=self.device, seed=self.seed, **self.changes)

    def checkpoint(self, recipe: str | Recipe) -> Path:
        """Where the FP8 checkpoint of a recipe goes."""
        first = Recipe.of(recipe) == Recipe.of(self.recipes[0])
        return self.out / ("fp8" if first else f"fp8-{Recipe.of(recipe).name}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @property
    def command(self) -> str:
        recipes = [Recipe.of(recipe).name for recipe in self.recipes]
        asked = "--all-recipes" if tuple(recipes) == ALL else f"--recipe {recipes[0]}"
        steps = self.changes.get("steps")
        return f"fp8 demo {asked} --seed {self.seed}" + (f" --steps {steps}" if steps else "")


def run(demo: Demo) -> Path:
    """Run the demo and return the path of `demo.json`. Raises `ConfigError` and what training and checkpoints raise."""
    refuse_twins(demo.recipes)
    if (demo.out / "demo.json").exists():
        start_anew(demo.out)
    start, resumed = time.perf_counter(), unfinished(demo.config(None))
    high = high_arm(demo)
    target = fixed_loss(high)
    arms = [told(high, target)] + [fp8_arm(demo, recipe, high, target) for recipe in demo.recipes]
    results = {
        "command": demo.command,
        "machine": surroundings(high.trainer.device),
        "settings": shared_settings(high.config),
        "vocabulary": high.trainer.tokenizer.vocab_size,
        "parameters": sum(p.numel() for p in high.trainer.model.parameters()),
        "target_loss": target,
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": resumed,
        "peak_memory": peak_memory(),
        "arms": arms,
    }
    path = write_json(demo.out / "demo.json", results)
    finish(demo, results)
    return path


def finish(demo: Demo, results: dict[str, Any]) -> None:
    """The report, the table, and where to look next."""
    with demo.console.status("drawing the report"):
        page = write_page(results, demo.out / "report.html")
    demo.console.print(table.drawing(results))
    folder = demo.checkpoint(demo.recipes[0])
    ask = f"--temperature {TEMPERATURE} --top-k {TOP_K} --prompt {shlex.quote('The whale')}"
    demo.say(f"{table.verdict(results)}\n")
    demo.say(f"report       {page}  (scales, codes, every layer; open it in a browser)")
    demo.say(f"numbers      {demo.out / 'demo.json'}")
    demo.say(f"checkpoint   {folder}  (compressed-tensors, float-quantized)")
    demo.say(f"next         fp8 generate {shlex.quote(str(folder))} {ask}")


def refuse_twins(recipes: Sequence[str | Recipe]) -> None:
    names = [Recipe.of(recipe).name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"the demo needs at least one recipe, each once; the names given are {names or 'none'}.")


def start_anew(out: Path) -> None:
    """Remove what a finished demo left; nothing else in the folder."""
    (out / "demo.json").unlink()
    shutil.rmtree(out / "train", ignore_errors=True)


# --------------------------------------------------------------------------- the arms


def high_arm(demo: Demo) -> Result:
    config = demo.config(None)
    demo.say(f"[bold]high precision[/] ({config.precision}): {config.steps} steps of {config.tokens_per_step} tokens")
    return uninterrupted(run_arm(config, console=demo.console))


def fp8_arm(demo: Demo, recipe: str | Recipe, high: Result, target: float) -> dict[str, Any]:
    """Train in FP8 and measure; all that the report tells of one recipe."""
    config = demo.config(recipe)
    demo.say(f"[bold]FP8, {Recipe.of(recipe).name}[/]: the same {config.steps} steps")
    with Watch(Path(config.out) / "probes.jsonl", max(config.steps // PROBES, 1)) as watch:
        result = uninterrupted(run_arm(config, callbacks=[watch], console=demo.console))
    told_of = told(result, target) | {"probes": watch.records()}
    stages = {
        "the products of one step": partial(products, result),
        "the noise of the gradient": partial(noise, result),
        "the FP8 checkpoint: write, read, evaluate": partial(saved, demo, result),
        "text over an FP8 KV cache": partial(written, demo, result),
    }
    for what, measure in stages.items():
        with demo.console.status(what):
            told_of |= measure()
    return told_of


def uninterrupted(result: Result) -> Result:
    if result.interrupted:
        raise StoppedError(f"stopped after step {result.step}; the same command goes on from {result.checkpoint}.")
    return result


def told(result: Result, target: float) -> dict[str, Any]:
    """What is told of either arm."""
    recipe = result.config.fp8_recipe
    return {
        "name": recipe.name if recipe else result.config.precision,
        "recipe": recipe.to_dict() if recipe else None,
        "losses": result.losses,
        "evaluations": [{key: one[key] for key in ("step", "loss", "perplexity")} for one in result.evaluations],
        "validation_loss": result.validation_loss,
        "perplexity": result.perplexity,
        "steps_to_target": result.steps_to(target),
        "tokens_per_second": result.tokens_per_second,
    }


def fixed_loss(high: Result) -> float:
    """The loss to race for: what high precision has come to after three quarters of its steps, in round numbers."""
    window = high.losses[: max(3 * len(high.losses) // 4, 1)][-10:]
    return round(sum(window) / len(window) + 0.005, 2)


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that both arms have in common."""
    return {name: value for name, value in config.to_dict().items() if name not in ("recipe", "out")} | config.sizes


# --------------------------------------------------------------------------- what is measured of an FP8 arm


def micro_batches(result: Result, count: int) -> list[torch.Tensor]:
    """The micro-batches of the steps that would come next."""
    trainer = result.trainer
    return [batches(trainer.tokens.train, trainer.config, trainer.step + i)[0] for i in range(count)]


def products(result: Result) -> dict[str, Any]:
    """The FP8 products of one step, by layer and role; and the conversion's report, with what ran."""
    trainer = result.trainer
    rows = micro_batches(result, 1)[0]
    seen = probe(trainer.model, lambda: token_loss(trainer.model, rows, trainer.config.precision))
    report = trainer.report.trace(trainer.model, rows[:1, :-1].to(trainer.device))
    return {"products": dict(seen.products), "conversion": report.to_dict()}


def noise(result: Result) -> dict[str, Any]:
    model, precision = result.trainer.model, result.config.precision
    rows = micro_batches(result, NOISE_BATCHES)
    return {"gradient": gradient_noise(model, lambda r: token_loss(model, r, precision), rows).to_dict()}


def saved(demo: Demo, result: Result) -> dict[str, Any]:
    """Write the checkpoint, read it, and evaluate what was read on the rows that the run validated on."""
    recipe = result.config.fp8_recipe
    assert recipe is not None
    kept = checkpoint.save(result.trainer.model, demo.checkpoint(recipe), result.trainer.tokenizer, overwrite=True)  # type: ignore[arg-type]
    model = checkpoint.load(kept.folder, result.trainer.device)
    loss = validation_loss(model, validation_rows(result.trainer))
    weights = {name: value for name, value in asdict(kept).items() if isinstance(value, int)}
    again = {"reloaded_loss": loss, "reloaded_perplexity": perplexity(loss)}
    return {"checkpoint": str(kept.folder), "weights": weights} | again


def written(demo: Demo, result: Result) -> dict[str, Any]:
    """Text from the checkpoint, over an FP8 cache, and the bytes of that cache."""
    recipe = result.config.fp8_recipe
    assert recipe is not None
    folder = demo.checkpoint(recipe)
    model, words = checkpoint.load(folder, result.trainer.device), tokenizer_of("bytes")
    prompt = words.encode(PROMPT).tolist()
    made = generate(model, prompt, demo.new_tokens, sampling=Sampling(TEMPERATURE, TOP_K, demo.seed),
                    end_of_text=checkpoint.end_of_text(folder))  # fmt: skip
    assert made.cache is not None
    cache = {"tokens": made.cache.length, "bytes": made.cache.nbytes, "bytes_in_bf16": made.cache.bytes_in_bf16}
    return {"generated": {"prompt": PROMPT, "text": words.decode(made.tokens)}, "cache": cache}
