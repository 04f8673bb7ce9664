"""A decode step as one CUDA graph for each number of rows.

A step of a small batch is some hundred kernels of a few microseconds each; started one by one from Python, the GPU
would wait for the host between them. A graph is recorded once and started with one call. It replays the same kernels
over the same memory, so everything that changes lies in one static buffer, which a step fills by one copy: rows,
pages, lengths, and which tokens to fetch from the seats (`inputs.py`). The logits come out in a static tensor too;
they are read by launches of the same stream before the next replay overwrites them.

Shapes are fixed, so a batch is filled up to the next captured number of rows. A filled row reads no keys and stores
none. The table of pages is as wide as the longest request may need. Graphs are captured at the start, the largest
first, and share one pool of memory; sampling stays outside, because what it does differs from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import Arrays, batch_of, empty, filled, pack, unpack

WARM_UPS = 2


def sizes_up_to(most: int) -> list[int]:
    """Numbers of rows to capture: less than a third of a batch is filled up.

    >>> sizes_up_to(40)
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    """
    steps = {base << k for base in (1, 3) for k in range(most.bit_length())}
    return [*sorted(size for size in steps if size < most), most]


@dataclass(frozen=True)
class Captured:
    """One graph, its input buffer and its logits [rows, V]."""

    graph: Any
    buffer: Tensor
    logits: Tensor


class DecodeGraphs:
    """The graphs of a model over a cache; `last` is the sampler's."""

    def __init__(
        self, model: Any, cache: Any, last: Tensor, sizes: Sequence[int], width: int, one_kernel: bool = False
    ) -> None:
        """`one_kernel` as for `batch_of`."""
        self._model, self._cache, self._last, self._one_kernel = model, cache, last, one_kernel
        self.sizes, self.width = sorted(sizes), width
        self._captured: dict[int, Captured] = {}
        pool = torch.cuda.graph_pool_handle()
        for rows in reversed(self.sizes):
            self._captured[rows] = self._capture(rows, pool)

    def size_for(self, rows: int) -> int | None:
        """The number of rows of the graph that takes so many; None: no graph does."""
        return next((size for size in self.sizes if size >= rows), None)

    def of(self, rows: int) -> Any:
        """The graph of so many rows, to be replayed over what was sent to it last; None: there is none."""
        return self._captured[rows].graph if rows in self._captured else None

    def __call__(self, arrays: Arrays) -> Tensor:
        """Launch a decode batch of `gather(work, page_size, width=self.width)`: logits [rows of the graph, V]."""
        size = self.size_for(len(arrays["tokens"]))
        assert size is not None
        captured = self._captured[size]
        captured.buffer.copy_(pack(filled(arrays, size), pin=True)[0], non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _capture(self, rows: int, pool: Any) -> Captured:
        host, layout = pack(empty(rows, self.width), pin=True)
        buffer = host.to(self._last.device)
        stream = torch.cuda.Stream(self._last.device)
        stream.wait_stream(torch.cuda.current_stream(self._last.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):  # compiles kernels, and lets libraries make their workspaces
                self._run(unpack(buffer, layout))
        torch.cuda.current_stream(self._last.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(unpack(buffer, layout))
        return Captured(graph, buffer, logits)

    def _run(self, sent: dict[str, Tensor]) -> Tensor:
        return self._model(batch_of(sent, self._last, one_kernel=self._one_kernel), self._cache)
