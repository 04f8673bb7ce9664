"""A whole training step: seconds by kind of work, and the host's time beside them.

    step = max(GPU, host)      GPU = products + quantizing + attention + norms, activation, RoPE, copies
                                     + head, loss, embedding + optimizer

A GPU works through its kernels while the host is ahead of it; where the host is slower the GPU waits, and then only
the host counts. In a CUDA graph the host's part is nothing. Each kernel costs at least `kernel` seconds.

The optimizer is torch's fused AdamW over all parameters; clipping is counted where an optimizer is. Weights are
quantized once a step. Communication between GPUs is not in here: `advise/plan.py` says what it assumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..recipe import Recipe
from . import layer, traffic
from .rates import Rates, rates
from .shape import Architecture, Product, scheme_of

# What the host launches in a block, forward and backward, beside products and casts. Compiled: counted in a profile of
# four Llama-3-8B layers (38, of which 16 clear attention's buffers). Eager: the operations of a block counted on a CPU
# (about 120 of them are kernels on a GPU). Fused, and head with loss: estimates.
COMPILED_OPS, EAGER_OPS, FUSED_OPS = 38, 120, 24
HEAD_OPS = 20


@dataclass(frozen=True)
class Setting:
    """One way to train. `tokens` a step on one GPU, in sequences of `sequence`; `recipe` None is BF16.

    fused      producers that emit codes (`fp8.TransformerLayer`), and one cast a step for all weights
    keep       names of products that stay in BF16
    head_fp8   also the output head
    weights    bytes of a parameter, its gradient and each of its moments: 2 (BF16) or 4 (FP32 masters)
    """

    tokens: int
    sequence: int
    recipe: Recipe | None = None
    fused: bool = False
    compiled: bool = True
    graph: bool = False
    keep: frozenset[str] = field(default=frozenset())
    head_fp8: bool = False
    weights: int = 2
    optimizer: bool = True
    causal: bool = True
    shards: int = 1

    def recipe_of(self, product: Product) -> Recipe | None:
        return None if product.name in self.keep else self.recipe


@dataclass(frozen=True)
class Step:
    """Seconds on the GPU by kind of work, and of the host."""

    parts: dict[str, float]
    host: float

    @property
    def gpu(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.host)

    @property
    def host_bound(self) -> bool:
        return self.host > self.gpu


def step(model: Architecture, setting: Setting, known: Rates | None = None) -> Step:
    """The predicted step of a model."""
    known = known or rates()
    parts: dict[str, float] = {}
    for kind, value in _work(model, setting, known):
        parts[kind] = parts.get(kind, 0.0) + value
    return Step(parts, 0.0 if setting.graph else _host(model, setting, known))


def _work(model: Architecture, setting: Setting, known: Rates) -> Iterator[tuple[str, float]]:
    for product in model.products():
        yield from _linear(product, setting, setting.recipe_of(product), known)
    yield "attention", model.layers * attention_seconds(model, setting, known)
    for row in (*traffic.PASSES, *traffic.ACTIVATION[model.gated]):
        if row.kind != "rope" or model.rope:
            yield row.kind, model.layers * pass_seconds(row, model, setting, known)
    if model.head:
        yield from _ends(model, setting, known)
    if setting.optimizer:
        yield "optimizer", optimizer_seconds(model.parameters, setting, known)


def _linear(product: Product, setting: Setting, recipe: Recipe | None, known: Rates) -> Iterator[tuple[str, float]]:
    each = layer.products_seconds(recipe, setting.tokens, product.n, product.k, known)
    yield ("products, BF16" if recipe is None else "products, FP8"), product.count * each
    if recipe is None:
        if setting.weights == 4:  # autocast makes BF16 weights, once a step
            yield "quantize, cast", 6.0 * product.parameters / known.elementwise
        return
    scheme = scheme_of(recipe)
    for origin, elements in ((product.x_from, product.k), (product.grad_from, product.n)):
        moved = traffic.quantizing(scheme, origin, setting.fused)
        yield "quantize, cast", product.count * layer.cast_seconds(scheme, moved, setting.tokens * elements, known)
    once = layer.weight_seconds(scheme, product.n * product.k, setting.weights, known)
    yield "quantize, cast", product.count * (once + layer.state_seconds(scheme, known))


def _ends(model: Architecture, setting: Setting, known: Rates) -> Iterator[tuple[str, float]]:
    """Embedding, head and loss."""
    head = model.head_product
    yield from _linear(head, setting, setting.recipe if setting.head_fp8 else None, known)
    loss = traffic.LOSS["compiled" if setting.compiled else "eager"]
    yield "loss", loss * setting.tokens * model.vocab / known.elementwise
    moved = traffic.EMBEDDING * setting.tokens * model.hidden
    table = traffic.EMBEDDING_TABLE * setting.weights * model.vocab * model.hidden
    yield "embedding", (moved + table) / known.elementwise + 4 * known.kernel


def pass_seconds(row: traffic.Pass, model: Architecture, setting: Setting, known: Rates) -> float:
    """One row of the byte tables, in one block."""
    each = row.fused if setting.fused else row.compiled if setting.compiled else row.eager
    if each == 0:
        return 0.0
    each += row.wide if setting.weights == 4 else 0.0
    return row.times * (known.kernel + each * elements(row.elements, model, setting.tokens) / known.elementwise)


def elements(name: str, model: Architecture, tokens: int) -> float:
    """How many elements a tensor of the byte tables has."""
    width = {
        "x": model.hidden,
        "qk": (model.heads + model.kv_heads) * model.width,
        "qkv": model.qkv,
        "ctx": model.context,
        "h": model.ffn,
        "up": model.up,
    }
    return float(tokens) * width[name]


def attention_seconds(model: Architecture, setting: Setting, known: Rates) -> float:
    """Forward and backward of one block's attention: 4 T S H D forward (half of it where causal), 2.5 times backward.

    The rate grows with the length of a sequence: peak * S / (S + half).
    """
    s = setting.sequence
    forward = 4.0 * setting.tokens * s * model.context * (0.5 if setting.causal else 1.0)
    ahead = forward / attention_rate(known, model.width, "forward", s)
    back = 2.5 * forward / attention_rate(known, model.width, "backward", s)
    return (ahead + back) / known.sustained["bf16"] + 5 * known.kernel


def attention_rate(known: Rates, head_dim: int, direction: str, sequence: int) -> float:
    """FLOP/s of attention "forward" or "backward", alone."""
    row = known.attention_of(head_dim)
    peak, half = (row.forward, row.forward_half) if direction == "forward" else (row.backward, row.backward_half)
    return peak * sequence / (sequence + half)


def optimizer_seconds(parameters: int, setting: Setting, known: Rates) -> float:
    touches = traffic.ADAMW_TOUCHES + traffic.CLIP_TOUCHES
    return touches * setting.weights * parameters / setting.shards / known.elementwise + 20 * known.kernel


def _host(model: Architecture, setting: Setting, known: Rates) -> float:
    op = known.host["compiled op" if setting.compiled else "op"]
    others = FUSED_OPS if setting.fused else COMPILED_OPS if setting.compiled else EAGER_OPS
    total = model.layers * others * op + (HEAD_OPS * op if model.head else 0.0)
    for product in model.products():
        recipe = setting.recipe_of(product)
        if recipe is None:
            total += product.count * 3 * op
        else:
            total += product.count * layer.host_seconds(recipe, setting.compiled, setting.fused, 1.0, known)
    return total


def model_flops(model: Architecture, setting: Setting) -> float:
    """FLOPs that the model asks for in a step: 6 a weight and token, and attention's. Divided by the step's seconds and
    the GPU's BF16 peak they are its utilization."""
    products = sum(p.parameters for p in model.products()) + (model.head_product.parameters if model.head else 0)
    attention = 3.5 * 4.0 * setting.tokens * setting.sequence * model.context * (0.5 if setting.causal else 1.0)
    return 6.0 * setting.tokens * products + model.layers * attention
