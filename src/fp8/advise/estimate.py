"""`fp8 estimate`: what serving a model takes on a GPU: memory, users, milliseconds a token, and money.

Every figure is a formula over the model's sizes and a GPU's data sheet; nothing is run. In words, as printed:

    weights    linear layers: 2 N K bytes in BF16; N K + 4 N in FP8 (one FP32 scale a channel)
               embedding, head (once, if they are tied) and norms: BF16. Biases and q/k norms are not counted
    a token    of the cache: 2 L KV D bytes an element; FP8 with dynamic scales 2 L KV (D + 4), with static 2 L KV D
    room       of the cache: fraction * memory - weights - the largest step - CUDA's context
    users      floor(room / page) // ceil(context / page size): each holds a whole context
    decode     floor of a step that gives each of B sequences a token, the larger of
                   (linear layers + head + norms + B * context * a token) / bytes a second of a reading kernel
                   2 * B * parameters multiplied / FLOP/s of a long product
    prompt     floor: products, quantizing of their inputs, and causal attention in BF16, as `fp8 plan` has them
    dollars    price / 3600 / tokens a second

A floor is what nothing can be faster than; a server takes longer, by launches, small kernels and the sampler.
`share`, which `fp8 bench serve` measures, is the part of the decode floor that one reaches, and divides it. The step's
memory and CUDA's context are estimates; weights and cache are exact.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cost import Architecture, Rates
from ..cost.datasheets import Datasheet, datasheet, scaled_rates
from ..cost.rates import GIB
from ..cost.serving import Served, prompt_seconds
from ..errors import ConfigError
from ..models.llama import DecoderConfig
from .models import architecture

ARMS = {"BF16": ("bf16", "bf16"), "FP8": ("fp8", "bf16"), "FP8 + FP8 KV": ("fp8", "fp8")}  # name: (weights, cache)
CONTEXTS = (1024, 8192, 32768, 131072)
CUDA_CONTEXT = 0.6 * GIB
KIND = "row fast"  # a scale a channel of the weight, and one a token
SAMPLER = 52  # bytes of logits and of sorting, each of a sequence's vocabulary


@dataclass(frozen=True)
class Serving:
    """What is asked. See `estimate`."""

    context: int = 8192
    batch: int | None = None
    prompt: int | None = None
    price: float | None = None
    share: float = 1.0
    memory_fraction: float = 0.9
    page_size: int = 64
    max_running: int = 256
    max_step_tokens: int = 8192
    static_scales: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and (value > 0 or field.name == "static_scales")):
                raise ConfigError(f"{field.name.replace('_', '-')} must be above 0, not {value!r}.")
        for name in ("share", "memory_fraction"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"{name.replace('_', '-')} is a part of a whole, at most 1; not {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class Arm:
    """One way to serve: bytes, users by context, seconds, tokens a second, dollars a million tokens.

    batch         sequences at a time that `step_seconds`, `tokens_per_second` and `dollars` are for; 0: none fits
    first_token   seconds of a decode step at batch 1
    prompt        seconds of one prompt
    """

    name: str
    weights: int
    cache_token: int
    room: int
    users: dict[int, int]
    batch: int
    first_token: float
    step_seconds: float
    prompt: float
    tokens_per_second: float
    dollars: float | None
    prompt_dollars: float | None


@dataclass(frozen=True)
class Estimate:
    """What `estimate` returns."""

    model: Architecture
    gpu: Datasheet
    asked: Serving
    arms: tuple[Arm, ...]

    @property
    def gain(self) -> float:
        """Decode at batch 1, FP8 with an FP8 cache beside BF16."""
        return self.arms[0].first_token / self.arms[-1].first_token

    def to_dict(self) -> dict[str, Any]:
        """Plain data, seconds and bytes; with the formulae."""
        return {
            "model": dataclasses.asdict(self.model),
            "gpu": dataclasses.asdict(self.gpu) | {"measured": self.gpu.measured},
            "asked": dataclasses.asdict(self.asked),
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "formulae": FORMULAE,
        }


FORMULAE = [line[4:] for line in (__doc__ or "").splitlines() if line.startswith("    ")]


def estimate(model: str | Path | Architecture | DecoderConfig, gpu: str = "H200", **asked: Any) -> Estimate:
    """Estimate serving `model` on one `gpu`: A100, H100, H200, B200, MI300X or MI355X.

    model             see `fp8.advise.models.architecture`
    context           tokens that a sequence holds while it is decoded
    batch             sequences at a time (0 in the answer where so many do not fit); else as many as fit, at most
                      `max_running`
    prompt            tokens of a prompt that is read; else `context`
    price             dollars of one GPU for an hour
    share             of the decode floor that the server reaches, as `fp8 bench serve` measures it
    memory_fraction, page_size, max_running, max_step_tokens   as `EngineOptions` has them
    static_scales     the cache's scales are the checkpoint's

    Raises `ConfigError` for what cannot be estimated. That the model does not fit is an answer: room below 0, no users.
    """
    sizes, sheet, serving = architecture(model), datasheet(gpu), Serving(**asked)
    return Estimate(sizes, sheet, serving, tuple(_arm(name, sizes, sheet, serving) for name in ARMS))


def _arm(name: str, model: Architecture, sheet: Datasheet, asked: Serving) -> Arm:
    weights_kind, cache_kind = ARMS[name]
    held, token = weight_bytes(model, weights_kind), cache_token_bytes(model, cache_kind, asked.static_scales)
    room = int(asked.memory_fraction * sheet.memory_gib * GIB - held - step_bytes(model, asked) - CUDA_CONTEXT)
    users = {context: _users(room, token, context, asked) for context in sorted({*CONTEXTS, asked.context})}
    fit = users[asked.context]
    batch = min(fit, asked.max_running) if asked.batch is None else asked.batch if asked.batch <= fit else 0
    seconds = [decode_seconds(model, weights_kind, token, b, asked.context, sheet) / asked.share for b in (1, batch)]
    prompt = asked.prompt or asked.context
    reading = prompt_floor(model, weights_kind, prompt, sheet)
    rate = batch / seconds[1]
    hour = asked.price
    return Arm(
        name, held, token, room, users, batch, seconds[0], seconds[1], reading, rate,
        dollars=None if hour is None or not batch else hour / 3600 / rate * 1e6,
        prompt_dollars=None if hour is None else hour / 3600 * reading / prompt * 1e6,
    )  # fmt: skip


def _users(room: int, token: int, context: int, asked: Serving) -> int:
    pages = max(room, 0) // (token * asked.page_size)
    return pages // -(-context // asked.page_size)


# --------------------------------------------------------------------------- bytes


def served_layers(model: Architecture, kind: str, product: str = KIND) -> list[Served]:
    """Every linear layer of the blocks."""
    made = []
    for p in model.products():
        layer = Served.high(p.n, p.k) if kind == "bf16" else Served(p.n, p.k, product, p.n * p.k + 4 * p.n)
        made += [layer] * p.count
    return made


def weight_bytes(model: Architecture, kind: str) -> int:
    """Bytes of the weights, as they are held; `kind`: "bf16" or "fp8"."""
    embedding = 0 if model.tied else 2 * model.vocab * model.hidden
    return read_bytes(model, kind) + embedding


def read_bytes(model: Architecture, kind: str) -> int:
    """Bytes of the weights that one step reads: all but the embedding, of which it looks up rows."""
    norms = 2 * model.hidden * (2 * model.layers + 1)
    return sum(layer.nbytes for layer in served_layers(model, kind)) + 2 * model.vocab * model.hidden + norms


def cache_token_bytes(model: Architecture, kind: str, static: bool = False) -> int:
    """Bytes that one token takes in the cache."""
    head = 2 * model.width if kind == "bf16" else model.width + (0 if static else 4)
    return 2 * model.layers * model.kv_heads * head


def step_bytes(model: Architecture, asked: Serving) -> int:
    """An estimate of what the largest step takes: residual stream, its norm, gate and up, what down reads and its
    codes, all BF16 but the last; and the sampler."""
    token = 2 * 2 * model.hidden + 2 * model.up + 3 * model.ffn
    return asked.max_step_tokens * token + SAMPLER * asked.max_running * model.vocab


# --------------------------------------------------------------------------- seconds


def decode_seconds(
    model: Architecture, kind: str, cache_token: int, batch: int, context: int, sheet: Datasheet
) -> float:
    """The floor of one step: `batch` sequences of `context` tokens get a token each."""
    reading = (read_bytes(model, kind) + batch * context * cache_token) / sheet.read
    known = scaled_rates(sheet)
    which = product_kind(kind, sheet)
    blocks = sum(p.parameters for p in model.products()) / (known.gemm[which].peak * _sustained(known, which))
    head = model.vocab * model.hidden / (known.gemm["bf16"].peak * known.sustained["bf16"])
    return max(reading, 2 * batch * (blocks + head))


def prompt_floor(model: Architecture, kind: str, tokens: int, sheet: Datasheet) -> float:
    """The floor of reading a prompt of one sequence."""
    known, which = scaled_rates(sheet), product_kind(kind, sheet)
    layers = served_layers(model, "bf16" if which == "bf16" else kind, which)
    row = known.attention_of(model.width)
    flops = 2 * tokens**2 * model.context  # causal: half of 4 T^2 heads width
    attending = flops / row.forward * (1 + row.forward_half / tokens)
    return prompt_seconds(layers, tokens, known) + model.layers * attending


def product_kind(kind: str, sheet: Datasheet) -> str:
    """What multiplies: weights in FP8 are decoded where there are no FP8 units."""
    return "bf16" if kind == "bf16" or sheet.fp8 is None else KIND


def _sustained(known: Rates, kind: str) -> float:
    return known.sustained["bf16" if kind == "bf16" else "fp8"]
