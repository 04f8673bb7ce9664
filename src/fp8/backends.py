"""Which implementations an operation has, what each needs, which was chosen, and why the others were not.

A room lists its implementations, best first, as `Backend` rows. `choose` asks each one for its reason to refuse the
request and takes the first that has none. The choice keeps the reasons, so that nobody has to guess why a kernel did
not run.

**Which GPUs.** Tensor cores are used on compute capability 9.x alone. What this library promises is bits, and those
were measured on Hopper: the order of scales, the 13 fraction bits of `fast`, where `promoted` hands over, the codes
that its conversion instruction gives. Older GPUs have no such product, or (8.9, Ada) one that was not looked at. Newer
ones (10.x and 12.x, Blackwell) have FP8 tensor cores, but torch offers the 1x128 and 128x128 scales of `blockwise` on
9.0 only, and their accumulator and our kernels were tried by nobody here. They get the definitions, with a warning,
instead of numbers that nobody vouches for. Whoever has such a GPU: change `HOPPER` below, run the tests marked `gpu`,
and send what differs.

This file is the only door to Triton and to CUDA facts: both are asked for when an operation first needs them, never at
import.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import BackendError, suggest

HOPPER = 9  # the major compute capability of the GPUs on which the bits were measured


@dataclass(frozen=True)
class Backend:
    """One implementation: its name, what it needs (for the table in the README), why it refuses a request (None: it
    does not), and the module that holds the function named after the operation."""

    name: str
    needs: str
    why_not: Callable[[Any], str | None]
    module: str


@dataclass(frozen=True)
class Choice:
    """The implementation that will run, and each better one's reason for not running."""

    name: str
    run: Callable[..., Any]
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f" ({name}: {reason})" for name, reason in self.refused)


def choose(operation: str, backends: tuple[Backend, ...], request: Any, forced: str | None = None) -> Choice:
    """The first backend that accepts the request, or the one that the caller forced.

    Raises `BackendError`, with every backend's reason, when none accepts.
    """
    if forced is not None and forced not in (names := [b.name for b in backends]):
        raise BackendError(f"{operation} has no backend {forced!r}. {suggest(forced, names)}")
    refused = []
    for backend in backends:
        if forced is not None and backend.name != forced:
            continue
        reason = backend.why_not(request)
        if reason is None:
            _tell_of_another_gpu(operation, backend, request.device)
            return Choice(backend.name, _on(request.device, function(backend.module, operation)), tuple(refused))
        refused.append((backend.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise BackendError(f"no backend can run {operation}. {reasons}")


def _tell_of_another_gpu(operation: str, backend: Backend, device: torch.device) -> None:
    """Warn, once a place by default, that a GPU other than Hopper runs the definitions: right, and slow."""
    if device.type == "cuda" and backend.name == "reference" and (reason := why_not_hopper(device)) is not None:
        warnings.warn(f"{operation} runs the reference implementation: {reason}.", stacklevel=4)


def _on(device: torch.device, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` where the tensors are: kernels start on the current GPU, which in a process with several is another one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2 or device.index in (None, torch.cuda.current_device()):
        return run

    def there(*arguments: Any, **options: Any) -> Any:
        with torch.cuda.device(device):
            return run(*arguments, **options)

    return there


@cache
def function(module: str, name: str) -> Callable[..., Any]:
    """A function by address, imported when it is first needed."""
    return getattr(importlib.import_module(module), name)


@cache
def has_triton() -> bool:
    """Whether Triton is installed. It is looked for, not imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def why_not_hopper(device: torch.device) -> str | None:
    """Why Hopper's FP8 tensor cores cannot be used on this device; None when they can."""
    if device.type != "cuda":
        return f"the tensors are on {device}; it needs a CUDA device"
    major, minor = capability(device.index or 0)
    if major == HOPPER:
        return None
    older = "and the FP8 tensor cores used here are those of 9.0 (Hopper)"
    newer = "newer than 9.0 (Hopper): its accumulator is another one, and nothing here was measured on it"
    return (
        f"the GPU has compute capability {major}.{minor}, {older if major < HOPPER else newer}. The sums are "
        "exact, and slow; fp8.autocast(enabled=False) and convert(only_if_faster=True) keep to BF16"
    )


def why_not_triton(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run on this device; None when they can."""
    if (reason := why_not_hopper(device)) is not None:
        return reason
    return None if has_triton() else "Triton is not installed (it comes with torch's CUDA builds: pip install triton)"


def why_not_cuda(device: torch.device) -> str | None:
    """Why our CUDA C++ kernels cannot run on this device; None when they can."""
    if (reason := why_not_hopper(device)) is not None:
        return reason
    return function("fp8.nvrtc", "why_not")()
