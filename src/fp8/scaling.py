"""Delayed scaling: this step's scales come from the amaxes of the steps before it, so that no kernel reads its input
twice.

During a step, the kernels of a layer only raise `pending` to the finite amax of what they quantized. A maximum is
idempotent, so recomputing a layer, sharing it, calling it twice or splitting the batch into micro-batches needs no
bookkeeping; evaluation writes nothing. Once a step, after the optimizer, `update` looks at all layers together, on the
device, without reading anything back:

    found_inf          pending is thrown away: a step that did not count leaves no trace
    first time         the scale is computed, due or not: until then each use had its own
    nothing written    the tensor keeps its history and its scale
    else               pending enters the window, and  scale = power of two above  reduce(window) * 2^margin / max
    pending > max * scale   something saturated: the next scale is at least twice this one, due or not

The state of one layer is three rows, for x, w and grad. Slots of the window that were never filled hold -1, and so does
a `pending` that was not written. **The first use** of an operand has no history and scales by its own amax, as current
scaling does; how many steps each operand has been seen is counted on the host, so that nothing synchronizes.

`ArticleState` is the `DynamicScaler` of the article "FP8 Training and Inference", with its E5M2 maximum of 240
corrected and all else as printed: the mean of 32 multiplying scales, one replaced every 4 calls, starting from 65536,
and a back-off of 0.99 that is overwritten before it ever reaches the mean. It saturates for the first hundred calls;
that is what it is kept for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format, format_of
from .quantize.reference import scale_of
from .recipe import OPERANDS, Recipe

FLOAT32_MAX = torch.finfo(torch.float32).max


class ScaleState(nn.Module):
    """Buffers of one layer, [3, ...] for x, w, grad. They stay FP32 when the model is cast."""

    formats: tuple[Format, ...]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.delayed is not None
        self.delayed = recipe.delayed
        self.power_of_two = recipe.power_of_two
        self.formats = tuple(format_of(getattr(recipe, operand).format) for operand in OPERANDS)

    def serves(self, recipe: Recipe) -> bool:
        """Whether this is the state that the recipe's layers keep."""
        formats = tuple(format_of(getattr(recipe, operand).format) for operand in OPERANDS)
        return (self.delayed, self.power_of_two, self.formats) == (recipe.delayed, recipe.power_of_two, formats)

    def before(self, operand: int, x: Tensor, record: bool) -> Tensor | None:
        """The scale [1, 1] to quantize `x` with; None: measure it."""
        raise AssertionError("each rule has its own")

    def slot(self, operand: int) -> Tensor | None:
        """The amax [] that quantizing with `before`'s scale is to raise in place; None: hand a new one to `after`."""
        return None

    def after(self, operand: int, amax: Tensor, scale: Tensor) -> None:
        """Take note of what was quantized."""

    def noted(self, operand: int, scale: Tensor) -> None:
        """The rest of `after`, where a kernel has raised the amax itself."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaleState:
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, fn(buffer) if buffer.is_meta else buffer.to(fn(buffer).device))
        return self


class DelayedState(ScaleState):
    """Amax history of one layer: `history` [3, window] oldest first, `scale` [3], `pending` [3], all FP32; and, on the
    host, for how many steps each operand was seen (`filled`) and how many steps there were (`steps`)."""

    history: Tensor
    scale: Tensor
    pending: Tensor
    largest: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.register_buffer("history", torch.full((3, self.delayed.window), -1.0))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("pending", torch.full((3,), -1.0))
        self.register_buffer("largest", torch.tensor([f.max for f in self.formats]), persistent=False)
        self.filled = [0, 0, 0]
        self.warm = [False, False, False]
        self.seen = [False, False, False]
        self.steps = 0

    def before(self, operand: int, x: Tensor, record: bool) -> Tensor | None:
        if not self.warm[operand]:
            return None
        return self.scale[operand].clone().view(1, 1)  # a copy: cuBLASLt wants 16-byte alignment, and `update` writes

    def slot(self, operand: int) -> Tensor | None:
        compiling = torch.compiler.is_compiling()  # an operator of a graph returns its amax
        return self.pending[operand] if self.warm[operand] and not compiling else None

    def after(self, operand: int, amax: Tensor, scale: Tensor) -> None:
        record(self.pending, amax, operand)
        self.noted(operand, scale)

    def noted(self, operand: int, scale: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self.seen[operand] = True
        if not self.warm[operand]:  # stands until the first update, and after it if that step is discarded
            overwrite(self.scale, scale.reshape(()), operand)

    @property
    def starting(self) -> bool:
        """Whether this step has seen an operand for the first time."""
        return any(seen and not warm for seen, warm in zip(self.seen, self.warm, strict=True))

    def expect(self, *operands: int) -> None:
        """Mark operands that this step quantizes, where Python is not there to see it: in a compiled graph."""
        for operand in operands:
            self.seen[operand] = True

    def believe_what_was_written(self) -> None:
        """Of operands without a scale, keep as seen only those that left an amax. A compiled forward announces its
        gradient, but a backward may never come; the next use must then measure itself. Reads from the device."""
        written = (self.pending >= 0).tolist()
        self.seen = [seen and (warm or left) for seen, warm, left in zip(self.seen, self.warm, written, strict=True)]

    def count_step(self, counts: bool) -> None:
        """The host's half of `update`."""
        self.steps += 1
        for operand in range(3):
            self.filled[operand] += self.seen[operand] and counts
            self.warm[operand] = self.filled[operand] > 0
            self.seen[operand] = False

    def get_extra_state(self) -> Tensor:
        return torch.tensor([*self.filled, self.steps], dtype=torch.int64)

    def set_extra_state(self, state: Any) -> None:
        *self.filled, self.steps = (int(n) for n in state)
        self.warm = [n > 0 for n in self.filled]


class ArticleState(ScaleState):
    """The article's scaler, once per operand: `history` [3, window] of multiplying scales, `scale` [3], `calls` [3]."""

    history: Tensor
    scale: Tensor
    calls: Tensor
    START, BACK_OFF, EPSILON = 65536.0, 0.99, 1e-8

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.register_buffer("history", torch.full((3, self.delayed.window), self.START))
        self.register_buffer("scale", torch.full((3,), self.START))
        self.register_buffer("calls", torch.zeros(3))

    def before(self, operand: int, x: Tensor, record: bool) -> Tensor:
        if not record:
            return (1.0 / self.history[operand].mean()).view(1, 1)
        finite = torch.where(x.isfinite(), x.abs(), 0.0)
        peak = finite.amax().float() if x.numel() else self.scale.new_zeros(())
        maximum = self.formats[operand].max
        due = self.calls[operand] % self.delayed.update_every == 0
        fresh = maximum / (peak + self.EPSILON)
        pushed = torch.cat([self.history[operand, 1:], fresh.view(1)])
        history = torch.where(due, pushed, self.history[operand])
        used = history.mean()
        scale = torch.where(due, fresh, self.scale[operand])
        overflowed = peak * used > maximum
        overwrite(self.history, history, operand)
        overwrite(self.scale, torch.where(overflowed, scale * self.BACK_OFF, scale), operand)
        overwrite(self.calls, self.calls[operand] + 1, operand)
        return (1.0 / used).view(1, 1)


def state_for(recipe: Recipe) -> ScaleState | None:
    """The state that a recipe's layers keep; None under current scaling."""
    if recipe.delayed is None:
        return None
    return ArticleState(recipe) if recipe.delayed.rule == "article" else DelayedState(recipe)


@torch.no_grad()
def update(states: Iterable[ScaleState], found_inf: Tensor | bool | None = None) -> None:
    """The one update a step. `found_inf` (a bool, or a tensor, which is read on the device only once all
    have a scale): this step did not count."""
    states = [state for state in states if isinstance(state, DelayedState)]
    starting = [state for state in states if state.starting]
    for state in starting:
        state.believe_what_was_written()
    if isinstance(found_inf, Tensor) and starting:
        found_inf = bool(found_inf)  # read once: a first scale that comes from a discarded step is none
    groups: dict[Any, list[DelayedState]] = {}
    for state in states:
        due = (state.steps + 1) % state.delayed.update_every == 0
        groups.setdefault((state.delayed, state.formats, state.power_of_two, state.scale.device, due), []).append(state)
    for (*_, due), members in groups.items():
        _update_group(members, found_inf, due)
        for state in members:
            state.count_step(not (isinstance(found_inf, bool) and found_inf))


def _update_group(states: list[DelayedState], found_inf: Tensor | bool | None, due: bool) -> None:
    """Layers with equal settings, stacked: history [L, 3, W], scale and pending [L, 3]."""
    first = states[0]
    history = torch.stack([s.history for s in states])
    scale = torch.stack([s.scale for s in states])
    pending = torch.stack([s.pending for s in states])
    written, unfilled = pending >= 0, history[..., -1] < 0
    if isinstance(found_inf, Tensor):
        written &= ~(found_inf.to(scale.device) != 0)
    elif found_inf:
        written.zero_()
    pushed = torch.cat([history[..., 1:], pending.unsqueeze(-1)], -1)
    history = torch.where(written.unsqueeze(-1), pushed, history)
    following = scale
    if due or not all(all(s.warm) for s in states):
        amax = (reduced(history, first.delayed.reduce) * 2.0**first.delayed.margin).clamp(max=FLOAT32_MAX)
        columns = [scale_of(amax[:, i].contiguous(), f, first.power_of_two) for i, f in enumerate(first.formats)]
        fresh = torch.stack(columns, 1)
        following = fresh if due else torch.where(unfilled, fresh, scale)
    backed_off = torch.where(pending > first.largest * scale, torch.maximum(following, 2 * scale), following)
    torch._foreach_copy_([s.history for s in states], list(history))
    torch._foreach_copy_([s.scale for s in states], list(torch.where(written, backed_off, scale)))
    torch._foreach_copy_([s.pending for s in states], list(torch.full_like(pending, -1.0)))


def reduced(history: Tensor, reduce: str) -> Tensor:
    """The filled slots of a window [..., W], oldest first, as one amax; negative if none is filled."""
    if reduce == "max":
        return history.amax(-1)
    if reduce == "most_recent":
        return history[..., -1]
    filled = history >= 0
    total = history.new_zeros(history.shape[:-1])
    for slot in range(history.shape[-1]):  # oldest first, so that the FP32 sum has one order
        total = total + torch.where(filled[..., slot], history[..., slot], 0.0)
    return total / filled.sum(-1).clamp(min=1)


@torch.no_grad()
def scale_gradients(states: Iterable[ScaleState], ratio: Tensor | float) -> None:
    """A loss scale that was multiplied by `ratio` multiplies what is remembered of gradients.

    The scale stays a power of two: where the ratio is none, it takes the next one above.
    """
    ratio = torch.as_tensor(ratio, dtype=torch.float32)
    mantissa, exponent = torch.frexp(ratio)
    up = torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())
    for state in states:
        if isinstance(state, DelayedState):
            row = state.history[2]
            row.copy_(torch.where(row >= 0, row * ratio.to(row.device), row))
            state.scale[2].mul_((up if state.power_of_two else ratio).to(row.device)).clamp_(2.0**-126, 2.0**126)


# In a compiled graph, a buffer may change only inside an operator that says so: hence these two.


@torch.library.custom_op("fp8::record", mutates_args=("pending",))
def _record(pending: Tensor, amax: Tensor, index: int) -> None:
    pending[index].copy_(torch.maximum(pending[index], amax))


@torch.library.custom_op("fp8::overwrite", mutates_args=("buffer",))
def _overwrite(buffer: Tensor, value: Tensor, index: int) -> None:
    buffer[index].copy_(value)


@_record.register_fake
def _(pending: Tensor, amax: Tensor, index: int) -> None: ...


@_overwrite.register_fake
def _(buffer: Tensor, value: Tensor, index: int) -> None: ...


def record(pending: Tensor, amax: Tensor, index: int) -> None:
    """`pending[index] = max(pending[index], amax)`, in place."""
    torch.ops.fp8.record(pending, amax, index)


def overwrite(buffer: Tensor, value: Tensor, index: int) -> None:
    """`buffer[index] = value`, in place."""
    torch.ops.fp8.overwrite(buffer, value, index)
