"""Is FP8 as good as high precision? Every recipe against it, over several seeds, on the demo's own settings.

    python -m fp8.evaluate.study --seeds 0 1 2 --recipes tensorwise delayed rowwise blockwise --out runs/study

Each run leaves a file, `<recipe>-seed<n>.json`; a study that was interrupted skips those that are there and resumes the
one that was cut. At the end comes a table of paired differences: both runs of a pair have the same seed, so the same
first weights and the same data, and what remains is FP8 and the chaos of training (two runs that differ in one bit
drift apart too). The interval is Student's, over seeds; with three seeds it is wide, and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import DataError
from ..train import TrainConfig
from .comparison import difference, run_arm, settings, surroundings
from .intervals import t95
from .probe import next_loss, probe

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
LIMIT = 0.5  # percent
Run = dict[str, Any]


def study(
    seeds: Sequence[int], recipes: Sequence[str], out: Path, console: Console | None = None, **changes: Any
) -> dict[str, Any]:
    """Run whatever is missing under `out` and return the summary, which is also written to `out/study.json`."""
    runs: list[Run] = []
    for seed in seeds:
        for recipe in (None, *recipes):
            config = settings(recipe, out / "runs" / f"{recipe or 'high'}-seed{seed}", seed=seed, **changes)
            runs.append(one_run(config, out / f"{recipe or 'high'}-seed{seed}.json", console))
    told = summary(runs)
    (out / "study.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def one_run(config: TrainConfig, path: Path, console: Console | None) -> Run:
    """A run's numbers: read where they are there, made where they are not."""
    plain = config.to_dict()
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["settings"] == plain:
        return kept
    if console:
        console.print(f"[bold]{path.stem}[/]", highlight=False)
    start = time.perf_counter()
    result = run_arm(config, console=console)
    if result.interrupted:
        raise KeyboardInterrupt
    run = {
        "recipe": config.fp8_recipe.name if config.fp8_recipe else None, "seed": config.seed, "settings": plain,
        "machine": surroundings(result.trainer.device), "seconds": round(time.perf_counter() - start, 1),
        "validation_loss": result.validation_loss, "losses": result.losses, "evaluations": result.evaluations,
        "products": products(result.trainer) if config.fp8_recipe else {},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return run


def products(trainer: Any) -> dict[str, dict[str, int]]:
    """The FP8 products of one step, by layer and role."""
    return dict(probe(trainer.model, lambda: next_loss(trainer)).products)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Losses, paired differences in percent, their mean and interval, by recipe; raises `DataError` for no pair."""
    high = {run["seed"]: run["validation_loss"] for run in runs if run["recipe"] is None}
    recipes = list(dict.fromkeys(run["recipe"] for run in runs if run["recipe"]))
    if not (high and recipes):
        raise DataError("a study needs at least one high-precision run and one FP8 run.")
    first = runs[0]
    return {
        "machine": first["machine"],
        "settings": {key: value for key, value in first["settings"].items() if key not in ("out", "recipe", "seed")},
        "limit": LIMIT,
        "high": high,
        "recipes": {name: of_recipe([run for run in runs if run["recipe"] == name], high) for name in recipes},
    }


def of_recipe(runs: Sequence[Run], high: dict[int, float]) -> dict[str, Any]:
    """One recipe's differences, and the products of its first run, summed over layers by role."""
    off = {run["seed"]: difference(run["validation_loss"], high[run["seed"]]) for run in runs}
    mean, half = interval(list(off.values()))
    roles: dict[str, int] = {}
    for counts in runs[0]["products"].values():
        for role, count in counts.items():
            roles[role] = roles.get(role, 0) + count
    return {
        "losses": {run["seed"]: run["validation_loss"] for run in runs},
        "differences": off, "mean": mean, "interval": None if math.isinf(half) else [mean - half, mean + half],
        "within": all(abs(one) <= LIMIT for one in off.values()),
        "products": roles, "layers": len(runs[0]["products"]), "seconds": [run["seconds"] for run in runs],
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval (infinite for a single value).

    >>> mean, half = interval([0.1, 0.2, 0.3])
    >>> round(mean, 3), round(half, 3)
    (0.2, 0.248)
    """
    mean, freedom = statistics.fmean(values), len(values) - 1
    if not freedom:
        return mean, math.inf
    return mean, t95(freedom) * statistics.stdev(values) / math.sqrt(len(values))


def drawing(told: dict[str, Any]) -> Table:
    """The table: a row a recipe, a column a seed."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss against high precision", *(f"seed {seed}" for seed in told["high"]), "mean, 95 % interval",
                   f"each within {told['limit']} %", "FP8 products a step"):  # fmt: skip
        out.add_column(column, justify="left" if column.startswith("loss") else "right", no_wrap=True)
    for name, row in told["recipes"].items():
        ends = "one seed" if row["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*row["interval"])
        counts = " + ".join(str(count) for count in row["products"].values())
        off = row["differences"]
        cells = [f"{off[seed]:+.2f} %" if seed in off else "–" for seed in told["high"]]
        out.add_row(name, *cells, f"{row['mean']:+.2f} % {ends}", "yes" if row["within"] else "NO", counts)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fp8.evaluate.study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--steps", type=int, help="steps of each run; by default the demo's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    asked = parser.parse_args(argv)
    console = Console(highlight=False)
    told = study(asked.seeds, asked.recipes, asked.out, console, steps=asked.steps, device=asked.device)
    console.print(drawing(told))
    console.print(f"{asked.out / 'study.json'} has every number.")


if __name__ == "__main__":
    main()
