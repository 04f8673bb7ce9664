"""An estimate on the screen: one GPU in full, or several in a row each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ..cost.rates import GIB
from .estimate import FORMULAE, Arm, Estimate
from .table import grid


def draw_estimate(found: Estimate) -> RenderableType:
    """All figures of a GPU, and the formulae."""
    table = grid(title(found), *(arm.name for arm in found.arms))
    for name, figures in rows(found):
        table.add_row(name, *figures)
    return Group(table, *(Text(line) for line in notes([found])), *_formulae())


def draw_estimates(found: Sequence[Estimate]) -> RenderableType:
    """GPUs, one below the other."""
    asked = found[0].asked
    heads = ["FP8 + FP8 KV: users", "ms a token, alone", "BF16", "gain", "article", "prompt s", "BF16 ", "tokens/s"]
    table = grid(f"{found[0].model.name}, {asked.context} tokens", *heads, *(["$/M tokens"] if asked.price else []))
    for one in found:
        table.add_row(one.gpu.name, *_row(one))
    return Group(table, *(Text(line) for line in notes(found)), *_formulae())


def _row(one: Estimate) -> Iterator[str]:
    high, low, asked = one.arms[0], one.arms[-1], one.asked
    yield f"{low.users[asked.context]:,}"
    yield from (f"{1e3 * low.first_token:.2f}", f"{1e3 * high.first_token:.2f}", f"{one.gain:.2f}")
    yield "" if one.gpu.claimed is None else f"{one.gpu.claimed:.1f}"
    yield from (f"{low.prompt:.3f}", f"{high.prompt:.3f}", _whole(low, low.tokens_per_second))
    if asked.price:
        yield _money(low.dollars)


def title(found: Estimate) -> str:
    return f"{found.model.name}, {found.model.parameters / 1e9:.2f} billion parameters, on {found.gpu.name}"


def rows(found: Estimate) -> Iterator[tuple[str, list[str]]]:
    """(what, one figure an arm)."""
    arms, asked = found.arms, found.asked
    yield "weights, GiB", [f"{arm.weights / GIB:.2f}" for arm in arms]
    yield "cache, KiB a token", [f"{arm.cache_token / 1024:.1f}" for arm in arms]
    yield f"room for the cache, GiB of {found.gpu.memory_gib}", [f"{arm.room / GIB:.1f}" for arm in arms]
    for context in arms[0].users:
        yield f"users with {context:,} tokens each", [f"{arm.users[context]:,}" for arm in arms]
    kind = "floor" if asked.share == 1 else f"at {asked.share:.0%} of the floor's speed"
    yield f"ms a token, alone, {asked.context:,} tokens ({kind})", [f"{1e3 * arm.first_token:.2f}" for arm in arms]
    yield "sequences at a time", [str(arm.batch) for arm in arms]
    yield "ms a token, all of them", [_whole(arm, 1e3 * arm.step_seconds, 2) for arm in arms]
    yield "tokens a second, all of them", [_whole(arm, arm.tokens_per_second) for arm in arms]
    yield f"s for a prompt of {asked.prompt or asked.context:,} tokens", [f"{arm.prompt:.3f}" for arm in arms]
    if asked.price is not None:
        yield f"$ a million tokens, at {asked.price:g} an hour", [_money(arm.dollars) for arm in arms]
        yield "$ a million tokens of prompts", [_money(arm.prompt_dollars) for arm in arms]


def notes(found: Sequence[Estimate]) -> Iterator[str]:
    """What the figures rest on."""
    scaled = [one.gpu.name for one in found if not one.gpu.measured]
    if scaled:
        yield f"{', '.join(scaled)}: an H200's measured rates, scaled by the data sheets; not measured."
    yield from (f"{one.gpu.name}: {one.gpu.note}." for one in found if one.gpu.note)
    for one in found:
        if not any(arm.batch for arm in one.arms):
            yield f"{one.model.name} with {one.asked.context} tokens does not fit into one {one.gpu.name}."


def _formulae() -> list[Text]:
    return [Text("\nFormulae"), *(Text("  " + line, style="dim") for line in FORMULAE)]


def _whole(arm: Arm, value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if arm.batch else "does not fit"


def _money(value: float | None) -> str:
    return "does not fit" if value is None else f"{value:.3f}"
