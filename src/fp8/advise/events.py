"""What a profiler recorded, as plain records, and what kind of work each kernel is.

The source is the Chrome trace that torch.profiler writes: its categories and arguments are the same in all versions,
which its Python objects are not. Times are in microseconds. GPU records and CPU records share one clock; a kernel and
the call that launched it share a `correlation`.

Kinds are told by names, because nothing else is recorded. The first rule that matches counts. cuBLASLt's kernels on
Hopper are `nvjet_sm90_` and a letter for each type: `t` is BF16, `q` E4M3 and `r` E5M2. A kernel that torch.compile
made (`triton_poi_...`) is named after the operations around it, so it is elementwise whatever its name holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FP8_GEMM, BF16_GEMM, ATTENTION, CAST = "FP8 products", "BF16 products", "attention", "cast, quantize"
ELEMENTWISE, COPY, OPTIMIZER, COLLECTIVE, OTHER = (
    "norm, activation, elementwise", "copies", "optimizer", "communication", "other",
)  # fmt: skip
KINDS = (FP8_GEMM, BF16_GEMM, ATTENTION, CAST, ELEMENTWISE, COPY, OPTIMIZER, COLLECTIVE, OTHER)

GPU_RULES: tuple[tuple[str, str], ...] = (
    (COLLECTIVE, r"nccl|all_?reduce_kernel"),
    (COPY, r"^mem(cpy|set)"),
    (ATTENTION, r"sdpa|flash|fmha|attention|cudnn::fusion::|pytorch_flash"),
    (ELEMENTWISE, r"^triton_(poi|red|per|unk)"),
    (FP8_GEMM, r"nvjet_sm\d+_[qr]{2}|gemm.*(e4m3|e5m2|fp8|float8)|(e4m3|e5m2|fp8|float8).*gemm|^_?matmul_kernel"),
    (BF16_GEMM, r"nvjet|gemm|cutlass|cublas|splitk|xmma|^triton_(tem|mm)|convolution|conv2d|implicit_"),
    (CAST, r"^(cast_|partial_keys|row_column_keys|amax)|quantize|float8|fp8|e4m3|e5m2"),
    (OPTIMIZER, r"multi_tensor_apply|adam|lpnorm|foreach|sgd"),
    (COPY, r"copy_kernel|catarray|direct_copy"),
    (ELEMENTWISE, r"elementwise|reduce_kernel|norm|softmax|nll|index|gather|scatter|embedding|rope|silu|gelu|triton"),
)
CPU_RULES: tuple[tuple[str, str], ...] = (
    (FP8_GEMM, r"fp8::matmul|_?scaled_mm"),
    (CAST, r"fp8::quantize|float8"),
    (ATTENTION, r"attention|sdpa"),
    (BF16_GEMM, r"::(mm|addmm|bmm|baddbmm|matmul|linear|convolution|mkldnn_convolution|_convolution)\b"),
    (OPTIMIZER, r"optimizer|_foreach_|adam"),
    (COPY, r"copy_|::to\b|_to_copy|clone|contiguous|::cat\b"),
    (ELEMENTWISE, r"aten::"),
)
COMPILED = re.compile(r"^## Call CompiledFxGraph|Torch-Compiled Region|^triton_(poi|red|per)_", re.IGNORECASE)
CATEGORIES = {
    "kernel": "kernel",
    "gpu_memcpy": "memory",
    "gpu_memset": "memory",
    "cpu_op": "op",
    "cuda_runtime": "runtime",
    "cuda_driver": "runtime",
    "user_annotation": "mark",
}
MARK = "fp8 step"  # what `profile` puts around each step
SYNCHRONIZING = re.compile(r"(Stream|Device|Event|Ctx)Synchronize$")


@dataclass(frozen=True)
class Event:
    """One record. `where`: "kernel", "memory" (a copy or clearing on the GPU), "op", "runtime" (a CUDA call of the
    host) or "mark". `track`: the stream, or the thread. Microseconds."""

    name: str
    where: str
    start: float
    duration: float
    track: int = 0
    correlation: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def on_gpu(self) -> bool:
        return self.where in ("kernel", "memory")

    @property
    def synchronizes(self) -> bool:
        return self.where == "runtime" and SYNCHRONIZING.search(self.name) is not None


def kind_of(event: Event) -> str:
    """The kind of work of a GPU record or of a CPU operation."""
    rules = CPU_RULES if event.where == "op" else GPU_RULES
    for kind, pattern in rules:
        if re.search(pattern, event.name, re.IGNORECASE):
            return kind
    return OTHER


def events_of(trace: dict[str, Any]) -> list[Event]:
    """The records of a Chrome trace as `torch.profiler` writes it, by start."""
    found = []
    for raw in trace.get("traceEvents", ()):
        where = CATEGORIES.get(str(raw.get("cat", "")).lower())
        if raw.get("ph") != "X" or where is None:
            continue
        given = raw.get("args", {})
        track = given.get("stream", raw.get("tid", 0))
        found.append(
            Event(raw["name"], where, float(raw["ts"]), float(raw.get("dur", 0.0)),
                  track if isinstance(track, int) else 0, int(given.get("correlation", 0)))
        )  # fmt: skip
    return sorted(found, key=lambda event: (event.start, -event.duration))


def self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """CPU operations with the time that is theirs alone: without the operations that they call."""
    totals: list[tuple[Event, float]] = []
    stacks: dict[int, list[int]] = {}  # positions in `totals` of what is open, by thread
    for event in sorted((e for e in events if e.where == "op"), key=lambda e: (e.start, -e.duration)):
        stack = stacks.setdefault(event.track, [])
        while stack and totals[stack[-1]][0].end <= event.start:
            stack.pop()
        if stack:
            outer, own = totals[stack[-1]]
            totals[stack[-1]] = (outer, own - event.duration)
        stack.append(len(totals))
        totals.append((event, event.duration))
    return [(event, max(own, 0.0)) for event, own in totals]
