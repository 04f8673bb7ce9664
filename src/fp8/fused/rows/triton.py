"""The GPU's rows to codes: a program makes a row, measures it, and stores its codes and scales.

A step that decodes has a program a row. A chunk of a prompt has thousands of rows, and a program that lives for one of
them reads a third of its time: there a few programs a multiprocessor go through the rows, and the next row is on its
way to shared memory while this one is in work (`plan`).

Norms and plain rows are the reference's in bytes. The gate's exponential is the fast one, as in `fused/activation`: a
BF16 value is within one unit in its last place, and the code is that of the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_launch
from ...quantize.record import Quantized
from ...quantize.triton_cast import amax_bits, factor_of, key, nearest, scale_of, scaled
from ...triton_launch import enter
from .reference import ROW

if TYPE_CHECKING:
    from . import Into


@triton.jit(do_not_specialize=["rows"])
def rows_to_codes(
    x_ptr, more_ptr, sum_ptr, weight_ptr, codes_ptr, scale_ptr, given_ptr, rows, cols, eps, stride_r, stride_c,
    PRODUCER: tl.constexpr, MODE: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr, BN: tl.constexpr,
    ADD: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows of x [T, cols] ([T, 2 cols] for "gated") to codes [T, cols]; with ADD of x + more, which goes to sum_ptr."""
    enter(AHEAD)
    c = tl.arange(0, BN)
    inside = c < cols
    if PRODUCER == "norm":
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        r = i + tl.full([], 0, tl.int64)
        at = r * cols + c
        if PRODUCER == "gated":
            gate = tl.load(x_ptr + at + r * cols, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(x_ptr + at + (r + 1) * cols, mask=inside, other=0.0).to(tl.float32)
            y = gate * (1.0 / (1.0 + tl.exp(-gate))) * up
            y = y.to(tl.bfloat16).to(tl.float32)
        else:
            y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                total = (y + tl.load(more_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16)
                tl.store(sum_ptr + at, total, mask=inside)
                y = total.to(tl.float32)
            if PRODUCER == "norm":
                wide = y.to(tl.float64)
                mean = (tl.sum(wide * wide, axis=0) / cols).to(tl.float32)
                rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
                y = y * rstd * weight.to(tl.float32)
                y = y.to(tl.bfloat16).to(tl.float32)
        if MODE == "values":
            tl.store(codes_ptr + at, y.to(tl.bfloat16), mask=inside)
        elif MODE == "group":
            G: tl.constexpr = BN // 128
            square = tl.reshape(y, [G, 128])
            scale = scale_of(amax_bits(tl.max(key(square), axis=1)), E4M3, POWER)
            g = tl.arange(0, G)
            tl.store(scale_ptr + r * stride_r + g * stride_c, scale, mask=g * 128 < cols)
            codes = nearest(square, scaled(square, factor_of(scale, POWER)[:, None], POWER), E4M3)
            tl.store(codes_ptr + at, tl.reshape(codes, [BN]), mask=inside)
        else:
            if MODE == "row":
                scale = scale_of(amax_bits(tl.max(key(y), axis=0)), E4M3, POWER)
            else:
                scale = tl.load(given_ptr)
            tl.store(scale_ptr + r, scale)
            tl.store(codes_ptr + at, nearest(y, scaled(y, factor_of(scale, POWER), POWER), E4M3), mask=inside)


def norm_codes(h: Tensor, weight: Tensor, eps: float, into: Into) -> Quantized:
    return _run("norm", h.contiguous(), weight, eps, h.shape[1], into)


def add_norm_codes(h: Tensor, y: Tensor, weight: Tensor, eps: float, into: Into) -> tuple[Tensor, Quantized]:
    total = torch.empty_like(h, memory_format=torch.contiguous_format)
    return total, _run("norm", h.contiguous(), weight, eps, h.shape[1], into, (y.contiguous(), total))


def gated_codes(gate_up: Tensor, into: Into) -> Quantized:
    return _run("gated", gate_up.contiguous(), gate_up, 0.0, gate_up.shape[1] // 2, into)


def row_codes(x: Tensor, into: Into) -> Quantized:
    return _run("plain", x.contiguous(), x, 0.0, x.shape[1], into)


def norm_values(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _values("norm", h.contiguous(), weight, eps, h.shape[1])


def gated_values(gate_up: Tensor) -> Tensor:
    return _values("gated", gate_up.contiguous(), gate_up, 0.0, gate_up.shape[1] // 2)


def _values(producer: str, x: Tensor, weight: Tensor, eps: float, cols: int) -> Tensor:
    y = torch.empty(len(x), cols, dtype=torch.bfloat16, device=x.device)
    if len(x):
        use = plan(len(x), cols)
        rows_to_codes[(use.programs,)](
            x, x, x, weight, y, x, x, len(x), cols, eps, 0, 0,
            PRODUCER=producer, MODE="values", E4M3=True, POWER=True, BN=use.wide, ADD=False, STAGES=use.stages,
            num_warps=use.warps, maxnreg=use.registers, enable_fp_fusion=False,
            AHEAD=triton_launch.LAUNCH, launch_pdl=triton_launch.LAUNCH,
        )  # fmt: skip
    return y


@dataclass(frozen=True)
class Plan:
    """How many programs share the rows, columns and warps of each, stages of a row, and registers at most.

    From two stages on, rows that come are copied to shared memory while one is in work.
    """

    programs: int
    wide: int
    warps: int
    stages: int = 1
    registers: int | None = None


FEW = 1024  # rows up to which each has a program of its own
MULTIPROCESSORS, REGISTERS = 132, 64  # 32 warps of so many fill a multiprocessor: all programs run at once


def plan(rows: int, cols: int) -> Plan:
    """By shape alone."""
    wide = max(triton.next_power_of_2(cols), 128)
    warps = min(16, max(4, wide // 512))
    if rows <= FEW:
        return Plan(rows, wide, warps)
    return Plan(min(rows, MULTIPROCESSORS * 32 // warps), wide, warps, 3 if wide <= 8192 else 2, REGISTERS)


def _run(
    producer: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    cols: int,
    into: Into,
    add: tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    rows, group = len(x), into.mode == "group"
    codes = torch.empty(rows, cols, dtype=into.format.dtype, device=x.device)
    across = -(-cols // 128) if group else 1
    scale = torch.empty(across, rows, device=x.device).t()  # groups lie column by column, as cuBLASLt reads them
    if rows:
        use = plan(rows, cols)
        rows_to_codes[(use.programs,)](
            x, *(add or (x, x)), weight, codes.view(torch.uint8), scale, scale if into.scale is None else into.scale,
            rows, cols, eps, *scale.stride(), PRODUCER=producer, MODE=into.mode, E4M3=into.format.name == "e4m3",
            POWER=into.power_of_two and into.scale is None, BN=use.wide, ADD=add is not None, STAGES=use.stages,
            num_warps=use.warps, maxnreg=use.registers, enable_fp_fusion=False,
            AHEAD=triton_launch.LAUNCH, launch_pdl=triton_launch.LAUNCH,
        )  # fmt: skip
    return Quantized(codes, scale if group else scale.reshape(rows, 1), into.tile if group else ROW, into.format)
