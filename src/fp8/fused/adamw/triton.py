"""AdamW on the GPU: one small launch for what depends on the step, one for all parameters of a group, and one more for
those whose codes are written as well.

    begin          a lane for each parameter: counts the step, unless `found_inf`, and leaves in `now` what the update
                   needs of it; makes the keys zero
    update_lines   parameters as lines: 2048 numbers a program
    update_tiles   weights whose codes follow: a rectangle a program, updated 16 rows at a time; then, after a barrier,
                   `cast_one` reads the rectangle back (from the L2: it was just written) and makes its codes, by
                   the same instructions as `fp8.refresh`. Registers are those of the larger of the two, not their sum.

Both update by `update_rows`, on blocks of 16 x 128 numbers, each row of which is a group of `moments.py`.

**Equal bytes.** The kernels are compiled without fused multiply and add (`enable_fp_fusion=False`); divisions and roots
are IEEE. The corrections are FP64, from FP32 halves (an argument of a kernel is FP32), by the reference's squarings.

**Bytes moved** an element, FP32 parameter, BF16 gradient: read p 4, g 2, write p 4; moments in FP32 16, BF16 8, FP8 4;
codes 2, instead of 4 + 2 for a refresh afterwards.

Tables and owners are those of `quantize.triton_many`; a row here begins with that room's columns. Gradients move, so
the table is rewritten when one did; that is a copy from pinned memory, without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quantize.triton import MODES, PARTS, plan
from ...quantize.triton_cast import key, words_of_four
from ...quantize.triton_many import cast_one, numbers_at, owners, upload
from . import moments
from .reference import Settings, Slot, halves, single

COLUMNS = 24  # of the table: 13 as in `triton_many`, then those that `update_rows` reads
NOW = 8  # of `now`, FP32: step_size, inv_root, decay, factor of the gradient, and as int32: skip, step
KEPT = tuple(f"{name}_{part}" for name in moments.NAMES for part in ("amax", "k"))


@dataclass(frozen=True)
class Shape:
    """Warps of a program, rows of the blocks that it updates at a time, and the most registers of a thread."""

    warps: int = 8
    rows: int = 16
    registers: int | None = None


def shape(mode: str, moments: str) -> Shape:
    """The shape for a mode. 128 x 128 codes at 8 warps and 128 registers spill; at 16 warps they do not."""
    if mode == "square":
        return Shape(16, 16 if moments == "fp8" else 32)
    return Shape(registers=128 if mode == "tensor" else None)


# --------------------------------------------------------------------------- once a parameter


@triton.jit
def raised(base, exponent):
    """base^exponent (FP64) for whole exponents [N] below 2^31, by repeated squaring."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in range(31):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def begin(
    table_ptr, now_ptr, count, lr_ptr, found_inf_ptr, grad_scale_ptr,
    lr_high, lr_low, beta1_high, beta1_low, beta2_high, beta2_low, decay_high, decay_low,
    LR_HERE: tl.constexpr, SKIPS: tl.constexpr, SCALED: tl.constexpr, NOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of `now`, and the counted steps; table [count, 2] holds the addresses of each step and each key (or 0)."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = lane < count
    step_at = tl.load(table_ptr + 2 * lane, mask=held, other=0).to(tl.pointer_type(tl.float32))
    key_at = tl.load(table_ptr + 2 * lane + 1, mask=held, other=0)
    tl.store(key_at.to(tl.pointer_type(tl.int32)), tl.zeros([BLOCK], tl.int32), mask=held & (key_at != 0))
    skip = tl.zeros([BLOCK], tl.int32)
    if SKIPS:
        skip += (tl.load(found_inf_ptr) != 0.0).to(tl.int32)
    step = tl.load(step_at, mask=held, other=0.0) + (1 - skip).to(tl.float32)
    tl.store(step_at, step, mask=held)
    zero = tl.zeros([BLOCK], tl.float64)
    lr = zero + lr_high + lr_low
    if LR_HERE:
        lr = zero + tl.load(lr_ptr).to(tl.float64)
    n = step.to(tl.int32)
    first = 1.0 - raised(zero + beta1_high + beta1_low, n)
    second = 1.0 - raised(zero + beta2_high + beta2_low, n)
    decay = 1.0 - lr * (zero + decay_high + decay_low)
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if SCALED:
        factor = tl.div_rn(factor, tl.zeros([BLOCK], tl.float32) + tl.load(grad_scale_ptr))
    now = now_ptr + lane * NOW
    tl.store(now, (lr / first).to(tl.float32), mask=held)
    tl.store(now + 1, (1.0 / tl.sqrt(second)).to(tl.float32), mask=held)
    tl.store(now + 2, decay.to(tl.float32), mask=held)
    tl.store(now + 3, factor, mask=held)
    whole = now.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(whole + 4, skip, mask=held)
    tl.store(whole + 5, n, mask=held)


# --------------------------------------------------------------------------- moments


@triton.jit
def code_below(z):
    """The last E4M3 code (int32) that is not above z, from 0."""
    z = tl.minimum(z, 448.0)
    normal = z.to(tl.int32, bitcast=True) - (120 << 23)
    lifted = (z + 0.015625).to(tl.int32, bitcast=True) - (121 << 23)
    return tl.where(z >= 0.015625, normal, lifted) >> 20


@triton.jit
def power(u, k):
    """u^(k/4), by IEEE roots and products; k [R, 1] from 1 to 32."""
    half = tl.sqrt_rn(u)
    quarter = tl.sqrt_rn(half)
    second = u * u
    fourth = second * second
    result = tl.where((k & 1) == 1, quarter, 1.0)
    result = tl.where((k >> 1 & 1) == 1, result * half, result)
    result = tl.where((k >> 2 & 1) == 1, result * u, result)
    result = tl.where((k >> 3 & 1) == 1, result * second, result)
    result = tl.where((k >> 4 & 1) == 1, result * fourth, result)
    return tl.where((k >> 5 & 1) == 1, result * (fourth * fourth), result)


@triton.jit
def decode(code, amax, k, roots_ptr):
    """The moment (FP32) of codes (uint8 [R, 128]), amax and k [R]."""
    c = code.to(tl.int32)
    magnitude = tl.load(roots_ptr + k[:, None].to(tl.int32) * 128 + (c & 0x7F)) * amax[:, None]
    return tl.where(c >= 0x80, -magnitude, magnitude)


@triton.jit
def encode(x, word, roots_ptr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes (uint8), amax and k of a moment [R, 128]; `word`: 16 random bits (int32)."""
    RANGE: tl.constexpr = 66 << 23
    SPAN: tl.constexpr = 12 << 23
    raw = x.to(tl.int32, bitcast=True)
    bits = raw & 0x7FFFFFFF
    finite = bits < 0x7F800000
    bits = tl.where(finite, bits, 0)
    top = tl.max(bits, axis=1)
    span = top - tl.min(tl.where(bits > 0, bits, top[:, None]), axis=1)
    if SIGNED:
        span = tl.minimum(span, SPAN)
    k = tl.minimum(tl.maximum((RANGE // tl.maximum(span, 1)).to(tl.int32), 1), 32)
    amax = top.to(tl.float32, bitcast=True)
    safe = tl.maximum(amax, 1.1754943508222875e-38)
    u = bits.to(tl.float32, bitcast=True) * tl.div_rn(tl.full(safe.shape, 1.0, tl.float32), safe)[:, None]
    below = code_below(power(u, k[:, None]) * 448.0)
    row = roots_ptr + k[:, None] * 128
    low = tl.load(row + below)
    high = tl.load(row + tl.minimum(below + 1, 126))
    if STOCHASTIC:
        chance = ((word << 7) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # word / 2^16
        up = chance * (high - low) < u - low
    else:
        up = u - low > high - u
    code = tl.minimum(below + up.to(tl.int32), 126)
    if SIGNED:
        code = code | ((raw >> 24) & 0x80)
    else:
        code = tl.where((code == 0) & (bits != 0), 1, code)
    return tl.where(finite, code, 0x7F).to(tl.uint8), amax, k.to(tl.uint8)


@triton.jit
def rounded_bf16(x, word, STOCHASTIC: tl.constexpr):
    """To BF16, to nearest or by 16 random bits (int32)."""
    if STOCHASTIC:
        bits = x.to(tl.int32, bitcast=True)
        kept = ((bits + word) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, kept, x)
    return x.to(tl.bfloat16)


# --------------------------------------------------------------------------- the update


@triton.jit
def update_rows(
    row, now_ptr, roots_ptr, at, held, group, held_group, seed, beta2, c1, c2, eps,
    P: tl.constexpr, G: tl.constexpr, MASTER: tl.constexpr, MOMENTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    NOW: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Updates the numbers at `at` (int64 [ROWS, 128]) of the parameter that `row` describes; `group` (int64 [ROWS])
    are those rows' places among the groups of 128. Returns the parameter as it is stored, in FP32."""
    p_ptr = numbers_at(tl.load(row), P, ALIGNED)
    now = now_ptr + tl.load(row + 22) * NOW
    whole = now.to(tl.pointer_type(tl.int32), bitcast=True)
    if MASTER:
        master_ptr = numbers_at(tl.load(row + 16), "float32", ALIGNED)
        p = tl.load(master_ptr + at, mask=held, other=0.0)
    else:
        p = tl.load(p_ptr + at, mask=held, other=0.0).to(tl.float32)
    if tl.load(whole + 4) == 0:
        g_ptr = numbers_at(tl.load(row + 13), G, ALIGNED)
        m_ptr = numbers_at(tl.load(row + 14), MOMENTS, ALIGNED)
        v_ptr = numbers_at(tl.load(row + 15), MOMENTS, ALIGNED)
        g = tl.load(g_ptr + at, mask=held, other=0.0).to(tl.float32) * tl.load(now + 3)
        m = tl.load(m_ptr + at, mask=held, other=0)
        v = tl.load(v_ptr + at, mask=held, other=0)
        if MOMENTS == "uint8":
            m_amax = tl.load(row + 17).to(tl.pointer_type(tl.float32)) + group
            m_k = tl.load(row + 18).to(tl.pointer_type(tl.uint8)) + group
            v_amax = tl.load(row + 19).to(tl.pointer_type(tl.float32)) + group
            v_k = tl.load(row + 20).to(tl.pointer_type(tl.uint8)) + group
            m = decode(
                m, tl.load(m_amax, mask=held_group, other=0.0), tl.load(m_k, mask=held_group, other=1), roots_ptr
            )
            v = decode(
                v, tl.load(v_amax, mask=held_group, other=0.0), tl.load(v_k, mask=held_group, other=1), roots_ptr
            )
        m = m.to(tl.float32)
        v = v.to(tl.float32)
        m = m + (g - m) * c1
        v = v * beta2 + (g * c2) * g
        root = tl.sqrt_rn(v) * tl.load(now + 1) + eps
        p = p * tl.load(now + 2) - tl.div_rn(m, root) * tl.load(now)
        if MASTER:
            tl.store(master_ptr + at, p, mask=held)
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=held)
        word = tl.zeros([ROWS, 128], tl.uint32)
        if STOCHASTIC:
            quad = group[:, None] * 32 + tl.arange(0, 32)[None, :]
            number = tl.load(row + 23).to(tl.int32)
            word = words_of_four(quad, seed, number, tl.load(whole + 5), [ROWS, 128])
        m_word, v_word = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
        if MOMENTS == "uint8":
            code, amax, k = encode(m, m_word, roots_ptr, True, STOCHASTIC)
            tl.store(m_ptr + at, code, mask=held)
            tl.store(m_amax, amax, mask=held_group)
            tl.store(m_k, k, mask=held_group)
            code, amax, k = encode(v, v_word, roots_ptr, False, STOCHASTIC)
            tl.store(v_ptr + at, code, mask=held)
            tl.store(v_amax, amax, mask=held_group)
            tl.store(v_k, k, mask=held_group)
        elif MOMENTS == "bfloat16":
            tl.store(m_ptr + at, rounded_bf16(m, m_word, STOCHASTIC), mask=held)
            tl.store(v_ptr + at, rounded_bf16(v, v_word, STOCHASTIC), mask=held)
        else:
            tl.store(m_ptr + at, m, mask=held)
            tl.store(v_ptr + at, v, mask=held)
    return p.to(p_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["seed"])
def update_lines(
    table_ptr, owner_ptr, now_ptr, roots_ptr, seed, beta2, c1, c2, eps,
    KEYS: tl.constexpr, P: tl.constexpr, G: tl.constexpr, MASTER: tl.constexpr, MOMENTS: tl.constexpr,
    STOCHASTIC: tl.constexpr, NOW: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Parameters as lines. KEYS: the largest key of each is raised as well, for the cast that follows."""
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    count = tl.load(row + 8) * tl.load(row + 9)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    group = (pid - tl.load(row + 10)) * ROWS + tl.arange(0, ROWS)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    p = update_rows(
        row, now_ptr, roots_ptr, at, at < count, group, group * 128 < count, seed, beta2, c1, c2, eps,
        P, G, MASTER, MOMENTS, STOCHASTIC, NOW, ALIGNED, ROWS,
    )  # fmt: skip
    if KEYS:
        largest = tl.maximum(tl.max(tl.where(at < count, key(p), 0)), 0x00800000)
        tl.atomic_max(tl.load(row + 7).to(tl.pointer_type(tl.int32)), largest, sem="relaxed")


@triton.jit(do_not_specialize=["seed"])
def update_tiles(
    table_ptr, owner_ptr, now_ptr, roots_ptr, seed, beta2, c1, c2, eps, nothing,
    MODE: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr, PARTS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr, G: tl.constexpr, MASTER: tl.constexpr, MOMENTS: tl.constexpr,
    STOCHASTIC: tl.constexpr, NOW: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weights [rows, cols] whose codes follow: whole rectangles of BM x BN = 128; `nothing` is 0.0."""
    tl.static_assert(BN == 128)
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    cols = tl.multiple_of(tl.load(row + 9), 128)
    across = cols.to(tl.int32) // BN
    place = pid - tl.load(row + 10).to(tl.int32)
    first = tl.multiple_of(place // across * BM * cols + place % across * BN, 128)
    for start in range(0, BM, ROWS):
        begins = first + (start + tl.arange(0, ROWS)) * cols
        at = begins[:, None] + tl.arange(0, 128)[None, :]
        every = tl.full([ROWS], True, tl.int1)
        update_rows(
            row, now_ptr, roots_ptr, at, every[:, None], begins // 128, every, seed, beta2, c1, c2, eps,
            P, G, MASTER, MOMENTS, STOCHASTIC, NOW, True, ROWS,
        )  # fmt: skip
    tl.debug_barrier()
    x_ptr = numbers_at(tl.load(row), P, True)
    cast_one(x_ptr, row, pid, nothing, MODE, E4M3, POWER, True, PARTS, J, BM, BN)


# --------------------------------------------------------------------------- what is launched


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of `update_lines` (mode "line" or "key") or `update_tiles`, and what it reads."""

    mode: str
    form: tuple[bool, bool]  # E4M3, power of two
    constants: dict[str, Any]
    programs: int
    table: Tensor
    owner: Tensor
    kept: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The launches for a list of slots, and by what to know that it is still the same list."""

    known_by: tuple[Any, ...]
    steps: Tensor
    now: Tensor
    roots: Tensor
    launches: tuple[Launch, ...]
    kept: tuple[Tensor, ...]


def adamw(
    slots: Sequence[Slot], settings: Settings, prepared: Prepared | None = None, use: Shape | None = None
) -> Prepared:
    """`reference.adamw` on a GPU, equal in bytes; returns what to pass as `prepared` the next time. `use` replaces the
    shape of `update_tiles`, for measurements."""
    known_by = (settings.moments, settings.stochastic, *map(_addresses, slots))
    if prepared is None or prepared.known_by != known_by:
        prepared = _prepare(slots, settings, known_by, prepared)
    _begin(len(slots), settings, prepared)
    beta2, c1, c2 = single(settings.betas[1]), single(1.0 - settings.betas[0]), single(1.0 - settings.betas[1])
    low = settings.seed & 0xFFFFFFFF
    numbers = (low - (low >> 31 << 32), beta2, c1, c2, single(settings.eps))
    for launch in prepared.launches:
        how = use if use is not None and launch.mode in MODES.values() else shape(launch.mode, settings.moments)
        same = {
            **launch.constants, "NOW": NOW, "COLUMNS": COLUMNS, "ROWS": how.rows, "num_warps": how.warps,
            "maxnreg": how.registers, "enable_fp_fusion": False,
        }  # fmt: skip
        grid, reads = (launch.programs,), (launch.table, launch.owner, prepared.now, prepared.roots)
        if launch.mode in ("line", "key"):
            update_lines[grid](*reads, *numbers, KEYS=launch.mode == "key", **same)
            continue
        tile, (e4m3, power_of_two) = plan(launch.mode, True), launch.form
        update_tiles[grid](
            *reads, *numbers, 0.0, MODE=launch.mode, E4M3=e4m3, POWER=power_of_two, PARTS=PARTS, J=4, BM=tile.rows,
            BN=tile.cols, **same,
        )  # fmt: skip
    return prepared


def _begin(count: int, settings: Settings, prepared: Prepared) -> None:
    lr, found_inf, grad_scale = settings.lr, settings.found_inf, settings.grad_scale
    here, now = isinstance(lr, Tensor), prepared.now
    rates = [0.0 if isinstance(lr, Tensor) else lr, *settings.betas, settings.weight_decay]
    begin[(triton.cdiv(count, 128),)](
        prepared.steps, now, count, lr if here else now, now if found_inf is None else found_inf.float(),
        now if grad_scale is None else grad_scale.float(), *(half for rate in rates for half in halves(rate)),
        LR_HERE=here, SKIPS=found_inf is not None, SCALED=grad_scale is not None, NOW=NOW, BLOCK=128, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def _addresses(slot: Slot) -> tuple[Any, ...]:
    state = tuple(tensor.data_ptr() for tensor in slot.state.values())
    after = slot.after
    follows: tuple[Any, ...] = ()
    if after is not None:
        cast = after.cast
        parts = (cast.codes, cast.codes_t, cast.scale, cast.given, cast.amax, cast.key)
        form = (after.format.name, str(after.tile), after.power_of_two)
        follows = (*form, *(None if part is None else part.data_ptr() for part in parts))
    grad, parameter = slot.grad, slot.parameter
    same = (parameter.shape, parameter.dtype, grad.dtype, slot.number)
    return (parameter.data_ptr(), grad.data_ptr(), *state, *same, *follows)


def mode_of(slot: Slot) -> str:
    """How a slot is updated: "line", "key", or as a mode of `cast_one`."""
    if slot.after is None:
        return "line"
    return "key" if slot.after.cast.key is not None else MODES[str(slot.after.tile)]


def fits(slot: Slot) -> bool:
    """Whether what follows the update of this weight can be made with it: a key always, codes where whole rectangles
    and 16 bytes at a time fit."""
    after, mode = slot.after, mode_of(slot)
    if after is None or mode == "key":
        return True
    use, (rows, cols) = plan(mode, True), after.cast.x.shape
    lines = (slot.parameter, slot.grad, after.cast.codes, after.cast.codes_t, *_lines(slot.state))
    return rows % use.rows == 0 and cols % 128 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in lines)


def _lines(state: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of the state that are as long as the parameter."""
    return [state[name] for name in (*moments.NAMES, "master") if name in state]


def _prepare(slots: Sequence[Slot], settings: Settings, known_by: tuple[Any, ...], old: Prepared | None) -> Prepared:
    device = slots[0].parameter.device
    groups: dict[tuple[Any, ...], list[tuple[int, Slot]]] = {}
    for index, slot in enumerate(slots):
        if slot.parameter.numel():
            groups.setdefault(_group(slot), []).append((index, slot))
    launches = tuple(_launch(group, members, settings) for group, members in groups.items())
    nothing = [0 if s.after is None or s.after.cast.key is None else s.after.cast.key.data_ptr() for s in slots]
    pairs = [(s.state["step"].data_ptr(), zero) for s, zero in zip(slots, nothing, strict=True)]
    steps, pinned = upload(torch.tensor(pairs, dtype=torch.int64, device="cpu"), device)
    now = torch.zeros(len(slots), NOW, device=device)
    if old is not None and old.roots.device == now.device:
        return Prepared(known_by, steps, now, old.roots, launches, (*old.kept[:1], pinned))
    roots, pinned_roots = upload(moments.roots(), device)
    return Prepared(known_by, steps, now, roots, launches, (pinned_roots, pinned))


def _group(slot: Slot) -> tuple[Any, ...]:
    mode, after = mode_of(slot), slot.after
    lines = (slot.parameter, slot.grad, *_lines(slot.state))
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in lines) and slot.parameter.numel() % 16 == 0
    form = (True, True) if after is None else (after.format.name == "e4m3", after.power_of_two)
    return mode, form, slot.parameter.dtype, slot.grad.dtype, "master" in slot.state, aligned


def _launch(group: tuple[Any, ...], members: list[tuple[int, Slot]], settings: Settings) -> Launch:
    mode, form, p, g, master, aligned = group
    device = members[0][1].parameter.device
    counts, rows, first, nobody = [], [], 0, torch.zeros(1, device=device)
    for index, slot in members:
        count = _programs(slot, mode, settings.moments)
        rows.append(_row(index, slot, first, nobody))
        counts.append(count)
        first += count
    table, pinned = upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
    owner, pinned_owner = upload(owners(counts), device)
    kept = moments.KINDS[settings.moments]
    constants = {
        "P": str(p)[6:], "G": str(g)[6:], "MASTER": master, "MOMENTS": "uint8" if kept.itemsize == 1 else str(kept)[6:],
        "STOCHASTIC": settings.stochastic and settings.moments != "fp32",
    }  # fmt: skip
    if mode in ("line", "key"):
        constants["ALIGNED"] = aligned
    return Launch(mode, form, constants, first, table, owner, (nobody, pinned, pinned_owner))


def _programs(slot: Slot, mode: str, moments: str) -> int:
    if slot.after is None or mode == "key":
        return -(-slot.parameter.numel() // (shape(mode, moments).rows * 128))
    use, (rows, cols) = plan(mode, True), slot.after.cast.x.shape
    return rows // use.rows * (cols // use.cols)


def _row(index: int, slot: Slot, first: int, nobody: Tensor) -> list[int]:
    """A row of the table: what `cast_one` reads, then what `update_rows` does."""
    cast = None if slot.after is None else slot.after.cast
    at = lambda tensor: 0 if tensor is None else tensor.data_ptr()  # noqa: E731
    head = [0] * 8
    if cast is not None:
        amax = nobody if cast.amax is None else cast.amax
        parts = (None, cast.codes, cast.codes_t, cast.scale, cast.scale, cast.given, amax, cast.key)
        head = [at(part) for part in parts]
    head[0] = slot.parameter.data_ptr()
    rows, cols = (1, slot.parameter.numel()) if cast is None else cast.x.shape
    state = [at(slot.state.get(name)) for name in (*moments.NAMES, "master", *KEPT)]
    numbers = [rows, cols, first, 1, 0, slot.grad.data_ptr(), *state, 0, index, slot.number]
    assert len(head) + len(numbers) == COLUMNS
    return head + numbers
