"""What is found out before a checkpoint is written. Its manifest keeps it: a stopped `fp8 quantize` asks nothing twice.

    remedy       changes the model against outliers; in high precision it stays equal    fp8.calibrate.remedies
    calibrate    scales of inputs, keys and values                                       fp8.calibrate.calibration
    choose       which more layers stay in high precision                                fp8.calibrate.budget

They run in this order, for each looks at the model that the one before left. Text is read in a room below this one;
here is only what each of them owes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .layers import Layers
from .partial import Partial
from .source import Source

if TYPE_CHECKING:
    from .quantize import Options


@dataclass(frozen=True)
class Scales:
    """Calibrated scales (they dequantize): of layers' inputs, and of each attention module's keys and values by head.

    `how` is told in `config.json`: the observer, the text, what held-out text says of the scales.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, Sequence[float]] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Layers that stay beyond those that `Options` name, with the reason of each, and how that came about (`how`)."""

    kept: Mapping[str, str] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)


class Remedy(Protocol):
    """Changes a model before it is quantized, so that in high precision it stays what it was."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def record(self) -> str: ...

    def find(self, source: Source, layers: Layers) -> dict[str, Any]: ...

    def apply(self, source: Source, found: Mapping[str, Any]) -> Source: ...


Calibrate = Callable[[Source, Layers], Scales]
Choose = Callable[[Source, Layers, "Options", Scales], Choice]


@dataclass(frozen=True)
class Decisions:
    """What was found; `outliers` is what was measured of remedies."""

    scales: Scales
    choice: Choice
    outliers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """For `config.json`."""
        optional = {"budget": self.choice.how, "outliers": self.outliers}
        return {"calibration": dict(self.scales.how) or None} | {k: dict(how) for k, how in optional.items() if how}


def changed(partial: Partial, source: Source, layers: Layers, remedy: Remedy) -> tuple[Source, dict[str, Any]]:
    """The changed model, and the files to write beside it; from the manifest where an earlier start found it."""
    if "remedy" not in partial.notes:
        partial.note("remedy", remedy.find(source, layers))
    found = partial.notes["remedy"]
    return remedy.apply(source, found), {remedy.record: {k: v for k, v in found.items() if k != "told"}}


def calibrated(partial: Partial, source: Source, layers: Layers, calibrate: Calibrate | None) -> Scales:
    """The scales, likewise."""
    if calibrate is None:
        return Scales()
    if "scales" not in partial.notes:
        partial.note("scales", asdict(calibrate(source, layers)))
    return Scales(**partial.notes["scales"])


def chosen(partial: Partial, ask: Callable[[Choose], Choice], choose: Choose | None) -> Choice:
    """What else stays, likewise."""
    if choose is None:
        return Choice()
    if "choice" not in partial.notes:
        partial.note("choice", asdict(ask(choose)))
    return Choice(**partial.notes["choice"])
