"""The GPU's residual add and RMS norm.

    norm_rows            a row a program: adds, measures the row, writes h, rstd, and codes where their scale is known
                         in time (given, one a row, or one a group of 128); with a scale of the whole tensor to be
                         measured it leaves the amax, and `both.cu` follows
    norm_backward_rows   a stretch of rows a program: dx, and the program's share of dw

bytes an element (BF16): forward 3 (5 with a residual), 6 (8) with a measured tensor scale; transposed codes 3;
backward 8.

The transposed codes come from `both.cu`. With a scale for each row the columns' amaxes are wanted too, for the
transposed codes of the backward: a program then takes `PER` rows and raises each column's key once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantize.triton_cast import amax_bits, factor_of, key, nearest, raise_amax, scale_of, scaled
from ..both import Room, both, norm_source
from ..target import Codes, Target


@triton.jit(do_not_specialize_on_alignment=["amax_ptr"])
def norm_rows(
    x_ptr, branch_ptr, weight_ptr, h_ptr, rstd_ptr, y_ptr, scale_ptr, keys_t_ptr, amax_ptr,
    rows, cols, eps, stride_r, stride_c,
    ADD: tl.constexpr, MODE: tl.constexpr, BF16: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr,
    PER: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] (+ branch) to h, rstd [rows] and y: values (`store`), codes, or nothing (`measured`)."""
    c = tl.arange(0, BN)
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(tl.float32)
    columns = tl.zeros([BN], tl.int32)
    largest = tl.zeros([1], tl.int32)
    for i in range(PER):
        r = tl.program_id(0) * PER + i
        inside = (c < cols) & (r < rows)
        at = r.to(tl.int64) * cols + c
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            h += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            stored = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, stored, mask=inside)
            h = stored.to(tl.float32)
        wide = h.to(tl.float64)
        mean = (tl.sum(wide * wide, axis=0) / cols).to(tl.float32)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(rstd_ptr + r, rstd, mask=r < rows)
        y = h * rstd * weight
        if BF16:
            y = y.to(tl.bfloat16).to(tl.float32)
        if MODE == "store":
            tl.store(y_ptr + at, y, mask=inside)
        else:
            keys = key(y)
            if MODE == "given" or MODE == "measured":
                largest = tl.maximum(largest, tl.max(keys, axis=0))
            if MODE == "given":
                factor = factor_of(tl.load(scale_ptr), POWER)
                codes = nearest(y, scaled(y, factor, POWER), E4M3)
            elif MODE == "row":
                columns = tl.maximum(columns, keys)
                scale = scale_of(amax_bits(tl.max(keys, axis=0)), E4M3, POWER)
                tl.store(scale_ptr + r, scale, mask=r < rows)
                codes = nearest(y, scaled(y, factor_of(scale, POWER), POWER), E4M3)
            elif MODE == "group":
                G: tl.constexpr = BN // 128
                scale = scale_of(amax_bits(tl.max(tl.reshape(keys, [G, 128]), axis=1)), E4M3, POWER)
                g = tl.arange(0, G)
                tl.store(scale_ptr + r * stride_r + g * stride_c, scale, mask=(g * 128 < cols) & (r < rows))
                square = tl.reshape(y, [G, 128])
                factor = factor_of(scale, POWER)[:, None]
                codes = tl.reshape(nearest(square, scaled(square, factor, POWER), E4M3), [BN])
            if MODE != "measured":
                tl.store(y_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at, codes, mask=inside)
    if MODE == "given" or MODE == "measured":
        raise_amax(amax_ptr, amax_bits(tl.max(largest, axis=0)))
    if MODE == "row":
        tl.atomic_max(keys_t_ptr + c, columns, mask=c < cols, sem="relaxed")


@triton.jit
def norm_backward_rows(
    dy_ptr, h_ptr, rstd_ptr, weight_ptr, residual_ptr, dx_ptr, shares_ptr, rows, cols, per,
    ADD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx [rows, cols], and shares [programs, cols] (FP32) of dw; a program takes `per` rows."""
    c = tl.arange(0, BN)
    weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(tl.float32)
    share = tl.zeros([BN], tl.float32)
    first = tl.program_id(0) * per
    for i in tl.range(0, tl.minimum(per, rows - first), num_stages=3):  # the next rows' loads are under way
        r = first + i
        at = r.to(tl.int64) * cols + c
        dy = tl.load(dy_ptr + at, mask=c < cols, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=c < cols, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + r)
        n = h * rstd
        g = dy * weight
        share += dy * n
        dx = rstd * (g - n * (tl.sum(g * n, axis=0) / cols))
        if ADD:
            dx += tl.load(residual_ptr + at, mask=c < cols, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=c < cols)
    tl.store(shares_ptr + tl.program_id(0) * cols + c, share, mask=c < cols)


def norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, target: Target | None
) -> tuple[Tensor, Tensor, Tensor | Codes]:
    """`reference.norm` on CUDA matrices."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    rows, cols = x.shape
    h = x if branch is None else torch.empty_like(x)
    rstd = torch.empty(rows, device=x.device)
    room = None if target is None else Room(x, rows, cols, target, across=False)
    y = torch.empty(rows, cols, dtype=dtype, device=x.device) if room is None else room.codes
    mode = "store" if room is None else room.mode
    scale, keys_t, amax = (rstd, rstd, rstd) if room is None else (room.scale, room.keys_t, room.amax)
    per = 16 if mode == "row" else 1
    norm_rows[(triton.cdiv(rows, per),)](
        x, x if branch is None else branch, weight, h, rstd, y, scale, rstd if keys_t is None else keys_t, amax,
        rows, cols, eps, *(scale.stride() if mode == "group" else (0, 0)),
        ADD=branch is not None, MODE=mode, BF16=dtype == torch.bfloat16,
        E4M3=target is not None and target.format.name == "e4m3", POWER=target is not None and target.power_of_two,
        PER=per, BN=max(triton.next_power_of_2(cols), 128), num_warps=_warps(cols), enable_fp_fusion=False,
    )  # fmt: skip
    if room is None:
        assert y is not None
        return h, rstd, y
    if room.mode == "measured":
        both(room, norm_source(h, rstd, weight), rows, cols, measured=True)
    return h, rstd, room.result


def norm_across(
    h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype, target: Target, keys_t: Tensor | None
) -> Codes:
    """`reference.norm_across` on CUDA matrices; `target.scale` is that of the forward, `keys_t` its columns' keys."""
    room = Room(h, *h.shape, target, down=False, known=True, keys_t=keys_t)
    both(room, norm_source(h, rstd, weight), *h.shape)
    return room.result


def norm_backward(
    dy: Tensor, h: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.norm_backward` on CUDA matrices."""
    dy, h = dy.contiguous(), h.contiguous()  # a sum's gradient is expanded
    residual = None if residual is None else residual.contiguous()
    rows, cols = h.shape
    per = max(1, triton.cdiv(rows, 528))  # four programs for each multiprocessor of an H200
    programs = triton.cdiv(rows, per)
    dx = torch.empty_like(h)
    shares = torch.empty(programs, cols, device=h.device)
    norm_backward_rows[(programs,)](
        dy, h, rstd, weight, h if residual is None else residual, dx, shares, rows, cols, per,
        ADD=residual is not None, BN=max(triton.next_power_of_2(cols), 128), num_warps=_warps(cols),
        enable_fp_fusion=False,
    )  # fmt: skip
    return dx, shares.sum(0).to(weight.dtype)


def _warps(cols: int) -> int:
    """16 elements a thread of a row, from 4 to 16 warps."""
    return min(16, max(4, triton.next_power_of_2(cols) // 512))
