"""Models side by side on the same items: measured one after the other, kept on disk as they go, and judged.

    judge(specs, measurements, base=0)     every measurement of every model: a Judgement
    variants(base, schemes, kv_cache)      the base under other schemes, to judge before anything is exported

One model is in memory at a time, and none whose records are all on disk. An interruption leaves `StoppedError`; the
same call goes on behind the last batch that was done, and ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, Fp8Error
from ..train.loop import device_of
from .comparison import surroundings
from .ledger import Ledger
from .measurement import Measurement, TextMeasurement
from .measures import PERPLEXITY, Figure, figures
from .progress import Progress
from .subject import ModelSpec, described, open_causal, tokenizer_for
from .verdict import LIMIT

Record = dict[str, Any]
Found = dict[tuple[str, str], tuple[list[Record], float]]  # by measurement and model: records, and seconds


class StoppedError(Fp8Error):
    """Ctrl-C: what was measured is on disk, and the same command goes on."""


@dataclass(frozen=True)
class Outcome:
    """One measurement of one model: what was asked, its records, one an item, and its figures."""

    model: ModelSpec
    measurement: str
    what: dict[str, Any]
    records: list[Record]
    figures: list[Figure]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        told = [figure.to_dict() for figure in self.figures]
        own = {"model": self.model.name, "what": self.what, "seconds": round(self.seconds, 1)}
        return own | {"figures": told, "records": self.records}


@dataclass(frozen=True)
class Judgement:
    """Every outcome, by measurement and then by model, the base first."""

    models: list[ModelSpec]
    about: dict[str, str]
    outcomes: list[Outcome]
    limit: float

    @property
    def base(self) -> ModelSpec:
        return self.models[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON: settings, figures, and every item's outcome, from which all of it can be computed again."""
        names = list(dict.fromkeys(outcome.measurement for outcome in self.outcomes))
        by_name = {name: [o.to_dict() for o in self.outcomes if o.measurement == name] for name in names}
        return {
            "machine": surroundings(device_of(self.base.device)),
            "tolerance": self.limit,
            "base": self.base.name,
            "models": [described(spec) | {"about": self.about.get(spec.name)} for spec in self.models],
            "measurements": by_name,
        }


def variants(base: ModelSpec, schemes: Sequence[str], kv_cache: str | None = None) -> list[ModelSpec]:
    """The base under each scheme, with this KV cache. `none` alone would be the base again, and is refused."""
    if "none" in schemes and kv_cache is None:
        raise ConfigError("scheme none changes nothing: it is for --kv-cache alone.")
    return [replace(base, scheme=scheme, kv_cache=kv_cache) for scheme in schemes]


def judge(
    models: Sequence[ModelSpec],
    measurements: Sequence[Measurement],
    *,
    out: Path = Path("runs/eval"),
    fresh: bool = False,
    limit: float = LIMIT,
    console: Console | None = None,
) -> Judgement:
    """Measure every model, the first of which is the base, and hold the others against it.

    out      the folder of partial results; `fresh` measures anew what is there
    limit    of the verdict, in points or percent

    Raises `ConfigError` for nothing to measure, two models of one name, or texts in different tokens; `StoppedError`.
    """
    check(models, measurements)
    show, about, found = Progress(console), {}, {}
    with show:
        for spec in models:
            opened = Opened(spec)
            for one in measurements:
                ledger = Ledger(out, one.what(opened.of(one)), fresh=fresh)
                found[one.name, spec.name] = measure(opened, one, ledger, show)
            about[spec.name] = opened.about
    outcomes = [outcome for one in measurements for outcome in held_together(models, one, found, limit)]
    return Judgement(list(models), about, outcomes, limit)


def held_together(models: Sequence[ModelSpec], one: Measurement, found: Found, limit: float) -> Iterator[Outcome]:
    """One measurement's outcome of each model, figures beside the base's."""
    base = found[one.name, models[0].name][0]
    for spec in models:
        records, seconds = found[one.name, spec.name]
        beside = None if spec is models[0] else base
        told = figures(one.measures, records, beside, token_nats(one, models[0]), limit)
        yield Outcome(spec, one.name, one.what(spec.resolved(one.encoder)), records, told, seconds)


def token_nats(one: Measurement, base: ModelSpec) -> float:
    """What guessing each token of the vocabulary alike loses, in nats a token."""
    return math.log(tokenizer_for(base).vocab_size) if PERPLEXITY in one.measures else math.inf


class Opened:
    """A model that is loaded when it is first asked something."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.about = "not loaded: its records were on disk"
        self._model: Any = None
        self._encoder: bool | None = None

    def of(self, one: Measurement) -> ModelSpec:
        return self.spec.resolved(one.encoder)

    def model(self, one: Measurement) -> Any:
        if self._encoder is not one.encoder:
            self._model = None  # before the other is read
            if one.encoder:
                from .transformers_engine import Encoder

                self._model = Encoder(self.spec)
            else:
                self._model = open_causal(self.spec)
            self._encoder, self.about = one.encoder, self._model.about
        return self._model


def measure(opened: Opened, one: Measurement, ledger: Ledger, show: Progress) -> tuple[list[Record], float]:
    """The records of one measurement of one model, and the seconds that the new ones took."""
    batches = one.batches(opened.of(one))
    done = ledger.done()[: len(batches)]
    records = [record for batch in done for record in batch]
    show.start(f"{opened.spec.name}: {one.name}", sum(map(len, batches)), len(records))
    try:
        for batch in batches[len(done) :]:
            new = one.run(opened.model(one), batch)
            ledger.append(new)
            records += new
            show.advance(records)
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; {ledger.path} has {len(records)} items, and the same command goes on.") from None
    return records[: one.keep], show.finish(records)


def check(models: Sequence[ModelSpec], measurements: Sequence[Measurement]) -> None:
    """Refuse what cannot be judged, before anything is loaded."""
    if not measurements:
        raise ConfigError("nothing to measure: give --text FILE, or --tasks with --data.")
    names = [spec.name for spec in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]!r}; give one folder another name, or name it once.")
    measured = [one.name for one in measurements]
    if twice := [name for name in measured if measured.count(name) > 1]:
        raise ConfigError(f"two measurements are called {twice[0]!r}: give one file another name.")
    words = {tokenizer_for(spec).fingerprint for spec in models} if any(map(is_text, measurements)) else set()
    if len(words) > 1:
        raise ConfigError("these models have different tokenizers: their nats a token cannot be compared.")


def is_text(one: Measurement) -> bool:
    return isinstance(one, TextMeasurement)
