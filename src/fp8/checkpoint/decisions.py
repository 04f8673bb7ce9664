"""What is found out before a checkpoint is written. Its manifest keeps it: a stopped `fp8 quantize` asks nothing twice.

    remedy       changes the model against outliers; in high precision it stays equal    fp8.calibrate.remedies
    calibrate    scales of inputs, keys and values                                       fp8.calibrate.calibration
    choose       which more layers stay in high precision                                fp8.calibrate.budget
    compensate   codes whose errors make up for each other                               fp8.calibrate.sequential

They run in this order, for each looks at the model that the one before left. Text is read in a room below this one;
here is only what each of them owes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .layers import Layers
from .partial import Partial
from .source import Source
from .tensorfile import read_tensors, tensor_bytes

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


@dataclass(frozen=True)
class Rounded:
    """Codes that were chosen otherwise than each by itself: the file that holds those of a layer, as `LAYER.weight`.

    `how` is told in `config.json`.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    def codes(self, layer: str) -> Tensor | None:
        """E4M3 [N, K]; None where the layer is rounded to nearest."""
        return read_tensors(self.files[layer])[f"{layer}.weight"] if layer in self.files else None


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
Compensate = Callable[[Source, Layers, "Options", Scales, Path], Rounded]  # keeps what it has done in the folder


@dataclass(frozen=True)
class Decisions:
    """What was found; `outliers` is what was measured of remedies."""

    scales: Scales
    choice: Choice
    outliers: Mapping[str, Any]
    rounded: Rounded

    @property
    def told(self) -> dict[str, Any]:
        """For `config.json`."""
        optional = {"budget": self.choice.how, "outliers": self.outliers, "compensation": self.rounded.how}
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


def compensated(
    partial: Partial, files: Iterable[str], ask: Callable[[Compensate], Rounded], compensate: Compensate | None
) -> Rounded:
    """The codes that compensation chose, in a folder beside the shards that goes when all of those are written."""
    if compensate is None:
        return Rounded()
    if "compensation" not in partial.notes or not all(partial.finished(file) for file in files):
        partial.begin()
        rounded = ask(compensate)
        told = {"codes": {layer: code_digest(rounded.codes(layer)) for layer in sorted(rounded.files)}}
        partial.note("compensation", dict(rounded.how) | told)
        return replace(rounded, how=partial.notes["compensation"])
    return Rounded(how=partial.notes["compensation"])


def code_digest(codes: Tensor | None) -> str:
    """Of a weight's codes: by it `fp8 verify` knows those again that no second quantization would give."""
    return "" if codes is None else hashlib.sha256(tensor_bytes(codes)).hexdigest()[:16]
