"""GPUs that a model may be served on, by their makers' data sheets: memory, bandwidth, dense FLOP/s.

Only Hopper was measured. On every other GPU the share of the sheet that an H200 reaches is assumed:

    reading      4.37 of 4.8 TB/s: a kernel that only reads
    products     the fit of `fp8 bench rates` (rates.json), over 989 and 1979 TFLOP/s

A cell of the sheets may be stated with sparsity; these are without. Memory is what is left of the advertised figure
for torch to see: measured on H200 and H100, half a percent below the advertised one elsewhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import ConfigError, suggest
from .rates import Gemm, Gpu, Rates, rates

READ_SHARE = 4.37 / 4.8


@dataclass(frozen=True)
class Datasheet:
    """Memory in GiB, bytes a second, and dense FLOP/s in BF16 and in FP8 (None: no FP8 units).

    `claimed`: decode in FP8 over BF16, in the article's table of GPUs, as printed there.
    """

    name: str
    memory_gib: float
    bandwidth: float
    bf16: float
    fp8: float | None
    claimed: float | None = None
    note: str = ""

    @property
    def read(self) -> float:
        """Bytes a second of a kernel that only reads."""
        return READ_SHARE * self.bandwidth

    @property
    def measured(self) -> bool:
        return self.name == "H200"


SHEETS = {
    sheet.name: sheet
    for sheet in (
        Datasheet("A100", 79.1, 2.039e12, 312e12, None, None, "no FP8 units: FP8 weights are decoded to BF16"),
        Datasheet("H100", 79.1, 3.35e12, 989e12, 1979e12, 1.7),
        Datasheet("H200", 139.8, 4.8e12, 989e12, 1979e12, 2.0),
        Datasheet("B200", 178.0, 8.0e12, 2250e12, 4500e12, 2.5),
        Datasheet("MI300X", 191.0, 5.3e12, 1307e12, 2614e12, 1.7, "its E4M3 is fnuz, not OCP's: codes are converted"),
        Datasheet("MI355X", 287.0, 8.0e12, 2500e12, 5000e12, 2.4, "the article prints 2400 TFLOP/s in BF16"),
    )
}


def datasheet(name: str) -> Datasheet:
    """A GPU by name. Raises `ConfigError`, naming the nearest."""
    if (key := name.upper()) not in SHEETS:
        raise ConfigError(f"there is no data sheet of the GPU {name!r}. {suggest(key, SHEETS)}")
    return SHEETS[key]


def scaled_rates(sheet: Datasheet) -> Rates:
    """The H200's measured rates, times this GPU's sheet over the H200's."""
    known, base = rates("H200"), SHEETS["H200"]
    bytes_ratio, high = sheet.bandwidth / base.bandwidth, sheet.bf16 / base.bf16
    low = high if sheet.fp8 is None else sheet.fp8 / _fp8(base)
    ratio = {kind: high if kind == "bf16" else low for kind in known.gemm}
    gemm = {kind: Gemm(row.peak * ratio[kind], row.fill, row.start) for kind, row in known.gemm.items()}
    attention = {
        size: dataclasses.replace(row, forward=row.forward * high, backward=row.backward * high)
        for size, row in known.attention.items()
    }
    return dataclasses.replace(
        known, gpu=Gpu(sheet.memory_gib, bytes_ratio), gemm=gemm, attention=attention, copy=known.copy * bytes_ratio
    )


def _fp8(sheet: Datasheet) -> float:
    assert sheet.fp8 is not None
    return sheet.fp8
