"""The same bits in every run on a GPU, where torch would otherwise let threads race.

Attention's backward is the one kernel of a training step that adds with atomics: left alone, most runs differ from
each other by a last bit after a few dozen steps, and a resumed run from an uninterrupted one. Told to be
deterministic, torch takes FlashAttention-2 in its deterministic form (40 backwards of 40 were equal on an H200;
cuDNN's were not, even so told). On a CPU all kernels are deterministic for a given thread count, and nothing is
switched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """Let torch choose deterministic kernels inside, and restore its settings after.

    An operation that has no deterministic form (in a model of your own) raises torch's RuntimeError, which names it.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # it would write every empty tensor, to no purpose here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill
