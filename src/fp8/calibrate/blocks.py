"""Running the blocks of a model by themselves: how the model calls each of them, and with what it begins.

Between its blocks a transformer passes hidden states on, and gives each block positions and masks besides, which depend
on the shape of a batch and not on its tokens. `calls_of` learns them by letting the model run with blocks that only
take notes, and refuses a model where a second batch is called otherwise; `entering` gives the hidden states that enter
the first block. With both, block after block can be run alone, as often as is needed, while the others stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.source import Source
from ..errors import CheckpointError
from .running import fill


class Enough(Exception):  # noqa: N818  it is none
    """What was wanted of a run; the rest of it need not be computed."""

    def __init__(self, found: Any) -> None:
        self.found = found


@dataclass(frozen=True)
class Call:
    """What a block is given besides the hidden states, by the number of rows."""

    given: dict[int, tuple[tuple, dict[str, Any]]]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        args, named = self.given[len(hidden)]
        out = block(hidden, *args, **named)
        return out[0] if isinstance(out, tuple) else out


def run_inner(model: nn.Module, rows: Tensor) -> None:
    inner: Any = getattr(model, "base_model", model)
    caches = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
    inner(input_ids=rows, **caches)


def entering(model: nn.Module, first: nn.Module, rows: Tensor) -> Tensor:
    """The hidden states [B, T, D] that enter the first block."""

    def stop(module: nn.Module, args: Any, named: Any) -> None:
        raise Enough(_split(args, named)[0])

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_inner(model, rows)
    except Enough as enough:
        return enough.found
    finally:
        handle.remove()
    raise CheckpointError("this model does not run through its first layer: it cannot be compensated.")


def _split(args: tuple, named: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """Hidden states, and the rest."""
    if args:
        return args[0], args[1:], named
    return named["hidden_states"], (), {k: v for k, v in named.items() if k != "hidden_states"}


def calls_of(model: nn.Module, blocks: list, source: Source, batches: Sequence[Tensor], device: str) -> list[Call]:
    """How the model calls each of its blocks, for batches of every size that occurs.

    Raises `CheckpointError` where that depends on the tokens: then hidden states are not all that a block needs.
    """
    calls = [Call({}) for _ in blocks]
    sizes = [len(batch) for batch in batches]
    for i in sorted({sizes.index(size) for size in sizes} | {len(sizes) - 1, max(len(sizes) - 2, 0)}):
        batch = batches[i]
        for call, given in zip(calls, noted(model, blocks, source, batch, device), strict=True):
            if not same(call.given.setdefault(len(batch), given), given):
                raise CheckpointError(
                    "the layers of this model are given more of the text than hidden states, so they cannot be run "
                    "alone: quantize it without compensation."
                )
    return calls


def noted(model: nn.Module, blocks: list, source: Source, rows: Tensor, device: str) -> list:
    """What each block is called with in one run, blocks themselves passing hidden states on as they came."""
    notes: list = []
    fill(model, source, blocks[0][2], device)
    alone: list[bool] = []  # whether a block gives a tensor, not a tuple

    def note(module: nn.Module, args: Any, named: Any, real: Any) -> Any:
        hidden, rest, others = _split(args, named)
        notes.append((rest, others))
        if not alone:
            alone.append(isinstance(real(*args, **named), Tensor))
        return hidden if alone[0] else (hidden,)

    with replaced_forwards([block for _, block, _ in blocks], note):
        run_inner(model, rows)
    return notes


@contextmanager
def replaced_forwards(blocks: list[nn.Module], note: Callable[..., Any]) -> Iterator[None]:
    def wrapper(block: nn.Module, real: Any) -> Any:
        return lambda *args, **named: note(block, args, named, real)

    own = [vars(block).get("forward") for block in blocks]  # of a block that somebody has wrapped before
    for block in blocks:
        block.forward = wrapper(block, block.forward)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


def same(a: Any, b: Any) -> bool:
    """Equality of what is made of tuples, dictionaries and tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or a == b
