"""What serving costs with FP8 weights beside BF16: bytes where a token is decoded, products where a prompt is read.

**Decoding** is bytes. One token reads every weight of every layer and of the head once, and its sequence's keys and
values; multiplying them takes less time than reading them until a batch has hundreds of sequences. So

    seconds = (weights + scales + head + norms + KV of the context) / bandwidth

for FP8 and BF16 alike, and their ratio is that of the bytes. It is an upper bound of what a server reaches: launches,
attention's arithmetic and the sampler come on top of both. The input embedding is a look-up of one row and counts only
where it is the head as well.

**A prompt** of T tokens is products: `gemm.seconds` of each layer at the rate that a hot GPU sustains, and for FP8 the
quantizing of its input (read twice where the scale is found first, of which the second is from cache: r2 w1). Attention
and norms are the same in both and left out, so this is the gain of the linear layers, not of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import gemm
from .rates import Rates

INPUT_BYTES = 3.0  # of an element of a layer's input: r2 w1


@dataclass(frozen=True)
class Served:
    """A linear layer [n, k]: the kind of its product ("bf16" for weight-only too) and the bytes of its weight."""

    n: int
    k: int
    kind: str
    nbytes: int
    quantizes: bool = True

    @staticmethod
    def high(n: int, k: int) -> Served:
        return Served(n, k, "bf16", 2 * n * k, False)


def decode_seconds(layers: Iterable[Served], rest: float, kv_bytes: float, rates: Rates) -> float:
    """Seconds of one token of one sequence. `rest`: bytes of all else that is read; `kv_bytes`: of its context."""
    return (sum(layer.nbytes for layer in layers) + rest + kv_bytes) / rates.copy


def prompt_seconds(layers: Iterable[Served], tokens: int, rates: Rates) -> float:
    """Seconds of the linear layers on a prompt."""
    return sum(_layer_seconds(layer, tokens, rates) for layer in layers)


def _layer_seconds(layer: Served, tokens: int, rates: Rates) -> float:
    sustained = rates.sustained["bf16" if layer.kind == "bf16" else "fp8"]
    product = gemm.seconds(tokens, layer.n, layer.k, layer.kind, rates) / sustained
    return product + (rates.kernel + INPUT_BYTES * tokens * layer.k / rates.copy if layer.quantizes else 0.0)
