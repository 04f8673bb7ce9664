"""What the codes of a training step did: scales, shares saturated and flushed to zero, and how often each code occurs.

A probe runs one forward and backward of its own, in evaluation mode, in which nothing of a run changes: delayed scaling
notes nothing, gradients are dropped, no random number is drawn. Hooks on the FP8 parts of the layers see each operand
as it goes in (x, the weight, and the gradient of y) and quantize it as the layer does. Quantization is a pure
function, so these are the layer's codes. It works for a compiled run too, for the probe itself is eager.

What is seen is each operand as it lies; where a transposed operand has scales of its own (tiles of a row or a block),
those are not counted again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Fp8Products, count_products
from ..quantize import statistics_of
from ..recipe import OPERANDS
from ..train import Trainer, read_metrics
from ..train.metrics import Metrics, Record
from ..train.tokens import batches
from .perplexity import token_loss

X, W, GRAD = range(3)
Seen = dict[str, dict[str, dict[str, float]]]


class Probe:
    """What one forward and backward saw.

    layers      {layer: {"x" | "w" | "grad": {scale (the median one), scale_max, amax, saturated, flushed, elements}}}
    histogram   {"x" | "w" | "grad": how often each of the 256 codes occurred, over all layers}
    products    {layer: {"forward" | "grad_x" | "grad_w": how often this FP8 product ran}}
    """

    def __init__(self) -> None:
        self.layers: Seen = defaultdict(dict)
        self.histogram = {role: torch.zeros(256, dtype=torch.int64) for role in OPERANDS}
        self.products: dict[str, dict[str, int]] = defaultdict(dict)

    @torch.no_grad()
    def see(self, part: Fp8Products, weight: Tensor, which: int, x: Tensor) -> None:
        """Quantize an operand as the layer does, and note what became of it."""
        if part.recipe is None:
            return
        matrix = x.detach().reshape(-1, x.shape[-1])
        q, _ = part.run(part.recipe, weight, False).quantize(matrix, which, both=False)
        told, role = statistics_of(matrix, q), OPERANDS[which]
        self.layers[part.name][role] = {
            "scale": float(q.scale.median()),
            "scale_max": float(q.scale.max()),
            "amax": float(told.amax),
            "saturated": float(told.saturated),
            "flushed": float(told.flushed),
            "elements": matrix.numel(),
        }
        self.histogram[role] += torch.bincount(q.codes.view(torch.uint8).flatten(), minlength=256).cpu()

    def to_dict(self) -> dict[str, Any]:
        histogram = {role: counts.tolist() for role, counts in self.histogram.items()}
        return {"layers": dict(self.layers), "histogram": histogram, "products": dict(self.products)}


def probe(model: nn.Module, loss: Callable[[], Tensor]) -> Probe:
    """Run `loss()`, which calls the model, forward and backward, and tell what its FP8 operands were."""
    seen, was = Probe(), model.training
    hooks = [m.register_forward_hook(partial(on_forward, seen)) for m in model.modules() if isinstance(m, Fp8Products)]
    model.eval()
    try:
        with count_products() as products:
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was)
        model.zero_grad(set_to_none=True)
    for (name, product), count in products.counts.items():
        seen.products[name][product] = count
    return seen


def on_forward(seen: Probe, part: Fp8Products, args: tuple[Any, ...], y: Tensor) -> None:
    x, weight, _ = args
    cast = torch.is_autocast_enabled(x.device.type)
    seen.see(part, weight, X, x.to(torch.get_autocast_dtype(x.device.type)) if cast else x)
    seen.see(part, weight, W, weight)
    if y.requires_grad:
        y.register_hook(partial(seen.see, part, weight, GRAD))


class Watch:
    """A callback of `train`: probes after the first step and every `interval` steps, on the next step's micro-batch.

    Records go into `path`, a line each, and survive an interruption like the run's own. Use it as a context manager.
    """

    def __init__(self, path: Path, interval: int) -> None:
        self.path, self.interval = path, interval
        self._metrics: Metrics | None = None

    def __call__(self, trainer: Trainer, record: Record) -> None:
        if self._metrics is None:
            self._metrics = Metrics(self.path, trainer.step - 1)
        if record["kind"] == "step" and (trainer.step == 1 or trainer.step % self.interval == 0):
            seen = probe(trainer.model, lambda: next_loss(trainer))
            self._metrics.write({"kind": "probe", "step": trainer.step, **seen.to_dict()})

    def records(self) -> list[Record]:
        """All probes of the run, also those of before it was interrupted."""
        return read_metrics(self.path) if self.path.is_file() else []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._metrics is not None:
            self._metrics.close()


def next_loss(trainer: Trainer) -> Tensor:
    """The loss of the next step's first micro-batch, eager even where the run is compiled."""
    rows = batches(trainer.tokens.train, trainer.config, trainer.step)[0]
    return token_loss(trainer.model, rows, trainer.config.precision)


def shares(layers: Seen, what: str) -> dict[str, float]:
    """A share (`saturated` or `flushed`) by role, over all layers, each element counting once."""
    out = {}
    for role in OPERANDS:
        seen = [roles[role] for roles in layers.values() if role in roles]
        out[role] = sum(s[what] * s["elements"] for s in seen) / max(sum(s["elements"] for s in seen), 1)
    return out
