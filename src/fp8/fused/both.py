"""Starts `both.cu`: room for its outputs, its arguments, and what is compiled in.

    producer        values [rows, width]                                  made from
    plain           x                                                     x [rows, width]
    norm            h * rstd * weight                                     h [rows, width], rstd [rows], weight [width]
    rope            the joined gradient of q, k and v, turned back        dq, dk, dv, any strides; tables of cos and sin
    act             f(x), or f(gate) * up                                 x [rows, width] or [rows, 2 width]
    act_backward    its gradient, [rows, 1 or 2 width], and h again       dh [rows, width], x

A program takes 64 x 128 values, with tiles of 128 it takes 128 x 128; in the backward
of an activation, with scales of rows or groups, one such rectangle after the other.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import nvrtc
from .target import Codes, Target

if TYPE_CHECKING:
    from .rope.reference import Heads

PRODUCERS = {"plain": 0, "norm": 1, "rope": 2, "act": 3, "act_backward": 4}
MODES = {"given": 0, "known": 1, "measured": 2, "row": 3, "group": 4, "store": 5}
COLS = 128


class Source(ctypes.Structure):
    """`struct Source` of both.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("a", "b", "c", "cos", "sin")],
        *[(f"{tensor}_{axis}", ctypes.c_uint64) for tensor in "abc" for axis in "bht"],
        *[(name, ctypes.c_int) for name in ("tokens", "queries", "heads", "width")],
    )
    producer: str
    constants: dict[str, int]
    keep: tuple[Tensor | None, ...]


class Out(ctypes.Structure):
    """`struct Out` of both.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("codes", "codes_t", "scale", "scale_t", "keys", "keys_t", "amax")],
        *[(name, ctypes.c_int) for name in ("stride_r", "stride_c", "stride_tr", "stride_tc", "cols")],
    )


def readable(t: Tensor) -> Tensor:
    """Contiguous, and 16 bytes readable at once: a view into a flat buffer may begin anywhere."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _source(producer: str, keep: tuple[Tensor | None, ...], **fields: Any) -> Source:
    source = Source(**fields)
    source.producer, source.constants, source.keep = producer, {}, keep
    for name, tensor in zip(("a", "b", "c", "cos", "sin"), keep, strict=False):
        setattr(source, name, None if tensor is None else tensor.data_ptr())
    return source


def plain_source(x: Tensor) -> Source:
    return _source("plain", (readable(x),), width=x.shape[1])


def norm_source(h: Tensor, rstd: Tensor, weight: Tensor) -> Source:
    source = _source("norm", (readable(h), readable(rstd), readable(weight)), width=h.shape[1])
    source.constants = {"H32": int(h.dtype == torch.float32), "W32": int(weight.dtype == torch.float32)}
    return source


def rope_source(
    dq: Tensor, dk: Tensor, dv: Tensor, heads: Heads, tables: tuple[Tensor | None, Tensor | None]
) -> Source:
    strides = {
        f"{name}_{axis}": step
        for name, tensor in zip("abc", (dq, dk, dv), strict=True)
        for axis, step in zip("bht", tensor.stride(), strict=False)
    }
    return _source(
        "rope", (dq, dk, dv, *tables), **strides, tokens=dq.shape[2], queries=heads.queries,
        heads=heads.queries + heads.keys * 2, width=heads.total * heads.dim,
    )  # fmt: skip


def activation_source(dh: Tensor | None, x: Tensor, width: int) -> Source:
    if dh is None:
        return _source("act", (readable(x),), width=width)
    return _source("act_backward", (readable(dh), readable(x)), width=width)


class Room:
    """Outputs of a kernel for a matrix [rows, cols].

    target         None: the values themselves, in BF16
    down, across   which orientations are written
    known          the scale is given, and its amax is not asked for
    keys_t         the columns' keys where an earlier pass left them (tile "row")
    """

    def __init__(
        self, like: Tensor, rows: int, cols: int, target: Target | None, down: bool = True, across: bool = True,
        known: bool = False, keys_t: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.device, self.cols, self.target = like.device, cols, target
        if target is None:
            self.mode, self.down, self.across = "store", True, False
            self.codes: Tensor | None = torch.empty(rows, cols, dtype=torch.bfloat16, device=self.device)
            self.codes_t = self.keys = self.keys_t = self.amax = None
            self.scale = self.scale_t = torch.empty(0, 0, device=self.device)
            return
        self.mode = "known" if known and target.scale is not None else target.mode
        self.down, self.across = down, across
        dtype = target.format.dtype
        self.codes = torch.empty(rows, cols, dtype=dtype, device=self.device) if down else None
        self.codes_t = torch.empty(cols, rows, dtype=dtype, device=self.device) if across else None
        measured = self._scale(target, rows, cols) if down else torch.empty(0, 0, device=self.device)
        self.scale = target.scale if target.scale is not None else measured
        turned = across and self.mode in ("row", "group")
        self.scale_t = self._scale(target, cols, rows) if turned else self.scale
        self.keys, self.keys_t = None, keys_t
        if self.mode == "row" and keys_t is None:
            pair = torch.zeros(rows + cols, dtype=torch.int32, device=self.device)
            self.keys, self.keys_t = pair[:rows], pair[rows:]
        self.amax = None
        if self.mode in ("given", "measured"):
            self.amax = torch.zeros((), device=self.device) if target.amax is None else target.amax

    def _scale(self, target: Target, rows: int, cols: int) -> Tensor:
        """1x128 scales lie column by column, as cuBLASLt reads them."""
        down, across = target.tile.scale_shape(rows, cols)
        if self.mode == "group":
            return torch.empty(across, down, device=self.device).t()
        return torch.empty(down, across, device=self.device)

    @property
    def two_passes(self) -> bool:
        """Whether the values are measured before they can be written."""
        return self.mode == "measured" or (self.mode == "row" and self.keys is not None)

    @property
    def out(self) -> Out:
        tensors = (self.codes, self.codes_t, self.scale, self.scale_t, self.keys, self.keys_t, self.amax)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        return Out(*pointers, *self.scale.stride(), *self.scale_t.stride(), self.cols)

    @property
    def constants(self) -> dict[str, int]:
        target = self.target
        return {
            "MODE": MODES[self.mode], "ROWS": int(self.down), "COLS": int(self.across),
            "E4M3": int(target is None or target.format.name == "e4m3"),
            "POWER": int(target is None or target.power_of_two),
        }  # fmt: skip

    @property
    def result(self) -> Tensor | Codes:
        if self.target is None:
            assert self.codes is not None
            return self.codes
        scale_t = self.scale_t if self.across else None
        amax = self.scale if self.amax is None else self.amax
        return Codes(self.codes, self.scale, self.codes_t, scale_t, amax, self.keys_t)


def both(
    room: Room, source: Source, rows: int, width: int, again: Room | None = None, *, measured: bool = False,
    **constants: int,
) -> Room:  # fmt: skip
    """Fill `room` (and `again`, with the values of the forward, if `one_pass` allows it) from a source; `room` is
    returned.

    measured   the amax is there already
    """
    if rows % 16 or width % 16:
        raise AssertionError(f"both.cu takes multiples of 16, not {rows} x {width}")
    height = 128 if room.mode == "group" else 64
    fixed = {
        "PRODUCER": PRODUCERS[source.producer], "FUNCTION": 0, "GATED": 1, "H32": 0, "W32": 0, "DIM": 128,
        "AGAIN": int(again is not None), "H_E4M3": 1, "H_POWER": 1, "BM": height,
        "BLOCKS": blocks(room.mode, source.producer), "STAGED": int(staged(room.mode, source.producer)),
    }  # fmt: skip
    if again is not None:
        fixed |= {"H_E4M3": again.constants["E4M3"], "H_POWER": again.constants["POWER"]}
    fixed |= room.constants | source.constants | constants
    across = -(-width // COLS)
    arguments = (source, room.out, room.out if again is None else again.out, ctypes.c_int(rows), ctypes.c_int(across))
    for first in (1, 0) if room.two_passes and not measured else (0,):
        made = tuple(sorted({**fixed, "FIRST": first}.items()))
        programs, shared = -(-rows // height) * across, 0
        if fixed["STAGED"]:
            programs = min(programs, fixed["BLOCKS"] * multiprocessors(room.device))
            shared = 4 * height * 64 * (3 if fixed["GATED"] else 2)
        nvrtc.launch("fused/both.cu", "both", made, room.device, programs, 4 * height, *arguments, shared=shared)
    return room


def staged(mode: str, producer: str) -> bool:
    """Whether a program fetches its next rectangle while it works on this one. Chosen by measurement: it pays where
    scales of rows and columns make the work longer than the fetching."""
    return producer == "act_backward" and mode in ("row", "group")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def one_pass(room: Room, again: Room) -> bool:
    """Whether one launch can fill both: the kernel is compiled for one kind of scale, and `again` is not measured."""
    if again.mode == "known":
        return room.mode in ("given", "known", "measured")
    return room.mode == again.mode and not again.two_passes


def blocks(mode: str, producer: str) -> int:
    """How many programs must fit on a multiprocessor: what the compiler may spend on registers follows from it. Chosen
    by measurement: one output leaves room for four programs, the three of a backward for two."""
    if mode == "group":
        return 1
    return 2 if producer in ("act_backward", "norm") else 4
