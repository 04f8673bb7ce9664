"""All experts of a layer in two products, without asking the device how many rows each of them has.

    chosen [T, C]    which experts a token goes to
    place  [T * C]   the row that a token takes for each of them; those of an expert begin at a multiple of 16
    ends   [E]       where an expert's rows end, on the device, as grouped products take them

    codes[place] = the codes of x, once an expert          [R, K]
    gate_up      = grouped product                         [R, 2 F]
    codes        = silu(gate) * up
    down         = grouped product                         [R, K]
    answers      = down[place]                             [T, C, K]

R is a bound, T C + 15 min(E, T C), so that no shape depends on a value and a CUDA graph can replay it. Rows that nobody
has are never read: a row of a product depends on that row alone. The codes of a token are the same for every expert,
and are made once.

The products are CUTLASS's, through torch: `_scaled_grouped_mm` for scales a row on both sides (Hopper), `_grouped_mm`
for BF16. Everything else (blocks, calibrated inputs, weight-only, INT8, sizes that are no multiples of 16) goes expert
by expert (`experts.py`, which is the definition), and `why_not` says so. The matrices of the experts lie in one tensor,
of which each expert keeps a view: nothing is held twice.

On a CPU the grouped product is that of each expert: for the tests, where it gives the definition's bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...formats import format_of
from ...fused.rows import Into, gated_codes, row_codes
from ...matmul import run_matmul
from ...nn.frozen_linear import FrozenLinear
from ...quantize import Quantized
from ...tile import Tile
from .layers import Linear, Matrix, gated, product

ROW = Tile.of("row")
STEP = 16  # rows of an expert are filled up to it: torch's kernels want addresses of 16 bytes


def why_not(matrices: Sequence[Matrix]) -> str | None:
    """Why the same matrix of all experts is no grouped product; None when it is."""
    first = matrices[0]
    if any(type(m) is not type(first) or m.bias is not None for m in matrices):
        return "experts differ in kind, or have biases"
    if isinstance(first, Linear):
        n, k = first.weight.shape
    elif isinstance(first, FrozenLinear):
        n, k = first.codes.shape
        x, scaled = first.recipe.x, (ROW, first.recipe.x.format, first.format.name)
        if (
            first.weight_only
            or first.input_scale is not None
            or (x.tile, "e4m3", "e4m3") != scaled
            or first.tile != ROW
        ):
            return "a grouped product takes E4M3 with one scale a row on both sides, measured when it passes"
    else:
        return "a grouped product takes FP8 and BF16"
    return f"{n} x {k} are no multiples of {STEP}" if n % STEP or k % STEP else None


@dataclass(frozen=True)
class Stack:
    """The same matrix of all experts: codes or BF16 [E, N, K].

    scale        FP32 [E, N]: of FP8
    into         how rows are quantized that it multiplies; None: BF16
    accumulate   of FP8 products: "fast" or "promoted"
    """

    weight: Tensor
    scale: Tensor | None = None
    into: Into | None = None
    accumulate: str = "fast"

    @staticmethod
    def of(matrices: Sequence[Matrix]) -> Stack:
        """Joined; the experts keep views."""
        first = matrices[0]
        name = "weight" if isinstance(first, Linear) else "codes"
        weight = torch.stack([getattr(m, name) for m in matrices])
        for matrix, own in zip(matrices, weight, strict=True):
            setattr(matrix, name, own)
        if not isinstance(first, FrozenLinear):
            return Stack(weight)
        scale = torch.stack([m.scale.flatten() for m in matrices if isinstance(m, FrozenLinear)])
        into = Into(format_of(first.recipe.x.format), ROW, first.recipe.power_of_two)
        return Stack(weight, scale, into, first.recipe.accumulate.forward)

    def product(self, x: Quantized | Tensor, ends: Tensor) -> Tensor:
        """Rows ends[e - 1] .. ends[e] - 1 of x [R, K] by the matrix of expert e: BF16 [R, N]; other rows: anything."""
        if ends.device.type == "cpu":
            return self.one_by_one(x, ends)
        across = self.weight.transpose(1, 2)
        if isinstance(x, Tensor) or self.scale is None:
            return torch._grouped_mm(x, across, offs=ends)  # type: ignore[attr-defined]
        return torch._scaled_grouped_mm(  # type: ignore[attr-defined]
            x.codes, across, x.scale.flatten(), self.scale, offs=ends, out_dtype=torch.bfloat16,
            use_fast_accum=self.accumulate == "fast",
        )  # fmt: skip

    def one_by_one(self, x: Quantized | Tensor, ends: Tensor) -> Tensor:
        """The definition: each expert's product of its own rows."""
        out = torch.zeros(x.shape[0], self.weight.shape[1], dtype=torch.bfloat16)
        for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            if end > start:
                out[start:end] = self.own(x, slice(start, end), expert)
        return out

    def own(self, x: Quantized | Tensor, rows: slice, expert: int) -> Tensor:
        """Some rows by the matrix of one expert."""
        if isinstance(x, Tensor):
            return product(x[rows], Linear(self.weight[expert]))
        some = Quantized(x.codes[rows], x.scale[rows], x.tile, x.format)
        return run_matmul(some, self.quantized(expert), torch.bfloat16, self.accumulate)

    def quantized(self, expert: int) -> Quantized:
        """The matrix of one expert, in FP8."""
        assert self.scale is not None and self.into is not None
        return Quantized(self.weight[expert], self.scale[expert].unsqueeze(1), ROW, self.into.format)


@dataclass(frozen=True)
class Grouped:
    """The experts of a layer."""

    gate_up: Stack
    down: Stack

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What each chosen expert makes of its tokens: BF16 [T, C, K], of x [T, K] and int64 [T, C]."""
        place, ends, rows = laid_out(chosen, len(self.gate_up.weight))
        both = self.gate_up.product(self.spread(x, place, rows), ends)
        made = self.down.product(self.inner(both), ends)
        return made[place].view(*chosen.shape, -1)

    def spread(self, x: Tensor, place: Tensor, rows: int) -> Quantized | Tensor:
        """x, or its codes, where its experts have their rows."""
        source = torch.arange(len(place), device=x.device) // (len(place) // len(x))
        if (into := self.gate_up.into) is None:
            full = x.new_empty(rows, x.shape[1])
            full[place] = x[source]
            return full
        one = row_codes(x, into)
        codes, scale = one.codes.view(torch.uint8).new_empty(rows, x.shape[1]), one.scale.new_empty(rows, 1)
        codes[place], scale[place] = one.codes.view(torch.uint8)[source], one.scale[source]
        return Quantized(codes.view(one.codes.dtype), scale, one.tile, one.format)

    def inner(self, both: Tensor) -> Quantized | Tensor:
        """silu(gate) * up, or its codes."""
        if (into := self.down.into) is None:
            return gated(both)
        return row_codes(gated(both), into) if both.device.type == "cpu" else gated_codes(both, into)


def laid_out(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, int]:
    """The row of each choice, int64 [T * C]; where the rows of each expert end, int32 [E]; a bound of all rows."""
    flat = chosen.flatten()
    every = torch.arange(len(flat), device=flat.device)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((counts + STEP - 1) // STEP * STEP).cumsum(0)
    order = flat.argsort(stable=True)
    first = ends - (counts + STEP - 1) // STEP * STEP - (counts.cumsum(0) - counts)
    place = torch.empty_like(flat).scatter_(0, order, every + first[flat[order]])
    bound = len(flat) + (STEP - 1) * min(experts, len(flat))
    return place, ends.int(), -(-bound // STEP) * STEP
