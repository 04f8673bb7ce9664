"""Does the host wait for the GPU?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def never_waits() -> Iterator[None]:
    """Any synchronization of the host with the GPU inside is an error.

    Setting the mode warns that it does not find everything, and here warnings are errors: it must not be left set then,
    or every later test of the process fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
