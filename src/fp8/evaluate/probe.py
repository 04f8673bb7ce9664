"""What the codes of a training step did: scales, shares saturated and flushed to zero, and how often each code occurs.

A probe runs one forward and backward of its own, in evaluation mode, in which nothing of a run changes: delayed scaling
notes nothing, gradients are dropped, no random number is drawn. Hooks on the FP8 parts of the layers see each operand
as it goes in (x, the weight, and the gradient of y) and quantize it as the layer does. Quantization is a pure
function, so these are the layer's codes. It works for a compiled run too, for the probe itself is eager.

What is seen is each operand as it lies; where a transposed operand has scales of its own (tiles of a row or a block),
those are not counted again. A product that runs `fast` over more than 4096 terms is also asked how far Hopper's short
accumulator is off on this very data (`accumulation.py`), and a warning says where that is more than 1 %.
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
from .accumulation import deep_and_fast, fast_bias, some_rows, warn_of_bias
from .perplexity import token_loss

X, W, GRAD = range(3)
Rows = tuple[Tensor, Tensor | None]  # codes of some rows of an operand, and of its transpose
Seen = dict[str, dict[str, dict[str, float]]]


class Probe:
    """What one forward and backward saw.

    layers      {layer: {"x" | "w" | "grad": {scale (the median one), scale_max, amax, saturated, flushed, elements}}}
    histogram   {"x" | "w" | "grad": how often each of the 256 codes occurred, over all layers}
    products    {layer: {"forward" | "grad_x" | "grad_w": how often this FP8 product ran}}
    bias        {layer: {product: share by which a deep `fast` sum is off, -0.07 being 7 % too small}}
    """

    def __init__(self) -> None:
        self.layers: Seen = defaultdict(dict)
        self.histogram = {role: torch.zeros(256, dtype=torch.int64) for role in OPERANDS}
        self.products: dict[str, dict[str, int]] = defaultdict(dict)
        self.bias: dict[str, dict[str, float]] = defaultdict(dict)

    @torch.no_grad()
    def see(self, part: Fp8Products, weight: Tensor, which: int, x: Tensor, both: bool = False) -> Rows:
        """Quantize an operand as the layer does, and note what became of it; some rows of it, and of its transpose if
        `both`."""
        matrix = x.detach().reshape(-1, x.shape[-1])
        assert part.recipe is not None
        q, q_t = part.run(part.recipe, weight, False).quantize(matrix, which, both)
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
        return some_rows(q), some_rows(q_t) if q_t is not None else None

    def forward(self, part: Fp8Products, weight: Tensor, x: Tensor) -> tuple[list[str], Rows, Rows]:
        """See x and the weight; which products are deep and fast, and rows of both."""
        assert part.recipe is not None
        asked = deep_and_fast(part.recipe, (x.numel() // x.shape[-1], x.shape[-1]), (weight.shape[0], weight.shape[1]))
        turned = asked not in ([], ["forward"])
        rows_x, rows_w = self.see(part, weight, X, x, turned), self.see(part, weight, W, weight, turned)
        if "forward" in asked:
            self.measure(part.name, "forward", rows_x[0], rows_w[0])
        return asked, rows_x, rows_w

    def backward(self, part: Fp8Products, weight: Tensor, asked: list[str], x: Rows, w: Rows, grad: Tensor) -> None:
        """See the gradient of y."""
        g, g_t = self.see(part, weight, GRAD, grad, "grad_w" in asked)
        for product, a, b in (("grad_x", g, w[1]), ("grad_w", g_t, x[1])):
            if product in asked:
                self.measure(part.name, product, a, b)

    def measure(self, layer: str, product: str, a: Tensor | None, b: Tensor | None) -> None:
        """How far `fast` is off on these rows."""
        assert a is not None and b is not None
        self.bias[layer][product] = fast_bias(a, b)
        warn_of_bias(layer, product, a.shape[1], self.bias[layer][product])

    def to_dict(self) -> dict[str, Any]:
        histogram = {role: counts.tolist() for role, counts in self.histogram.items()}
        return {"layers": dict(self.layers), "histogram": histogram, "products": dict(self.products)} | (
            {"bias": dict(self.bias)} if self.bias else {}
        )


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
    if part.recipe is None:
        return
    cast = torch.is_autocast_enabled(x.device.type)
    met = seen.forward(part, weight, x.to(torch.get_autocast_dtype(x.device.type)) if cast else x)
    if y.requires_grad:
        y.register_hook(partial(seen.backward, part, weight, *met))


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
