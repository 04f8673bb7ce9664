"""When is an FP8 layer faster than BF16? One layer's training step, from measured rates.

BF16 multiplies three times. FP8 multiplies three times at a higher rate, and also reads x, w and grad and writes their
codes in two orientations. A step takes the longer of what the GPU needs and of what the host needs to launch it, so a
small layer loses twice: its products are too short to hide filling and starting, and its casts are launches that BF16
does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import Recipe
from . import gemm, traffic
from .rates import Rates, rates
from .shape import kinds_of, scheme_of, shapes_of

# Kernels of a cast: an amax found first is a second one.
CAST_KERNELS = {"current": 2, "delayed": 1, "row": 2, "block": 1}
# Small kernels that keep the state of delayed scaling, a layer and step (in a profile of four Llama-3-8B layers).
STATE_KERNELS = {"current": 0, "delayed": 17, "row": 0, "block": 0}


@dataclass(frozen=True)
class Linear:
    """Seconds of one layer's forward and backward: products, quantizing (x, grad and w apart), and the host's part."""

    products: float
    activations: float
    weight: float
    host: float

    @property
    def gpu(self) -> float:
        return self.products + self.activations + self.weight

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.host)


@dataclass(frozen=True)
class Gain:
    """BF16 time over FP8 time, both in seconds, and what decided."""

    bf16: Linear
    fp8: Linear

    @property
    def ratio(self) -> float:
        return self.bf16.seconds / self.fp8.seconds

    @property
    def faster(self) -> bool:
        return self.ratio > 1

    @property
    def reason(self) -> str:
        """The figures that decided, in a few words."""
        before, after = self.bf16, self.fp8
        if max(after.host, before.host) > max(after.gpu, before.gpu):
            return f"launching takes the host {_us(after.host)}, in BF16 {_us(before.host)}; the GPU needs less"
        saved, added = before.products - after.products, after.activations + after.weight
        if saved <= 0:
            return f"its products are no faster in FP8: {_us(before.products)} and {_us(after.products)}"
        word = "saves" if self.faster else "would save"
        return f"FP8 {word} {_us(saved)} of {_us(before.products)} in products, quantizing costs {_us(added)}"


def linear_gain(
    tokens: int,
    n: int,
    k: int,
    recipe: Recipe,
    *,
    x_from: str = "norm",
    grad_from: str = "residual",
    fused: bool = False,
    compiled: bool = True,
    graph: bool = False,
    weight_bytes: float = 2.0,
    uses: float = 1.0,
    known: Rates | None = None,
) -> Gain:
    """A layer with weight [n, k] on `tokens` rows: BF16 beside `recipe`.

    x_from, grad_from   where its input and its gradient come from (`shape.Product`); count where `fused`
    weight_bytes        of an element of the parameter: 2 for BF16, 4 for FP32
    uses                micro-batches that share one quantization of the weight
    """
    known = known or rates()
    how = (tokens, n, k, x_from, grad_from, fused, compiled, graph, weight_bytes, uses, known)
    return Gain(_linear(None, *how), _linear(recipe, *how))


def _linear(
    recipe: Recipe | None, tokens: int, n: int, k: int, x_from: str, grad_from: str, fused: bool, compiled: bool,
    graph: bool, weight_bytes: float, uses: float, known: Rates,
) -> Linear:  # fmt: skip
    products = products_seconds(recipe, tokens, n, k, known)
    if recipe is None:
        return Linear(products, 0.0, 0.0, 0.0 if graph else 3 * known.host["compiled op" if compiled else "op"])
    scheme = scheme_of(recipe)
    x = cast_seconds(scheme, traffic.quantizing(scheme, x_from, fused), tokens * k, known)
    grad = cast_seconds(scheme, traffic.quantizing(scheme, grad_from, fused), tokens * n, known)
    weight = weight_seconds(scheme, n * k, weight_bytes, known) / uses + state_seconds(scheme, known)
    return Linear(products, x + grad, weight, 0.0 if graph else host_seconds(recipe, compiled, fused, uses, known))


def products_seconds(recipe: Recipe | None, tokens: int, n: int, k: int, known: Rates) -> float:
    """The three products, in a step: rates of a product alone times what a hot GPU sustains."""
    sustained = known.sustained["bf16" if recipe is None else "fp8"]
    pairs = zip(shapes_of(tokens, n, k), kinds_of(recipe), strict=True)
    return sum(gemm.seconds(*shape, kind, known) for shape, kind in pairs) / sustained


def cast_seconds(scheme: str, bytes_each: float, elements: float, known: Rates) -> float:
    """Quantizing `elements` both ways at `bytes_each` bytes; nothing where a producer does it without extra bytes."""
    if bytes_each == 0:
        return 0.0
    return CAST_KERNELS[scheme] * known.kernel + bytes_each * elements / known.cast[traffic.CAST[scheme]]


def weight_seconds(scheme: str, elements: float, weight_bytes: float, known: Rates) -> float:
    """Quantizing a weight both ways, once."""
    each = traffic.WEIGHT[scheme] + (weight_bytes - 2) * traffic.WEIGHT_READS[scheme]
    return CAST_KERNELS[scheme] * known.kernel + each * elements / known.cast[traffic.CAST_WEIGHT[scheme]]


def state_seconds(scheme: str, known: Rates) -> float:
    """Keeping the state of delayed scaling: launches, and nothing to compute."""
    return STATE_KERNELS[scheme] * known.kernel


def host_seconds(recipe: Recipe, compiled: bool, fused: bool, uses: float, known: Rates) -> float:
    """The host's part of an FP8 layer: three products, two casts (none where producers make the codes), and its share
    of the weight's."""
    before = "compiled " if compiled else ""
    casts = (0 if fused else 2) + 1 / uses
    state = STATE_KERNELS[scheme_of(recipe)] * known.host[f"{before}op"]
    return state + 3 * known.host[f"{before}product"] + casts * known.host[f"{before}cast"]


def _us(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
