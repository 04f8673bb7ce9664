"""`fp8.advise.profile(step)`: record a training step of one's own; say where its time goes and what is wrong with it.

Three passes, because each disturbs the others. First the warm-up, in which compiling and the allocator's growing
happen. Then `steps` steps under torch.profiler, without stacks, from which times and gaps come. Then one step that
looks for waits (`syncs.py`) and, in eager mode, counts FP8 products by layer; it is slower, and not timed.

The analysis is a pure function of the recorded events (`findings.py`); on a machine without a GPU the same report is
made from CPU operations, with nothing to say about gaps.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from ..cost import linear_gain
from ..errors import ConfigError
from ..nn import count_products
from ..nn.products import Fp8Products
from ..recipe import Recipe
from .events import COMPILED, MARK, Event, events_of
from .findings import Analysis, Facts, Finding, Sync, analyse
from .syncs import find_syncs

ROWS = 8192  # on which a layer's gain is predicted: the profiler does not know how many it gets


@dataclass(frozen=True)
class Profile:
    """What `profile` returns. Print it, or `to_dict` and `save` for data."""

    analysis: Analysis
    syncs: tuple[Sync, ...]
    facts: Facts
    machine: str
    torch: str

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.analysis.findings

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        from rich.console import Console

        from .profile_table import draw_profile

        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as text:
            console.print(draw_profile(self))
        return text.get()


def profile(
    step: Callable[[], Any],
    *,
    model: nn.Module | None = None,
    warmup: int = 3,
    steps: int = 5,
    find_syncs: bool = True,
    trace: str | Path | None = None,
) -> Profile:
    """Record `steps` calls of `step` after `warmup` calls, and explain them.

    step         one whole training step: forward, backward, optimizer
    model        whose FP8 layers are looked at; else the modules that `step` itself refers to
    find_syncs   run one more step to find the lines that make the host wait
    trace        where to write the Chrome trace

    The step is really run, `warmup + steps + 1` times: weights move. Raises `ConfigError` for a step that cannot be
    called without arguments, and whatever the step raises.
    """
    _check(step, warmup, steps)
    for _ in range(warmup):
        step()
    events = _record(step, steps, None if trace is None else Path(trace))
    modules = [model] if model is not None else list(modules_of(step))
    compiled = any(COMPILED.search(event.name) for event in events) or any(map(_is_compiled, modules))
    syncs, forwards = _look(step, find_syncs, count=bool(modules) and not compiled)
    facts = facts_of(modules, forwards)
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    return Profile(analyse(events, steps, syncs, facts), syncs, facts, name, torch.__version__)


def _check(step: Any, warmup: int, steps: int) -> None:
    if not callable(step):
        raise ConfigError(f"profile takes a function that runs one training step, not {type(step).__name__}.")
    if steps < 1 or warmup < 0:
        raise ConfigError(f"profile records at least one step after no less than none: steps={steps}, warmup={warmup}.")
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        raise ConfigError(
            f"the step is called without arguments, and this one cannot be: {error}. Wrap it: lambda: step(batch)."
        ) from None
    except ValueError:
        return  # a builtin that does not tell its arguments


def _record(step: Callable[[], Any], steps: int, trace: Path | None) -> list[Event]:
    """The events of some steps."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    _settle()
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        for _ in range(steps):
            with record_function(MARK):
                step()
        _settle()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = events_of(json.loads(file.read_text(encoding="utf-8")))
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, trace)
    return [e for e in events if e.where != "mark" or e.name == MARK or COMPILED.search(e.name)]


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _look(step: Callable[[], Any], syncs: bool, count: bool) -> tuple[tuple[Sync, ...], dict[str, int] | None]:
    """One more step: waits, and FP8 forward products by layer."""
    if not syncs and not count:
        return (), None
    if not count:
        return find_syncs(step), None
    with count_products() as products:
        found = find_syncs(step) if syncs else (step(), ())[1]
    forwards: Counter[str] = Counter()
    for (name, product), times in products.counts.items():
        if product == "forward":
            forwards[name] += times
    return found, dict(forwards)


# --------------------------------------------------------------------------- the model


def modules_of(step: Callable[..., Any], depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a function refers to: itself or its owner, what it closes over, and the globals that it names;
    through the functions among these, `depth` deep."""
    seen: set[int] = set()
    for value in _reachable(step, depth):
        if isinstance(value, nn.Module) and id(value) not in seen:
            seen.update(id(module) for module in value.modules())
            yield value


def _reachable(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth == 0 or isinstance(value, nn.Module):
        return
    if (owner := getattr(value, "__self__", None)) is not None:
        yield owner
        yield from (held for held in vars(owner).values()) if hasattr(owner, "__dict__") else ()
    function = getattr(value, "__func__", value)
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        for held in (*names.nonlocals.values(), *names.globals.values()):
            if isinstance(held, nn.Module) or inspect.isroutine(held):
                yield from _reachable(held, depth - 1)


def _is_compiled(module: nn.Module) -> bool:
    return any(type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
               for part in module.modules())  # fmt: skip


def facts_of(modules: list[nn.Module], forwards: dict[str, int] | None) -> Facts:
    """What the analysis wants to know of the modules."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, Fp8Products)]
    low = [part for part in parts if part.recipe is not None]
    recipe = low[0].recipe if low else None
    names = tuple(part.name or f"FP8 layer {i}" for i, part in enumerate(low))
    refreshed = tuple(name for name, part in zip(names, low, strict=True) if part.codes is not None)
    high = _high(modules, recipe) if recipe is not None else None
    return Facts(names, refreshed, forwards if low else None, high, recipe.name if recipe else "")


def _high(modules: list[nn.Module], recipe: Recipe) -> dict[str, float]:
    """Plain linear layers, but for output heads (the last of a model, by its name), with the gain predicted."""
    from ..nn.convert import HEADS

    return {
        name: linear_gain(ROWS, part.out_features, part.in_features, recipe, graph=True).ratio
        for module in modules
        for name, part in module.named_modules()
        if type(part) is nn.Linear and name.rpartition(".")[2] not in HEADS
    }
