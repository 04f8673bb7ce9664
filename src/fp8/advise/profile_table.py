"""A profile on the screen: where the time goes, what the GPU waits for, and what to do."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .findings import Analysis, Finding
from .profile import Profile
from .table import grid

NO_GPU = (
    "No GPU was recorded: these are operations of the CPU, without gaps. FP8 is computed there by its definitions, "
    "whose parts count as products and as elementwise."
)
WAITS = {
    "synchronized": "idle: the host waited for the GPU",
    "host": "idle: the host launched too slowly",
    "queue": "idle: between kernels",
}


def draw_profile(found: Profile) -> RenderableType:
    """The table of kinds and of idle time, then each finding with its cause and the way out."""
    a = found.analysis
    recipe = f", FP8 recipe {found.facts.recipe}" if found.facts.recipe else ""
    title = f"{a.steps} steps on {found.machine}, torch {found.torch}{recipe}: {a.step_ms:.2f} ms a step"
    note = [] if a.device == "GPU" else [Text(NO_GPU, style="dim")]
    if not found.findings:
        return Group(Text(title), *note, _kinds(a), Text("Nothing to find fault with.", style="bold green"))
    findings = [part for number, one in enumerate(found.findings, 1) for part in _finding(number, one)]
    return Group(Text(title), *note, _kinds(a), *findings)


def _kinds(a: Analysis) -> Table:
    table = grid("a step", "ms", "share", "calls")
    for row in a.rows:
        table.add_row(row.kind, f"{row.ms:.3f}", f"{row.ms / max(a.step_ms, 1e-9):.1%}", f"{row.calls:.0f}")
    for cause, ms in a.idle.items():
        table.add_row(WAITS[cause], f"{ms:.3f}", f"{ms / max(a.step_ms, 1e-9):.1%}", "")
    return table


def _finding(number: int, one: Finding) -> tuple[RenderableType, ...]:
    cost = f" (up to {one.ms:.2f} ms a step)" if one.ms else ""
    return (
        Text(f"{number}. {one.what}{cost}", style="bold yellow"),
        Padding(Text(f"because  {one.cause}"), (0, 0, 0, 3)),
        Padding(Text(f"way out  {one.way_out}"), (0, 0, 1, 3)),
    )
