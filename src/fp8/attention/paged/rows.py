"""Which rows ask, and where their keys lie: what attention needs to know of a batch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Chunk(NamedTuple):
    """The new rows of one sequence: `rows` of them, the first at position `start`."""

    start: int
    rows: int


class Rows(Protocol):
    """T new rows of S sequences, one sequence after the other; `serve.Batch` is one.

    positions   int32 [T]: of each row in its sequence
    starts      int32 [S + 1]: sequence s has the rows starts[s] : starts[s + 1]
    lengths     int32 [S]: positions of each sequence that are stored; 0: its rows read nothing, and get 0
    pages       int32 [S, most pages]: the page numbers of each sequence, in order
    decode      every sequence has exactly one row
    chunks      what `positions` and `starts` say, for the host; None: only the device knows, or a row's result shall
                not depend on the chunk that it comes in (deterministic engines)
    """

    @property
    def positions(self) -> Tensor: ...

    @property
    def starts(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def pages(self) -> Tensor: ...

    @property
    def decode(self) -> bool: ...

    @property
    def chunks(self) -> tuple[Chunk, ...] | None: ...
