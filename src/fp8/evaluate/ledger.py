"""What has been measured so far, on disk, so that Ctrl-C loses nothing.

A file belongs to one model and one measurement: its name is a hash of everything that a record depends on, and its
first line says what that is, for people. Each further line is a batch of records, written when it is done. A kill may
leave half a line: `done` gives whole batches only, and cuts the file behind them, so that what follows is what an
uninterrupted run would have written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TensorError

Record = dict[str, Any]


class Ledger:
    """The records of one measurement. `what` is plain data: whatever changes it starts another file."""

    def __init__(self, folder: Path, what: dict[str, Any], *, fresh: bool = False) -> None:
        self.what = what
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{key}.jsonl"
        if fresh:
            self.path.unlink(missing_ok=True)

    def done(self) -> list[list[Record]]:
        """The batches that are whole."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # only the last can be cut
        if len(whole) < len(lines):
            self.path.write_bytes(b"".join(whole))
        return [json.loads(line) for line in whole[1:]]

    def append(self, batch: Sequence[Record]) -> None:
        """A batch, whole or not at all: one line. Raises `TensorError` for what is NaN or infinite."""
        try:
            line = json.dumps(list(batch), allow_nan=False) + "\n"
        except ValueError:
            raise TensorError(
                f"{self.what.get('model')} gave NaN or Inf: its weights or an activation are not finite."
            ) from None
        if not self.path.is_file() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.what) + "\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
