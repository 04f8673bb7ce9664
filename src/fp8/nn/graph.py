"""A training step as one CUDA graph: for models whose kernels are shorter than the time it takes to start them.

A graph replays the kernels of one step, on the same memory, without Python. So what a step decides on the host is
decided once: the step reads its batch from tensors that keep their place (copy the next batch into them), learning
rates are tensors, and the optimizer is `capturable`. What FP8 adds replays like the rest: amaxes, the update of delayed
scales and the refresh of weight codes are kernels. Only the counters of steps live on the host; each replay moves them.

Weight codes keep their place until the model is moved, cast or loaded into, which drops them. A graph captured before
would read and write the old ones: it says so instead of replaying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

from ..errors import ConfigError
from ..scaling import DelayedState
from .products import Fp8Products

Outputs = TypeVar("Outputs")


class Graphed(Generic[Outputs]):
    """A captured step: call it to replay. It returns what the step returned, in the same tensors each time."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        outputs: Outputs,
        model: nn.Module,
        step: Callable[[], Outputs],
        updates: bool = True,
    ) -> None:
        self.graph, self.outputs, self.states, self.updates = graph, outputs, _states(model), updates
        self.held = [(part, part.codes) for part in model.modules() if isinstance(part, Fp8Products)]
        self.kept = step, [part.prepared for part, _ in self.held]  # what the graph reads lives as long as the graph

    def __call__(self) -> Outputs:
        if any(part.codes is not codes for part, codes in self.held):
            raise ConfigError(
                "the model was moved, cast or loaded into after its step was captured, so the graph's weight codes are "
                "no longer the model's: capture the step again with fp8.graph."
            )
        self.graph.replay()
        for state in self.states:
            state.expect(*(operand for operand in range(3) if state.warm[operand]))
            if self.updates:
                state.count_step(True)
        return self.outputs


def graph(step: Callable[[], Outputs], model: nn.Module, warm_up: int = 3) -> Graphed[Outputs]:
    """Run `step` a few times, then capture it.

    step      one training step without arguments: forward, backward, optimizer, `zero_grad`; it may return tensors. The
              warm-up consists of real steps: they change the weights, as replays do. Or without the optimizer, which
              then runs between replays: gradients must keep their place
    model     its FP8 layers' delayed scales are updated in the step (`fp8.attach`, or `fp8.update_scales`), or were
              updated before, by steps that ran as ever, and are updated between replays
    warm_up   steps before the capture; kernels are compiled and delayed scales found in them. At least 1; with delayed
              scales 2, for the first step measures and the second one uses what was measured

    Raises `ConfigError` without a GPU, and for delayed scales that are not updated in every step.
    """
    if not torch.cuda.is_available():
        raise ConfigError("fp8.graph captures a CUDA graph, and there is no CUDA GPU here: call the step itself.")
    if warm_up < 1:
        raise ConfigError(f"warm_up={warm_up}: a step must have run once before it can be captured.")
    states = _states(model)
    if states and warm_up < 2:
        raise ConfigError(f"warm_up={warm_up}: with delayed scales, two steps must have run before one is captured.")
    before = {state: state.steps for state in states}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    states = _states(model)  # an autocast makes them in the first step
    updates = _updated(states, before)
    if any(state.starting or not any(state.warm) for state in states):
        raise ConfigError(
            "no delayed scale was updated in the warm-up: let the step end with fp8.update_scales(model), or attach it "
            "to the optimizer with fp8.attach."
        )
    captured, counted = torch.cuda.CUDAGraph(), [(list(state.filled), state.steps) for state in states]
    with torch.cuda.graph(captured):
        outputs = step()
    for state, (filled, steps) in zip(states, counted, strict=True):
        state.filled, state.steps = filled, steps  # a capture runs nothing on the device
    return Graphed(captured, outputs, model, step, updates)


def _states(model: nn.Module) -> list[DelayedState]:
    return [module for module in model.modules() if isinstance(module, DelayedState)]


def _updated(states: list[DelayedState], before: dict[DelayedState, int]) -> bool:
    """Whether the warm-up updated scales, which a replay then does too; only every step's update can be replayed."""
    if not any(state.steps > before.get(state, 0) for state in states):
        return False
    for state in states:
        if state.delayed.update_every != 1:
            raise ConfigError(
                f"delayed scales that are updated every {state.delayed.update_every} steps cannot be captured, for a "
                "graph repeats one step: use update_every=1."
            )
    return True
