"""The measured figures behind every prediction, and for which GPUs they are used.

They lie in `rates.json`, which `fit.py` makes from `bench/results/rates.json`; `fp8 bench rates` measures that file
again. No figure is written into the code. What has no measurement yet says so under `estimates`, with the reason.

Another Hopper GPU is the measured one with memory and bandwidth of its data sheet: the multiprocessors are the same,
and so is their number. Everything but the H200 is therefore called scaled, not measured.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..errors import ConfigError, suggest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB as torch sees it, and bandwidth against the measured GPU's, from the data sheets (4.8 TB/s)."""

    memory_gib: float
    bandwidth: float
    note: str = ""


GPUS = {
    "H200": Gpu(139.8, 1.0),
    "H100": Gpu(79.1, 3.35 / 4.8, "scaled from an H200 by the bandwidth of the data sheet (H100 SXM); not measured"),
}


@dataclass(frozen=True)
class Gemm:
    """One kind of product: `peak` FLOP/s of a full GPU, `fill` steps along K lost by each tile, `start` seconds."""

    peak: float
    fill: float
    start: float


@dataclass(frozen=True)
class Attention:
    """FLOP/s of long sequences, and the length at which half of them is reached, forward and backward."""

    forward: float
    forward_half: float
    backward: float
    backward_half: float


@dataclass(frozen=True)
class Rates:
    """All of rates.json. Seconds, bytes, bytes a second, FLOP/s."""

    gpu: Gpu
    source: str
    multiprocessors: int
    gemm: dict[str, Gemm]
    copy: float
    elementwise: float
    cast: dict[str, float]
    attention: dict[int, Attention]
    kernel: float  # the least time of a kernel, in a row of kernels
    host: dict[str, float]  # what the host spends on one: "op", "compiled op", "cast", "product"
    sustained: dict[str, float]  # rates in a hot step over those of a product timed alone: "bf16", "fp8"
    estimates: dict[str, str]

    def attention_of(self, head_dim: int) -> Attention:
        """The row of the nearest head size that was measured."""
        return self.attention[min(self.attention, key=lambda known: (abs(known - head_dim), known))]


@cache
def rates(gpu: str = "H200") -> Rates:
    """The rates of a GPU by name. Raises `ConfigError`, naming the nearest, for one without rates."""
    key = gpu.upper()
    if key not in GPUS:
        raise ConfigError(f"there are no rates for the GPU {gpu!r}. {suggest(key, GPUS)}")
    plain = json.loads(resources.files("fp8.cost").joinpath("rates.json").read_text(encoding="utf-8"))
    return read(plain, GPUS[key])


def read(plain: dict[str, Any], gpu: Gpu) -> Rates:
    """Rates from plain data, for a GPU whose bandwidth may be another."""
    f = gpu.bandwidth
    return Rates(
        gpu=gpu,
        source=plain["source"],
        multiprocessors=plain["multiprocessors"],
        gemm={kind: Gemm(**row) for kind, row in plain["gemm"].items()},
        copy=plain["copy"] * f,
        elementwise=plain["elementwise"] * f,
        cast={kind: rate * f for kind, rate in plain["cast"].items()},
        attention={int(size): Attention(**row) for size, row in plain["attention"].items()},
        kernel=plain["kernel"],
        host=plain["host"],
        sustained=plain["sustained"],
        estimates=plain["estimates"],
    )


def write(known: Rates) -> dict[str, Any]:
    """Plain data, as rates.json holds it."""
    plain = dataclasses.asdict(known)
    del plain["gpu"]
    return plain
