"""Forward and backward of all micro-batches of a step as one CUDA graph, replayed from the third step on.

A small model's kernels are over before Python has started the next ones; FP8 has more of them than BF16, and loses. A
replay starts them all at once. The optimizer's step stays outside, so that a loss that is lost is seen before it
updates anything, and learning rates may be numbers.

The first two steps run as ever: kernels are compiled, and delayed scales found. Replayed kernels are the same ones, so
a run gives the same bits with and without the graph (unless the model draws random numbers: capturing draws some). What
else moves the model or its gradients between steps, an evaluation or a callback, does not disturb it: rows, gradients
and results have places of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.graph import Graphed, graph

Measure = Callable[[Sequence[Tensor]], Tensor]  # micro-batches -> [loss, norm of the gradient]; leaves the gradient
EAGER = 2


class Captured:
    """Called like `measure`, with micro-batches of one shape. Raises `ConfigError` where there is no GPU."""

    def __init__(self, measure: Measure, model: nn.Module, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"graph=True replays a CUDA graph, and device={str(device)!r} has none: leave it out.")
        self.measure, self.model, self.device = measure, model, device
        self.calls = 0
        self.graph: Graphed[Tensor] | None = None

    def __call__(self, rows: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        if self.calls <= EAGER:
            return self.measure(rows)
        if self.graph is None:
            self._capture(rows)
        assert self.graph is not None
        self.rows.copy_(torch.stack(list(rows)))
        out = self.graph()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return out

    def _capture(self, rows: Sequence[Tensor]) -> None:
        self.rows = torch.stack(list(rows)).to(self.device)

        def step() -> Tensor:
            for parameter in self.model.parameters():
                parameter.grad = None
            return self.measure(tuple(self.rows))

        before = [(buffer, buffer.clone()) for buffer in kept_buffers(self.model)]
        self.graph = graph(step, self.model, warm_up=2)
        for buffer, value in before:  # the warm-up was no step of the run
            buffer.copy_(value)
        self.gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]


def kept_buffers(model: nn.Module) -> Iterator[Tensor]:
    """What a model remembers besides its parameters: statistics, amaxes; not the weight codes, which are made anew."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer
