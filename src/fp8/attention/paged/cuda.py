"""Decode attention in CUDA: a fixed number of blocks stream all pages of a batch; `decode.cu` says how.

Beside the Triton kernel of this room: nothing waits at a barrier between memory and tensor core, values change places
in registers and not in shared memory, work is dealt out by the lengths that the device knows rather than by the widest
table, and a launch may begin while the one before ends.

The bound, with A the weighted sum of |v|, over n keys: |out - exact| <= 2^-8 |out| + 2^-11 A + 2^-36 n max |v|, the
rounding of the output, of the weights, and of what FP16 flushes. Sums are FP32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import nvrtc
from ...fused.rows import Into
from ...fused.rows.cuda import Parts, joined_codes, joined_values
from ...quantize.record import Quantized
from .pages import LayerPages
from .rows import Rows

SOURCE = "attention/paged/decode.cu"
LOG2E = 1.4426950408889634
WIDTH = 128  # the kernel's D
MOST_GROUP, MOST_SEQUENCES = 8, 1024
SHARED, REGISTERS = 227 * 1024, 128 * 32  # of a multiprocessor; of a warp, at most


class Operands(ctypes.Structure):
    """`struct Operands` of decode.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("q", "keys", "values", "key_scale", "value_scale", "pages", "lengths")],
        *[(name, ctypes.c_void_p) for name in ("products", "stats")],
        *[(name, ctypes.c_void_p) for name in ("positions", "cos", "sin", "slots", "saturated")],
        *[(name, ctypes.c_int) for name in ("sequences", "kv", "width", "parts", "soon")],
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Plan:
    """Keys of a partition, and of one of a sequence of at most `short`; warps of a block; steps in flight.

    All but `stages` enter the bits of a result, so they are constants.
    """

    keys: int = 512
    few: int = 256
    short: int = 2048
    warps: int = 4
    stages: int = 2

    def shared(self, group: int, dynamic: bool, sequences: int = MOST_SEQUENCES) -> int:
        """Bytes of shared memory: the warps' states, the rings, the length and partitions of each sequence."""
        states = 4 * self.warps * (group * WIDTH + 2 * 8)
        return states + self.stages * self.warps * (4096 + (128 if dynamic else 0)) + 8 * sequences

    def blocks(self, shared: int) -> int:
        """Blocks that a multiprocessor holds at once."""
        return max(1, min(SHARED // (shared + 1024), 65536 // (REGISTERS * self.warps)))

    def parts(self, length: int) -> int:
        """The most partitions of a sequence of up to `length` keys."""
        return max(-(-min(length, self.short) // self.few), -(-length // self.keys) if length > self.short else 0)


def why_not(sequences: int, heads: int, layer: LayerPages, batch: Rows) -> str | None:
    """Why the kernel does not take these; None when it does."""
    if not batch.decode:
        return "it takes one row a sequence"
    if layer.key_scale is None or layer.head_dim != WIDTH:
        return f"it reads an FP8 cache of {WIDTH} channels a head"
    if heads // layer.num_kv_heads > MOST_GROUP:
        return f"it takes at most {MOST_GROUP} query heads a key head"
    return None if sequences <= MOST_SEQUENCES else f"it takes at most {MOST_SEQUENCES} sequences"


def attend(
    q: Tensor, layer: LayerPages, batch: Rows, scale: float, use: Plan | None = None, early: bool = True
) -> Tensor:
    """`reference.attend` of one row a sequence, within the bound above; `use` and `early` are for measurements."""
    return joined_values(partitions(q.contiguous(), q.shape[1], layer, batch, scale, {}, use, early))


def rope_attend(
    qkv: Tensor, positions: Tensor, slots: Tensor, layer: LayerPages, rope: tuple[Tensor, Tensor], batch: Rows,
    scale: float, into: Into | None = None,
) -> Tensor | Quantized:  # fmt: skip
    """`reference.rope_write` of one row a sequence, equal in bytes, `attend` of what it gives, and its codes.

    The slot of a row is where its pages say that its last position lies.
    """
    turned = {"positions": positions, "cos": rope[0], "sin": rope[1], "slots": slots, "saturated": layer.saturated}
    heads = qkv.shape[1] // layer.head_dim - 2 * layer.num_kv_heads
    parts = partitions(qkv.contiguous(), heads, layer, batch, scale, turned)
    return joined_values(parts) if into is None else joined_codes(parts, into)


def soon(device: torch.device) -> bool:
    """Whether lengths and pages were there before the kernel before began. In a graph they must be: inputs that are
    filled before it is replayed, not what a kernel just before in the same graph makes."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def partitions(
    q: Tensor, heads: int, layer: LayerPages, batch: Rows, scale: float, turned: dict[str, Tensor],
    use: Plan | None = None, early: bool = True,
) -> Parts:  # fmt: skip
    """Attention over each partition; q holds queries, or with `turned` the joined product."""
    sequences, kv = q.shape[0], layer.num_kv_heads
    use, group, dynamic = use or Plan(), heads // kv, not layer.static
    assert layer.key_scale is not None and layer.value_scale is not None
    pages = batch.pages.contiguous()
    parts = use.parts(pages.shape[1] * layer.page_size)
    products = torch.empty(sequences, kv, parts, group, WIDTH, device=q.device)
    stats = torch.empty(sequences, kv, parts, group, 2, device=q.device)
    sizes = {"PART": use.keys, "FEW": use.few, "SHORT": use.short}
    constants = {
        "GROUP": group, "E4M3": int(layer.key_codes.dtype == torch.float8_e4m3fn), "DYNAMIC": int(dynamic),
        "PAGE": layer.page_size, "WARPS": use.warps, "STAGES": use.stages, "TURN": int(bool(turned)),
        **sizes,
    }  # fmt: skip
    held = {
        "q": q, "keys": layer.key_codes, "values": layer.value_codes, "key_scale": layer.key_scale,
        "value_scale": layer.value_scale, "pages": pages, "lengths": batch.lengths, "products": products,
        "stats": stats, **turned,
    }  # fmt: skip
    operands = Operands(
        **{name: t.data_ptr() for name, t in held.items()},
        sequences=sequences, kv=kv, width=pages.shape[1], parts=parts, soon=early and soon(q.device),
        scale=scale * LOG2E,
    )  # fmt: skip
    shared = use.shared(group, dynamic, sequences)
    at_once = torch.cuda.get_device_properties(q.device).multi_processor_count * use.blocks(shared)
    blocks = kv * max(1, min(at_once // kv, sequences * parts))
    nvrtc.launch(
        SOURCE, "decode", tuple(constants.items()), q.device, blocks, 32 * use.warps, operands,
        shared=shared, early=early,
    )  # fmt: skip
    return Parts(products, stats, batch.lengths, group, sizes)
