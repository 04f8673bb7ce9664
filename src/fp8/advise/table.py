"""A plan and a profile on the screen."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .plan import Plan, Side


def grid(*heads: str, left: int = 1) -> Table:
    """A plain table: the first `left` columns to the left, figures to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right")
    return table


def draw_plan(found: Plan) -> RenderableType:
    """The layers, the step, and the verdict."""
    model, request = found.model, found.request
    gpus = f"{request.gpus} x {request.gpu.upper()}"
    title = (
        f"{model.name}: {_count(model.parameters)} parameters, {request.tokens} tokens a step and GPU in "
        f"sequences of {found.sequence}, {gpus}, recipe {found.recipe.name}, {build(found)}"
    )
    colour = "green" if found.use_fp8 else "yellow"
    return Group(
        Text(title),
        _layers(found),
        _step(found),
        _parts(found),
        Text(found.verdict, style=f"bold {colour}"),
        *_notes(found),
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def build(found: Plan) -> str:
    request = found.request
    words = ["fused producers" if request.fused else "converted", "eager" if request.eager else "compiled"]
    words += ["CUDA graph"] if request.graph else []
    return ", ".join([*words, f"state in {request.state.upper()}"])


def _layers(found: Plan) -> Table:
    table = grid("layer", "weight", "of them", "becomes", "BF16 ms", "FP8 ms", "gain", "reason", left=2)
    table.columns[-1].justify = "left"
    for d in found.decisions:
        figures = [f"{d.bf16_ms:.3f}", f"{d.fp8_ms:.3f}", f"{d.gain:.2f}"] if d.gain is not None else ["", "", ""]
        word = Text("FP8", style="green") if d.fp8 else Text("BF16")
        table.add_row(d.name, d.shape, str(d.count), word, *figures, d.reason)  # type: ignore[arg-type]
    return table


def _step(found: Plan) -> Table:
    table = grid("the whole step", "BF16", "FP8", "")
    for row in _step_rows(found, found.bf16, found.fp8):
        table.add_row(*row)
    return table


def _step_rows(found: Plan, high: Side, low: Side) -> Iterator[tuple[str, str, str, str]]:
    yield "ms a step", f"{high.step.seconds * 1e3:.1f}", f"{low.step.seconds * 1e3:.1f}", f"{found.gain:.2f} times"
    yield "tokens/s and GPU", f"{high.tokens_per_second:,.0f}", f"{low.tokens_per_second:,.0f}", ""
    yield "utilization, of 989 TFLOP/s", f"{high.utilization:.0%}", f"{low.utilization:.0%}", ""
    yield "peak GiB", f"{high.memory.gib:.1f}", f"{low.memory.gib:.1f}", f"of {found.known.gpu.memory_gib}"
    if high.days is not None and low.days is not None:
        yield "days", f"{high.days:,.1f}", f"{low.days:,.1f}", f"{high.days - low.days:,.1f} fewer"
    if high.cost is not None and low.cost is not None:
        yield "cost", f"{high.cost:,.0f}", f"{low.cost:,.0f}", f"{high.cost - low.cost:,.0f} saved"


def _parts(found: Plan) -> Table:
    table = grid("where the time goes, ms", "BF16", "FP8")
    high, low = found.bf16.step, found.fp8.step
    for kind in dict.fromkeys([*high.parts, *low.parts]):
        table.add_row(kind, *(f"{one.parts.get(kind, 0.0) * 1e3:.1f}" for one in (high, low)))
    table.add_row("the host, beside the GPU", *(f"{one.host * 1e3:.1f}" for one in (high, low)))
    return table


def _notes(found: Plan) -> list[Text]:
    """What is predicted and not measured."""
    known, notes = found.known, [f"Predicted from {found.known.source}."]
    if known.gpu.note:
        notes.append(f"{found.request.gpu.upper()}: {known.gpu.note}.")
    if found.request.fused:
        notes.append(f"Fused producers: {known.estimates['fused']}.")
    near = min(known.attention, key=lambda size: (abs(size - found.model.width), size))
    if f"attention {near}" in known.estimates:
        notes.append(f"Attention: {known.estimates[f'attention {near}']}.")
    if found.request.gpus > 1:
        notes.append("Communication between GPUs is taken to hide behind computing.")
    return [Text(note, style="dim") for note in notes]
