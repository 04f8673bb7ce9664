"""`fp8 plan`: does this training gain from FP8, by how much, in what memory, and for what money?

Everything is predicted by `fp8.cost` from measured rates; nothing is timed, and no GPU is needed. What is assumed:

- `tokens` are those of one step on one GPU: forward, backward, AdamW and clipping, weights quantized once.
- Of several GPUs each does this at the same time; parameters, gradients and moments are divided among them (FSDP2),
  and communication hides behind computing. It does where a GPU has some thousand tokens a step over NVLink; FP8 makes
  computing shorter and so hides less.
- A layer becomes FP8 where that is predicted to be faster, as `convert(only_if_faster=True)` does; the output head
  stays in BF16 unless asked for (its error goes straight into the loss).

The verdict asks for a gain of 5 % of the whole step. Below that lies what the model itself is off, and an FP8 run has
to be watched, which costs more than 5 % of somebody's time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cost import GPUS, Architecture, Memory, Rates, Setting, Step, linear_gain, memory, rates, step
from ..cost.rates import GIB
from ..cost.shape import Product
from ..cost.step import model_flops
from ..errors import ConfigError
from ..models.llama import DecoderConfig
from ..recipe import Recipe
from .models import architecture

WORTH = 1.05
USABLE = 0.95  # of a GPU's memory: the rest is CUDA's context and fragments
SEQUENCE = 8192
DENSE_BF16 = 989e12  # FLOP/s of the data sheet, for utilization


@dataclass(frozen=True)
class Request:
    """What is planned. See `plan` for what each is."""

    tokens: int
    sequence: int | None = None
    recipe: str | Recipe = "tensorwise"
    gpu: str = "H200"
    gpus: int = 1
    total_tokens: float | None = None
    price: float | None = None
    fused: bool = False
    eager: bool = False
    graph: bool = False
    head: bool = False
    state: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence", "gpus", "total_tokens", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name.replace('_', '-')} must be above 0, not {value!r}: {MEANINGS[name]}.")
        if self.sequence is not None and self.sequence > self.tokens:
            raise ConfigError(
                f"a step of tokens={self.tokens} holds no sequence of {self.sequence}: raise tokens or lower sequence."
            )
        if self.state not in STATES:
            raise ConfigError(f"state cannot be {self.state!r}: 'fp32' (master weights, as fp8 train) or 'bf16'.")


STATES = {"fp32": 4, "bf16": 2}
MEANINGS = {
    "tokens": "the tokens of one step on one GPU, such as 16384",
    "sequence": "the tokens of one sequence, such as 8192",
    "gpus": "how many GPUs share the training",
    "total_tokens": "the tokens of the whole training, such as 1e12",
    "price": "the price of one GPU for one hour",
}


@dataclass(frozen=True)
class Decision:
    """One kind of layer: what it becomes and why; milliseconds of one such layer's forward and backward."""

    name: str
    shape: str
    count: int
    fp8: bool
    reason: str
    gain: float | None = None
    bf16_ms: float | None = None
    fp8_ms: float | None = None


@dataclass(frozen=True)
class Side:
    """One of the two trainings: its step, its memory, and what follows from them."""

    step: Step
    memory: Memory
    tokens_per_second: float
    utilization: float
    days: float | None
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """What `plan` returns: `verdict` says it in a sentence, `to_dict` is JSON, `table.draw` the screen."""

    model: Architecture
    request: Request
    recipe: Recipe
    sequence: int
    known: Rates
    decisions: tuple[Decision, ...]
    bf16: Side
    fp8: Side

    @property
    def gain(self) -> float:
        return self.bf16.step.seconds / self.fp8.step.seconds

    @property
    def usable_gib(self) -> float:
        return USABLE * self.known.gpu.memory_gib

    @property
    def fits(self) -> bool:
        """Whether the training that the verdict speaks for fits into the GPU."""
        return (self.fp8 if self.use_fp8 else self.bf16).memory.gib <= self.usable_gib

    @property
    def use_fp8(self) -> bool:
        return self.gain >= WORTH

    @property
    def verdict(self) -> str:
        return verdict(self)

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)


def plan(
    model: str | Path | Architecture | DecoderConfig,
    tokens: int,
    *,
    sequence: int | None = None,
    recipe: str | Recipe = "tensorwise",
    gpu: str = "H200",
    gpus: int = 1,
    total_tokens: float | None = None,
    price: float | None = None,
    fused: bool = False,
    eager: bool = False,
    graph: bool = False,
    head: bool = False,
    state: str = "fp32",
) -> Plan:
    """Predict a training of `model` in BF16 and in FP8.

    model           see `fp8.advise.models.architecture`
    tokens          of one step on one GPU
    sequence        tokens a sequence; 8192, or what fits
    gpu, gpus       which, and how many share the training
    total_tokens    of the whole training: gives days; with `price` of a GPU-hour, its cost
    fused           `fp8.TransformerLayer` with producers that emit codes; else a converted model
    eager, graph    without torch.compile; captured in a CUDA graph
    head            also the output head in FP8
    recipe          a preset's name or a `Recipe`; its overrides, which name single layers, are left out
    state           "fp32" or "bf16": type of parameters, gradients and moments

    Raises `ConfigError`, `RecipeError` or `CheckpointError` for what cannot be planned. Whether it fits into the GPU
    is an answer (`fits`, `check`), not an error.
    """
    request = Request(tokens, sequence, recipe, gpu, gpus, total_tokens, price, fused, eager, graph, head, state)
    sizes, rule, known = architecture(model), Recipe.of(recipe).replace(overrides=()), rates(gpu)
    length = sequence or min(tokens, SEQUENCE, sizes.positions or SEQUENCE)
    if sizes.positions and length > sizes.positions:
        raise ConfigError(f"{sizes.name} has {sizes.positions} learned positions; a sequence of {length} is longer.")
    high = setting_of(request, length, None)
    low = dataclasses.replace(high, recipe=rule)
    decisions, keep = decide(sizes, low, known)
    low = dataclasses.replace(low, keep=keep)
    if keep == frozenset(p.name for p in sizes.products()) and not request.head:
        low = high
    sides = (side(sizes, one, request, known) for one in (high, low))
    return Plan(sizes, request, rule, length, known, decisions, *sides)


def setting_of(request: Request, sequence: int, recipe: Recipe | None) -> Setting:
    return Setting(
        tokens=request.tokens,
        sequence=sequence,
        recipe=recipe,
        fused=request.fused,
        compiled=not request.eager,
        graph=request.graph,
        head_fp8=request.head,
        weights=STATES[request.state],
        shards=request.gpus,
    )


def decide(model: Architecture, low: Setting, known: Rates) -> tuple[tuple[Decision, ...], frozenset[str]]:
    """Each kind of layer, and the names of those that stay in BF16. A layer's own launches count where the step waits
    for the host and not where it waits for the GPU, so both are tried, and the whole step decides."""
    options = []
    for graph in (True, False):
        found = [_decide(product, low, graph, known) for product in model.products()]
        keep = frozenset(d.name for d in found if not d.fp8)
        seconds = step(model, dataclasses.replace(low, keep=keep), known).seconds
        options.append((seconds, (*found, *_others(model, low, graph, known)), keep))
    _, decisions, keep = min(options, key=lambda option: option[0])
    return decisions, keep


def _decide(product: Product, low: Setting, graph: bool, known: Rates) -> Decision:
    assert low.recipe is not None
    gain = linear_gain(
        low.tokens, product.n, product.k, low.recipe, x_from=product.x_from, grad_from=product.grad_from,
        fused=low.fused, compiled=low.compiled, graph=graph, weight_bytes=low.weights, known=known,
    )  # fmt: skip
    return Decision(product.name, f"{product.n} x {product.k}", product.count, gain.faster, gain.reason, gain.ratio,
                    gain.bf16.seconds * 1e3, gain.fp8.seconds * 1e3)  # fmt: skip


def _others(model: Architecture, low: Setting, graph: bool, known: Rates) -> tuple[Decision, ...]:
    """What is no product of a block."""
    if not model.head:
        return ()
    head = _decide(model.head_product, low, graph, known)
    if not low.head_fp8:
        reason = (
            f"the output head stays: its error goes straight into the loss (FP8 would gain {head.gain:.2f}; --head)"
        )
        head = dataclasses.replace(head, fp8=False, reason=reason)
    table = Decision("embedding", f"{model.vocab} x {model.hidden}", 1, False, "a look-up, not a product")
    norms = Decision("norms, RoPE, softmax", "", 2 * model.layers + 1, False, "normalization stays in high precision")
    return head, table, norms


def side(model: Architecture, one: Setting, request: Request, known: Rates) -> Side:
    took = step(model, one, known)
    rate = one.tokens / took.seconds
    days = None if request.total_tokens is None else request.total_tokens / (rate * request.gpus) / 86400
    cost = None if days is None or request.price is None else days * 24 * request.gpus * request.price
    used = model_flops(model, one) / took.seconds / DENSE_BF16
    return Side(took, memory(model, one), rate, used, days, cost)


# --------------------------------------------------------------------------- the answer


def verdict(found: Plan) -> str:
    """Use FP8 or do not, and because of what."""
    tells = f"{found.bf16.step.seconds * 1e3:.1f} ms a step in BF16, {found.fp8.step.seconds * 1e3:.1f} in FP8"
    if not any(d.fp8 for d in found.decisions):
        first = next(d for d in found.decisions if d.gain is not None)
        return f"Do not use FP8: no layer would be faster. {first.name}: {first.reason}."
    if not found.use_fp8:
        return (
            f"Do not use FP8: {tells}, {found.gain - 1:+.1%}, and below {WORTH - 1:.0%} neither the model nor the gain "
            f"counts. {_what_limits(found)}"
        )
    fits = "" if found.fits else " It does not fit into the GPU as it is."
    return f"Use FP8: {tells}, {found.gain:.2f} times as fast. {_what_limits(found)}{fits}"


def _what_limits(found: Plan) -> str:
    """The largest part of the FP8 step that FP8 does not make faster."""
    took = found.fp8.step
    if took.host_bound:
        return (
            f"The host needs {took.host * 1e3:.1f} ms to launch what the GPU does in {took.gpu * 1e3:.1f}: capture the "
            "step in a CUDA graph (--graph), compile, or take more tokens a step."
        )
    rest = {kind: value for kind, value in took.parts.items() if kind != "products, FP8"}
    kind = max(rest, key=lambda name: rest[name])
    return f"What limits the gain most is {kind}: {rest[kind] / took.seconds:.0%} of the FP8 step."


def check(found: Plan) -> None:
    """Raise `ConfigError` where the training does not fit into the GPU: by how much, and what helps."""
    if found.fits:
        return
    chosen = found.fp8 if found.use_fp8 else found.bf16
    name, need = found.request.gpu.upper(), chosen.memory.gib
    ways = "; ".join(what_helps(found)) or "nothing that is modelled here: take a smaller model"
    raise ConfigError(
        f"{found.model.name} with {found.request.tokens} tokens a step needs {need:.1f} GiB, "
        f"{need - found.usable_gib:.1f} more than the {found.usable_gib:.1f} that can be used of an {name}'s "
        f"{found.known.gpu.memory_gib}. "
        f"What helps: {ways}."
    )


def what_helps(found: Plan) -> list[str]:
    """Single changes that make it fit, each tried."""
    request, ways = found.request, []
    fewer = _most_tokens(found)
    if fewer:
        ways.append(f"--tokens {fewer}")
    if request.state == "fp32" and _fits(found, state="bf16"):
        ways.append("--state bf16 (parameters, gradients and moments in BF16)")
    more = next((n for n in (2**i for i in range(1, 13)) if n > request.gpus and _fits(found, gpus=n)), None)
    if more:
        ways.append(f"--gpus {more} (parameters, gradients and moments divided)")
    larger = [
        name for name, gpu in GPUS.items() if gpu.memory_gib > found.known.gpu.memory_gib and _fits(found, gpu=name)
    ]
    return ways + [f"--gpu {name}" for name in larger]


def _fits(found: Plan, **changes: Any) -> bool:
    request = dataclasses.replace(found.request, **changes)
    recipe = found.recipe if found.use_fp8 else None
    length = min(found.sequence, request.tokens)
    need = memory(found.model, setting_of(request, length, recipe)).gib
    return need <= USABLE * GPUS[request.gpu.upper()].memory_gib


def _most_tokens(found: Plan) -> int:
    """The most whole sequences that fit, in tokens; 0 where not one does."""
    low, high = 0, found.request.tokens // found.sequence
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(found, tokens=middle * found.sequence) else (low, middle - 1)
    return low * found.sequence


def to_dict(found: Plan) -> dict[str, Any]:
    """Plain data, as `fp8 plan --json` prints it: seconds, GiB, tokens a second."""
    request = dataclasses.asdict(dataclasses.replace(found.request, recipe=found.recipe.name))
    return {
        "model": dataclasses.asdict(found.model) | {"parameters": found.model.parameters},
        "request": request | {"sequence": found.sequence},
        "layers": [dataclasses.asdict(d) for d in found.decisions],
        "bf16": _side_dict(found.bf16),
        "fp8": _side_dict(found.fp8),
        "gain": found.gain,
        "memory_gib": found.known.gpu.memory_gib,
        "fits": found.fits,
        "what_helps": [] if found.fits else what_helps(found),
        "use_fp8": found.use_fp8,
        "verdict": found.verdict,
        "rates": found.known.source,
        "estimates": found.known.estimates,
    }


def _side_dict(one: Side) -> dict[str, Any]:
    return {
        "seconds": one.step.seconds,
        "gpu_seconds": one.step.gpu,
        "host_seconds": one.step.host,
        "parts": one.step.parts,
        "tokens_per_second": one.tokens_per_second,
        "utilization": one.utilization,
        "peak_gib": one.memory.gib,
        "memory_gib": {name: value / GIB for name, value in dataclasses.asdict(one.memory).items()},
        "days": one.days,
        "cost": one.cost,
    }
