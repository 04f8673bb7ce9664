"""`quantize_many` on the GPU: one launch over the rectangles of many matrices.

**Who does what.** The rectangles of all matrices form one line, a program each. `owner` (int32, one for each rectangle)
says whose it is; a row of `table` (int64) holds what a matrix is: addresses, sides, and the number of its first
rectangle. The program then runs `cast_rectangle`, the body of the kernel for one matrix: the same instructions, so
the same bytes. The first pass of a measured scale has such a line of its own.

**Alignment.** An address that comes out of memory tells the compiler nothing. Where all of a launch's addresses and
sides allow it, the kernel says so itself (`EVEN`); other matrices go into a second launch with masks, whose
transposed codes leave byte by byte, since their number of rows need not be a multiple of four.

**What is kept.** Table and owners lie on the device and are made anew only when an address or a side has changed. They
are copied from pinned memory, without waiting, and the pinned copy is kept with them: a graph that captured the
copying reads it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Format
from ..tile import Tile
from . import many
from .many import Cast
from .triton import MODES, PARTS, plan
from .triton_tiles import cast_rectangle, largest_key, raise_row_column_keys

COLUMNS = 13  # of the table, as `_launch` writes them and `cast_one` reads them
FIRST_BLOCK = 8192  # numbers a stretch of the first pass
WARPS = 8  # with four, the 64 x 128 rectangle of a tensor scale spills at 128 registers


# --------------------------------------------------------------------------- kernels


@triton.jit
def numbers_at(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """An address (int64) as a pointer to numbers of the torch type called KIND; ALIGNED: it is a multiple of 16.

    The hint has to be given here: it sticks to the conversion, and is lost on what a function returns.
    """
    if KIND == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND == "bfloat16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif KIND == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        tl.static_assert(KIND == "uint8")
        pointer = address.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def cast_many(
    table_ptr, owner_ptr, rectangles, nothing,
    MODE: tl.constexpr, KIND: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One rectangle of one matrix of the table; `nothing` is 0.0 (`nearest_again`)."""
    pid = tl.program_id(0)
    if MODE == "current" or MODE == "row":
        pid = rectangles - 1 - pid
    row = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    x_ptr = numbers_at(tl.load(row), KIND, EVEN)
    cast_one(x_ptr, row, pid, nothing, MODE, E4M3, POWER, EVEN, PARTS, J, BM, BN)


@triton.jit
def cast_one(
    x_ptr, row, pid, nothing, MODE: tl.constexpr, E4M3: tl.constexpr, POWER: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rectangle `pid` of the line, of the matrix at `x_ptr` that the table's `row` describes."""
    codes_ptr = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    codes_t_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    scale_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    scale_t_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    amax_ptr = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    keys_ptr = tl.load(row + 7).to(tl.pointer_type(tl.int32))
    rows, cols = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32)
    if EVEN:
        codes_ptr = tl.multiple_of(codes_ptr, 16)
        codes_t_ptr = tl.multiple_of(codes_t_ptr, 16)
        rows, cols = tl.multiple_of(rows, BM), tl.multiple_of(cols, BN)
    across = tl.cdiv(cols, BN)
    place = pid - tl.load(row + 10).to(tl.int32)
    tile_r, tile_c = place // across, place % across
    if MODE == "tensor":  # the scale that is used is kept beside the codes
        given_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
        if place == 0:
            tl.store(scale_ptr, tl.load(given_ptr))
        scale_ptr = given_ptr
    stride = across if MODE == "square" else 1
    cast_rectangle(
        x_ptr, codes_ptr, codes_t_ptr, scale_ptr, scale_t_ptr, keys_ptr, amax_ptr,
        rows, cols, tile_r, tile_c, stride, 1, 1, 1, tl.load(row + 11).to(tl.int32), 0, 0, 0, nothing,
        MODE, False, True, 0, E4M3, POWER, False, False, EVEN, EVEN, PARTS, J, BM, BN, True,
    )  # fmt: skip


@triton.jit
def partial_keys_many(
    table_ptr, owner_ptr, KIND: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """The first pass of current scaling: the largest key of one part of one matrix."""
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    x_ptr = numbers_at(tl.load(row), KIND, EVEN)
    keys_ptr = tl.load(row + 7).to(tl.pointer_type(tl.int32))
    count = tl.load(row + 8) * tl.load(row + 9)
    part = pid - tl.load(row + 12).to(tl.int32)
    parts = tl.load(row + 11).to(tl.int32)
    tl.store(keys_ptr + part, largest_key(x_ptr, count, part, parts, BLOCK, EVEN))


@triton.jit
def row_column_keys_many(
    table_ptr, owner_ptr, KIND: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The first pass of row scales: one rectangle's share of the largest keys of its rows and columns."""
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    x_ptr = numbers_at(tl.load(row), KIND, EVEN)
    keys_ptr = tl.load(row + 7).to(tl.pointer_type(tl.int32))
    rows, cols = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32)
    if EVEN:
        cols = tl.multiple_of(cols, BN)
    across = tl.cdiv(cols, BN)
    place = pid - tl.load(row + 12).to(tl.int32)
    raise_row_column_keys(x_ptr, keys_ptr, rows, cols, place // across, place % across, BM, BN, EVEN)


# --------------------------------------------------------------------------- what is launched


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of `cast_many`, with the first pass before it, and all that both read. `tensors` keeps it alive."""

    mode: str
    kind: str
    even: bool
    rectangles: int
    first: int
    table: Tensor
    owner: Tensor
    first_owner: Tensor
    keys: Tensor
    tensors: tuple[Tensor, ...]

    def run(self, format: Format, power_of_two: bool) -> None:
        use = plan(self.mode, True)
        same = {"KIND": self.kind, "EVEN": self.even, "COLUMNS": COLUMNS}
        if self.mode == "row":
            self.keys.zero_()
            row_column_keys_many[(self.first,)](self.table, self.first_owner, BM=64, BN=128, num_warps=WARPS, **same)
        elif self.first:
            partial_keys_many[(self.first,)](self.table, self.first_owner, BLOCK=FIRST_BLOCK, num_warps=WARPS, **same)
        cast_many[(self.rectangles,)](
            self.table, self.owner, self.rectangles, 0.0,
            MODE=self.mode, E4M3=format.name == "e4m3", POWER=power_of_two, PARTS=PARTS, J=4 if self.even else 1,
            BM=use.rows, BN=use.cols, num_warps=WARPS, maxnreg=128 if power_of_two else None, **same,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prepared:
    """The launches for a list of casts, and by what to know that it is still the same list."""

    known_by: tuple[Any, ...]
    launches: tuple[Launch, ...]


def quantize_many(
    casts: Sequence[Cast], format: Format, tile: Tile, power_of_two: bool, prepared: Prepared | None = None
) -> Prepared:
    """`many.quantize_many` on a GPU, equal in bytes; returns what to pass as `prepared` the next time."""
    many.quantize_many([cast for cast in casts if not cast.x.numel()], format, tile, power_of_two)
    known_by = (str(tile), *map(_addresses, casts))
    if prepared is None or prepared.known_by != known_by:
        prepared = Prepared(known_by, tuple(_launches(casts, tile)))
    for launch in prepared.launches:
        launch.run(format, power_of_two)
    return prepared


def _addresses(cast: Cast) -> tuple[Any, ...]:
    parts = (cast.x, cast.codes, cast.codes_t, cast.scale, cast.scale_t, cast.given, cast.amax, cast.key)
    return (*cast.x.shape, cast.x.dtype, *(None if part is None else part.data_ptr() for part in parts))


def _launches(casts: Sequence[Cast], tile: Tile) -> list[Launch]:
    """The casts by what a launch has in common: mode, type, evenness, and whether the maximum is known."""
    groups: dict[tuple[Any, ...], list[Cast]] = {}
    for cast in casts:
        if cast.x.numel():
            mode = MODES[str(tile)]
            mode = "current" if mode == "tensor" and cast.given is None else mode
            groups.setdefault((mode, cast.x.dtype, _even(cast, mode), cast.key is not None), []).append(cast)
    return [_launch(members, mode, even, known) for (mode, _, even, known), members in groups.items()]


def _even(cast: Cast, mode: str) -> bool:
    """Whether the rectangles fit, and every row starts where 16 bytes do."""
    use, (rows, cols) = plan(mode, True), cast.x.shape
    aligned = all(part.data_ptr() % 16 == 0 for part in (cast.x, cast.codes, cast.codes_t))
    return aligned and rows % use.rows == 0 and cols % use.cols == 0


def _launch(casts: list[Cast], mode: str, even: bool, known: bool) -> Launch:
    use, device = plan(mode, True), casts[0].x.device
    down_across = [(-(-x.shape[0] // use.rows), -(-x.shape[1] // use.cols)) for x in (cast.x for cast in casts)]
    counts = [down * across for down, across in down_across]
    parts, room = _first_pass(casts, mode, known)
    keys = torch.empty(sum(room), dtype=torch.int32, device=device)
    nobody = torch.zeros(1, device=device)
    rows, first_rectangle, first_part, spot = [], 0, 0, 0
    for cast, count, part, size in zip(casts, counts, parts, room, strict=True):
        measured = cast.key if cast.key is not None else keys[spot:] if size else cast.scale
        addresses = (
            cast.x, cast.codes, cast.codes_t, cast.scale, cast.scale if cast.scale_t is None else cast.scale_t,
            cast.scale if cast.given is None else cast.given, nobody if cast.amax is None else cast.amax, measured,
        )  # fmt: skip
        numbers = (*cast.x.shape, first_rectangle, 1 if mode == "row" or known else part, first_part)
        rows.append((*(tensor.data_ptr() for tensor in addresses), *numbers))
        first_rectangle, first_part, spot = first_rectangle + count, first_part + part, spot + size
    table, pinned = upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
    owner, pinned_owner = upload(owners(counts), device)
    first_owner, pinned_first = upload(owners(parts), device)
    return Launch(
        mode, str(casts[0].x.dtype)[6:], even, first_rectangle, first_part, table, owner, first_owner, keys,
        (nobody, pinned, pinned_owner, pinned_first),
    )  # fmt: skip


def _first_pass(casts: list[Cast], mode: str, known: bool) -> tuple[list[int], list[int]]:
    """For each cast: programs of the first pass, and how many keys they leave."""
    shapes = [cast.x.shape for cast in casts]
    if mode == "row":
        return [-(-rows // 64) * -(-cols // 128) for rows, cols in shapes], [sum(shape) + 1 for shape in shapes]
    if mode == "current" and not known:
        parts = [min(PARTS, -(-rows * cols // FIRST_BLOCK)) for rows, cols in shapes]
        return parts, parts
    return [0] * len(casts), [0] * len(casts)


def owners(counts: list[int]) -> Tensor:
    """[3, 1, 2] to [0, 0, 0, 1, 2, 2], int32."""
    numbers = torch.arange(len(counts), dtype=torch.int32, device="cpu")
    return torch.repeat_interleave(numbers, torch.tensor(counts, device="cpu"))


def upload(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor on the device, copied without waiting, and the host's copy, to be kept as long."""
    if device.type != "cuda":
        return host.to(device), host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
