"""From a step's work to logits: what runs on the device, what memory that takes, and what is made ready for it.

A step in which every sequence gets one token is replayed (`graphs.py`); any other is launched kernel by kernel. Before
the first request a GPU's memory is divided:

    memory_fraction of all = what is taken already (the model) + steps + cache

    steps    the last chunk of the longest prompt is run once over a cache of one page, and the widest decode step, and
             their peaks are taken; the logits of all graphs and the sampler's share are reckoned
    cache    pages of all the rest

Then every kind of step runs once, so that kernels are compiled before anybody waits for them, and decode is captured.
On a CPU there is nothing to make ready, and a cache is given as much as it could use, at most a GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.paged import Chunk
from ..errors import ConfigError
from .graphs import DecodeGraphs, sizes_up_to
from .inputs import Arrays, batch_of, empty, gather, send
from .params import EngineOptions
from .scheduler import Work

CPU_CACHE_BYTES = 1 << 30  # most that a cache takes on a CPU, unless `pages` says otherwise
SAMPLER = 52  # bytes of FP32 logits, sorted twice, in int64 and FP32: of a sequence's vocabulary


class Forward:
    """A model over a cache, which `open` gives it. `last` int64 [seats]: the newest token of each running sequence.

    rows   every step is filled up to so many (`deterministic`); 0: none is
    most   tokens of a step
    """

    def __init__(self, model: Any, options: EngineOptions, last: Tensor) -> None:
        self.model, self.options, self.last, self.device = model, options, last, last.device
        self.rows = options.max_running if options.deterministic else 0
        self.most = self.rows or options.max_step_tokens
        self.cache: Any = None
        self.graphs: DecodeGraphs | None = None

    def __call__(self, work: list[Work]) -> Tensor:
        """Logits of the rows that are sampled, then of those of prompts, then perhaps of rows that fill up."""
        decode = all(w.new == 1 and w.sampled and not w.told for w in work)
        if decode and self.graphs is not None and self.graphs.size_for(len(work)):
            return self.graphs(gather(work, self.options.page_size, width=self.graphs.width))
        return self._run(gather(work, self.options.page_size, rows=self.rows), self.cache, work)

    def open(self, cache: Any, longest: int) -> None:
        """Work over this cache from now on, on sequences of up to `longest` tokens; make ready what a GPU needs."""
        self.cache = cache
        if self.device.type == "cuda":
            with torch.no_grad(), self.there():
                for power in range(self.options.max_running.bit_length()):
                    self._run(*self._prompts(1 << power, longest, cache))
                if sizes := self._sizes():
                    width = self._pages(longest)
                    self.graphs = DecodeGraphs(self.model, cache, self.last, sizes, width, one_kernel=self.rows > 0)

    def there(self) -> Any:
        """The GPU, in a process with several: events, graphs and kernels belong to the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def _run(self, arrays: Arrays, cache: Any, work: Sequence[Work] = ()) -> Tensor:
        chunks = tuple(Chunk(w.start, w.new) for w in work) if work and not self.rows else None
        batch = batch_of(send(arrays, self.device), self.last, one_kernel=self.rows > 0, chunks=chunks)
        return self.model(batch, cache)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.options.page_size)

    def _sizes(self) -> list[int]:
        """The numbers of rows to capture, the smallest first; none where nothing is."""
        if not self.options.graphs or not getattr(self.model, "capturable", True):
            return []
        return [self.rows] if self.rows else sorted(self.options.graph_sizes or sizes_up_to(self.options.max_running))

    def _prompts(self, count: int, longest: int, cache: Any, start: int = 0) -> tuple[Arrays, Any, list[Work]]:
        """What `_run` takes for a step of so many prompts, at least one, from position `start` on and as long as they
        may be. Nothing is stored, and what lies before is page 0 over and over."""
        count = max(1, min(count, self.options.max_running, self.most))
        new = min(self.most // count, longest - start)
        prompt: Any = SimpleNamespace(tokens=[0] * (start + new), pages=[0] * self._pages(start + new))
        work = [Work(prompt, start, new, range(0), True, False)] * count
        arrays = gather(work, self.options.page_size, rows=self.rows)
        return arrays | {"slots": np.full_like(arrays["slots"], -1)}, cache, work

    # ------------------------------------------------------------------ memory

    def affordable(self, dtype: str, longest: int) -> int:
        """Pages of a cache of that type that there is memory for. Raises `ConfigError` where there is none."""
        page = self.model.new_cache(1, self.options.page_size, dtype).nbytes
        if self.device.type == "cuda":
            with self.there():
                steps = self._measured(dtype, longest)
                free, total = torch.cuda.mem_get_info(self.device)
            room = free - int((1 - self.options.memory_fraction) * total) - steps
        else:
            room = min(CPU_CACHE_BYTES, page * self.options.max_running * self._pages(longest))
        if room < page:
            raise ConfigError(
                f"no memory is left for a cache: a page takes {page:,} bytes, and {max(room, 0):,} are free. Raise "
                "memory_fraction, lower max_step_tokens, max_running or max_model_len, or quantize the model."
            )
        return room // page

    def _measured(self, dtype: str, longest: int) -> int:
        """Bytes that steps take beside weights and cache."""
        cache, vocabulary = self.model.new_cache(1, self.options.page_size, dtype), self.model.config.vocab_size
        last = max(0, longest - self.most)  # where the last chunk of the longest prompt begins
        steps = self._peak(*self._prompts(-(-self.most // longest), longest, cache, last))
        if sizes := self._sizes():
            steps += self._peak(empty(sizes[-1], self._pages(longest)), cache) + 4 * vocabulary * sum(sizes)
        torch.cuda.empty_cache()
        return steps + SAMPLER * self.options.max_running * vocabulary

    def _peak(self, arrays: Arrays, cache: Any, work: Sequence[Work] = ()) -> int:
        """Bytes that a step over these inputs takes while it runs."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._run(arrays, cache, work)
        return torch.cuda.max_memory_allocated(self.device) - before
