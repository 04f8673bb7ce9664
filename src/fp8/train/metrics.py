"""The run's log: one JSON object a line, so that a plot needs no parser and a killed run loses no line but the last.

    {"kind": "step", "step": 1, "loss": 5.61, "lr": 0.0001, "grad_norm": 2.3, "loss_scale": 1.0, "skipped": false,
     "tokens_per_second": 9120.4, "time": 1767225600.125}
    {"kind": "evaluation", "step": 100, "loss": 2.41, "perplexity": 11.1, "time": 1767225700.5}

A resumed run first drops the lines behind its checkpoint (and the half line of a killed process), then goes on: the
file reads like that of a run that was never interrupted. `time` is in seconds since 1970. A number that is not finite
is null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

Record = dict[str, Any]


class Metrics:
    """The open log. `records` holds the lines kept from before a resume and all written since."""

    def __init__(self, path: Path, keep_until: int = 0) -> None:
        self.path = path
        self.records = kept(path, keep_until)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            aside.write_text("".join(map(line, self.records)), encoding="utf-8")
            aside.replace(path)
            self._stream = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed in close
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}. Make room, or set another out.") from None

    def write(self, record: Record) -> None:
        self.records.append(record)
        try:
            self._stream.write(line(record))
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}. Make room there and resume.") from None

    def close(self) -> None:
        self._stream.close()

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


def line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def read_metrics(path: Path) -> list[Record]:
    """The whole lines of a log; a last line that was cut is left out."""
    records = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(text))
        except ValueError:
            break
    return records


def kept(path: Path, keep_until: int) -> list[Record]:
    """The lines up to and including step `keep_until`."""
    if not (keep_until and path.is_file()):
        return []
    return [record for record in read_metrics(path) if record.get("step", 0) <= keep_until]
