"""From a list of events to what is wrong with a step, and the way out. Pure functions: no profiler, no GPU.

`analyse` gives the table (time by kind), the gaps by cause, and findings. Each finding says what was seen, what it
costs a step where that can be told, the likely cause, and what to do about it. A finding needs to be worth `WORTH` of
the step; a report of everything is a report of nothing.

What is known of the model beside the events comes in as `Facts`, what made the host wait as `Sync`s; both may be
empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .events import (
    ATTENTION,
    BF16_GEMM,
    CAST,
    COMPILED,
    COPY,
    FP8_GEMM,
    KINDS,
    MARK,
    OPTIMIZER,
    Event,
    kind_of,
    self_times,
)
from .gaps import CAUSES, Gap, gaps

WORTH = 0.02  # of a step
TINY = 5.0  # microseconds: a kernel that takes no longer is as long as its launch
FLASH = ("flash_fwd", "flash_bwd", "pytorch_flash")
AMAX = ("partial_keys", "row_column_keys")


@dataclass(frozen=True)
class Sync:
    """The host waited for the GPU: what waited, and the line of Python that asked for it ("file.py:12 in step")."""

    what: str
    line: str
    times: int = 1


@dataclass(frozen=True)
class Facts:
    """What is known of the model. `forwards`: FP8 forward products a step by layer; None where they were not counted
    (a compiled model does not say). `refreshed`: layers whose weight codes are kept. `high`: linear layers in high
    precision, with the gain that is predicted for each, by name."""

    fp8: tuple[str, ...] = ()
    refreshed: tuple[str, ...] = ()
    forwards: dict[str, int] | None = None
    high: dict[str, float] | None = None
    recipe: str = ""


@dataclass(frozen=True)
class Row:
    """One kind of work: milliseconds and calls a step, share of the busy time."""

    kind: str
    ms: float
    calls: float
    share: float


@dataclass(frozen=True)
class Finding:
    """What was seen, what it costs a step (0: cannot be told), why, and what to do."""

    what: str
    ms: float
    cause: str
    way_out: str


@dataclass(frozen=True)
class Analysis:
    """Milliseconds a step. `device` is "GPU", or "CPU" where nothing ran on a GPU; then there are no gaps."""

    device: str
    steps: int
    step_ms: float
    busy_ms: float
    rows: tuple[Row, ...]
    idle: dict[str, float]
    findings: tuple[Finding, ...]

    @property
    def idle_ms(self) -> float:
        return sum(self.idle.values())


def analyse(events: list[Event], steps: int, syncs: tuple[Sync, ...] = (), facts: Facts | None = None) -> Analysis:
    """What `steps` recorded steps say. `events` as `events.events_of` gives them."""
    facts = facts or Facts()
    on_gpu = [event for event in events if event.on_gpu]
    if not on_gpu:
        return _on_cpu(events, steps, facts)
    rows, found = _rows([(e, e.duration) for e in on_gpu], steps), gaps(events)
    span = (max(e.end for e in on_gpu) - min(e.start for e in on_gpu)) / 1e3 / steps
    idle = {cause: sum(g.duration for g in found if g.cause == cause) / 1e3 / steps for cause in CAUSES}
    seen = _Seen(events, on_gpu, found, rows, span, steps, syncs, facts)
    findings = [f for rule in RULES for f in rule(seen)]
    findings.sort(key=lambda f: -f.ms)
    return Analysis("GPU", steps, span, span - sum(idle.values()), rows, idle, tuple(findings))


def _on_cpu(events: list[Event], steps: int, facts: Facts) -> Analysis:
    times = self_times(events)
    rows, marks = _rows(times, steps), [e for e in events if e.where == "mark" and e.name == MARK]
    span = sum(e.duration for e in marks) / 1e3 / steps
    seen = _Seen(events, [], [], rows, span, steps, (), facts)
    findings = [*_stale_layers(seen), *_high_layers(seen), *_repeated_weights(seen)]
    return Analysis("CPU", steps, span, sum(row.ms for row in rows), rows, {}, tuple(findings))


def _rows(times: Iterable[tuple[Event, float]], steps: int) -> tuple[Row, ...]:
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event, own in times:
        kind = kind_of(event)
        total[kind] += own  # type: ignore[assignment]  # a Counter of floats
        calls[kind] += 1
    whole = sum(total.values()) or 1.0
    return tuple(
        Row(kind, total[kind] / 1e3 / steps, calls[kind] / steps, total[kind] / whole) for kind in KINDS if calls[kind]
    )


# --------------------------------------------------------------------------- findings


@dataclass(frozen=True)
class _Seen:
    """Everything that a rule may look at."""

    events: list[Event]
    on_gpu: list[Event]
    gaps: list[Gap]
    rows: tuple[Row, ...]
    step_ms: float
    steps: int
    syncs: tuple[Sync, ...]
    facts: Facts

    def ms(self, kind: str) -> float:
        return next((row.ms for row in self.rows if row.kind == kind), 0.0)

    def calls(self, kind: str) -> float:
        return next((row.calls for row in self.rows if row.kind == kind), 0.0)

    def idle(self, cause: str) -> float:
        return sum(gap.duration for gap in self.gaps if gap.cause == cause) / 1e3 / self.steps

    def worth(self, ms: float) -> bool:
        return ms >= WORTH * self.step_ms

    @property
    def compiled(self) -> bool:
        return any(COMPILED.search(event.name) for event in self.events)


def _synchronizations(seen: _Seen) -> Iterator[Finding]:
    waits = [e for e in seen.events if e.synchronizes]
    ms, count = seen.idle("synchronized"), len(waits) / seen.steps
    for sync in seen.syncs:
        yield Finding(
            f"the host waits for the GPU {sync.times} time{'s' * (sync.times > 1)} a step in {sync.line}: {sync.what}",
            ms / len(seen.syncs),
            "until it goes on the queue runs empty, and the GPU idles while it is filled again",
            _way_around(sync.what),
        )
    if not seen.syncs and (count >= 1 or seen.worth(ms)):
        names = ", ".join(sorted({e.name for e in waits}))
        yield Finding(
            f"the host waits for the GPU {count:.0f} times a step ({names})",
            ms,
            "something asks for a value that the GPU has not computed yet; the line is not known",
            "profile with find_syncs=True, and keep losses and norms on the GPU until they are printed",
        )


def _way_around(what: str) -> str:
    if "synchronize" in what.lower() and "item" not in what:
        return "leave the explicit synchronization out, or do it once in many steps"
    return (
        "keep the value on the GPU: add up losses there, read them once in many steps; torch.where in place of an if; "
        "copy with pin_memory and non_blocking=True; an optimizer with fused=True takes found_inf without waiting"
    )


def _host_bound(seen: _Seen) -> Iterator[Finding]:
    slow = [gap for gap in seen.gaps if gap.cause == "host"]
    ms = seen.idle("host")
    if not seen.worth(ms):
        return
    during = Counter(gap.during for gap in slow if gap.during).most_common(3)
    told = ", ".join(f"{name} ({count / seen.steps:.0f})" for name, count in during) or "nothing that was recorded"
    out = "capture the step in a CUDA graph, take more tokens a step"
    out += "" if seen.compiled else ", or compile the model"
    yield Finding(
        f"the GPU waits for launches {ms:.2f} ms a step, in {len(slow) / seen.steps:.0f} gaps",
        ms,
        f"the host launches more slowly than the GPU works; it was in {told}",
        out,
    )


def _small_kernels(seen: _Seen) -> Iterator[Finding]:
    tiny = [e for e in seen.on_gpu if e.where == "kernel" and e.duration < TINY]
    count, ms = len(tiny) / seen.steps, sum(e.duration for e in tiny) / 1e3 / seen.steps
    kernels = sum(e.where == "kernel" for e in seen.on_gpu) / seen.steps
    if count < 50 or count < kernels / 3:
        return
    common = ", ".join(
        f"{name[:48]} ({n / seen.steps:.0f})" for name, n in Counter(e.name for e in tiny).most_common(3)
    )
    out = "a CUDA graph takes their launches away" if seen.compiled else "torch.compile joins elementwise kernels"
    yield Finding(
        f"{count:.0f} of {kernels:.0f} kernels a step take less than {TINY:.0f} µs: {common}",
        ms,
        "fragmented work: each costs the host a launch that is longer than the kernel",
        f"{out}; fp8.TransformerLayer has fused norms and activations",
    )


def _casts(seen: _Seen) -> Iterator[Finding]:
    ms, products = seen.ms(CAST), seen.calls(FP8_GEMM)
    looking = [e for e in seen.on_gpu if e.name.startswith(AMAX)]
    calls = seen.calls(CAST) - len(looking) / seen.steps
    if not calls or not seen.worth(ms):
        return
    looks = sum(e.duration for e in looking) / 1e3 / seen.steps
    beside = f", {calls / products:.1f} for each FP8 product" if products else ", and no FP8 product ran"
    cause = "x and grad of each layer are read again and written in two orientations"
    cause += f"; {looks:.2f} ms of it only look for the amax" if looks else ""
    out = "fp8.TransformerLayer quantizes inside its norm, activation and RoPE"
    out += "; the recipe 'delayed' needs no look at the amax" if looks else ""
    yield Finding(f"quantizing takes {ms:.2f} ms a step in {calls:.0f} casts{beside}", ms, cause, out)


def _repeated_weights(seen: _Seen) -> Iterator[Finding]:
    facts = seen.facts
    bare = [name for name in facts.fp8 if name not in facts.refreshed]
    if not bare:
        return
    times = _forwards(seen, bare)
    if times > 1:
        share = seen.ms(CAST) / 3 * (1 - 1 / times)
        yield Finding(
            f"{len(bare)} weights are quantized {times} times a step, the same bits each time",
            share,
            "there is no refresh, so each forward (micro-batch, or recomputation) quantizes its weight",
            "fp8.attach(model, optimizer) quantizes all of them once a step",
        )


def _forwards(seen: _Seen, names: list[str]) -> int:
    """Forwards a step: as counted, else from the products that ran, three a layer and micro-batch."""
    counted = seen.facts.forwards
    if counted is not None:
        return max(counted.get(name, 0) for name in names)
    return round(seen.calls(FP8_GEMM) / (3 * len(seen.facts.fp8)))


def _stale_layers(seen: _Seen) -> Iterator[Finding]:
    ran = seen.facts.forwards
    if ran is None:
        return
    idle = [name for name in seen.facts.fp8 if not any(n == name or n.startswith(f"{name}.") for n in ran)]
    if idle:
        yield Finding(
            f"{len(idle)} converted layers did not multiply in FP8: {_first(idle)}",
            0.0,
            "fp8.autocast(enabled=False) around them, a fused path that passes them by, or they did not run",
            "fp8.convert(...).trace(model, inputs) says which layers run in FP8",
        )


def _high_layers(seen: _Seen) -> Iterator[Finding]:
    gain = {name: ratio for name, ratio in (seen.facts.high or {}).items() if ratio > 1.05}
    if gain:
        best = max(gain.values())
        yield Finding(
            f"{len(gain)} linear layers in BF16 would gain up to {best:.2f} times: {_first(list(gain))}",
            0.0,
            "they were not converted: a name in skip, an override, or a type that convert does not know",
            "print the report that fp8.convert returns: it gives the reason of each; fp8.register adds types",
        )


def _products_in_bf16(seen: _Seen) -> Iterator[Finding]:
    low, high = seen.ms(FP8_GEMM), seen.ms(BF16_GEMM)
    if low and high > 0.5 * low and not seen.facts.high:
        yield Finding(
            f"BF16 products take {high:.2f} ms a step beside {low:.2f} ms of FP8 ones",
            0.0,
            "the output head, or layers that were not converted",
            "fp8.convert's report gives each one's reason",
        )


def _default_attention(seen: _Seen) -> Iterator[Finding]:
    ms = sum(e.duration for e in seen.on_gpu if any(word in e.name for word in FLASH)) / 1e3 / seen.steps
    if seen.worth(ms):
        yield Finding(
            f"attention runs FlashAttention-2: {ms:.2f} of {seen.ms(ATTENTION):.2f} ms",
            ms / 2,
            "torch's default order; on Hopper cuDNN's kernel takes about half as long",
            "with torch.nn.attention.sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], "
            "set_priority=True) around the model; fp8's own layers do so",
        )


def _copies(seen: _Seen) -> Iterator[Finding]:
    pageable = [e for e in seen.on_gpu if "pageable" in e.name.lower()]
    if pageable:
        ms = sum(e.duration for e in pageable) / 1e3 / seen.steps
        yield Finding(
            f"{len(pageable) / seen.steps:.0f} copies a step go through pageable memory",
            ms,
            "a copy from (or to) memory that is not pinned cannot run beside other work, and the host waits",
            "DataLoader(pin_memory=True) and .to('cuda', non_blocking=True)",
        )
    ms = seen.ms(COPY) - sum(e.duration for e in pageable) / 1e3 / seen.steps
    if seen.worth(ms) and ms > 0.05 * seen.step_ms:
        yield Finding(
            f"copies on the GPU take {ms:.2f} ms a step in {seen.calls(COPY):.0f} calls",
            ms,
            "changes of layout or type: contiguous() after a transpose, casts between FP32 and BF16, joins",
            "torch.compile joins them with their neighbours; keep activations in one type",
        )


def _optimizer(seen: _Seen) -> Iterator[Finding]:
    ms, calls = seen.ms(OPTIMIZER), seen.calls(OPTIMIZER)
    fused = any("fusedadam" in e.name.lower().replace("_", "") for e in seen.on_gpu)
    if calls > 60 and not fused and seen.worth(ms):
        yield Finding(
            f"the optimizer takes {ms:.2f} ms a step in {calls:.0f} kernels",
            ms / 2,
            "each of its operations passes over all parameters by itself",
            "torch.optim.AdamW(..., fused=True) does all of them in one pass, and takes found_inf",
        )


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


RULES = (
    _synchronizations,
    _host_bound,
    _small_kernels,
    _casts,
    _repeated_weights,
    _stale_layers,
    _high_layers,
    _products_in_bf16,
    _default_attention,
    _copies,
    _optimizer,
)
