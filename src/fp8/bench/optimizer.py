"""The once-a-step work on the weights of 4 Llama-3-8B layers: torch's fused AdamW and a refresh after it, beside
`fp8.AdamW`, which writes the codes as it updates.

    python -m fp8.bench.optimizer --out DIR [--layers 4 --variants]

Weights are FP32 (gradients too), or BF16 (BF16 gradients; `fp8.AdamW` keeps a master, torch's does not, so its bytes
are fewer and its updates coarser). Random gradients. Median milliseconds of a step by CUDA events, what the host needs
to start one, the bytes that must move, and their share of the 4.27 TB/s that a copy reaches. After each arm the codes
held are compared with codes made anew: `stale` must be 0.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import fp8

from ..fused.adamw.moments import bytes_an_element
from ..nn import Fp8Products
from .machine import machine, save

PEAK = 4.27e12  # bytes a second that a copy reaches on an H200
MATRICES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
RECIPES = ("tensorwise", "delayed", "blockwise", "rowwise")
MOMENTS = ("fp32", "bf16", "fp8")
WARM, TIMED = 5, 15


@dataclass(frozen=True)
class Row:
    """One arm: medians, and the bytes that it cannot avoid."""

    dtype: str
    arm: str
    recipe: str
    milliseconds: float
    host_milliseconds: float
    gigabytes: float
    stale: int | None = None

    @property
    def share(self) -> float:
        return self.gigabytes * 1e9 / (self.milliseconds * 1e-3) / PEAK

    def line(self) -> str:
        stale = "-" if self.stale is None else str(self.stale)
        return (
            f"{self.dtype:9}{self.arm:26}{self.recipe:12}{self.milliseconds:9.3f}{self.host_milliseconds:9.3f}"
            f"{self.gigabytes:8.2f}{self.share:8.1%}{stale:>7}"
        )


HEAD = f"{'weights':9}{'arm':26}{'recipe':12}{'ms':>9}{'host ms':>9}{'GB':>8}{'share':>8}{'stale':>7}"


def stack(layers: int, dtype: torch.dtype, recipe: str | None, device: str, matrices: Any = MATRICES) -> nn.Module:
    """The matrices and norms of the layers, with gradients."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    with torch.device(device):
        for _ in range(layers):
            parts += [fp8.Linear(cols, rows, bias=False, recipe=recipe, dtype=dtype) for rows, cols in matrices]
            parts += [nn.RMSNorm(matrices[0][1], dtype=dtype) for _ in range(2)]
    model = nn.ModuleList(parts)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def bytes_of(count: int, dtype: torch.dtype, moments: str | None, recipe: str | None, follows: bool) -> float:
    """What a step moves for `count` numbers. `moments=None`: torch's, of the parameter's type. `follows`: codes, or the
    amax, come with the update; else a refresh reads the parameter again."""
    size = dtype.itemsize
    each = 3 * size  # parameter read and written, gradient read
    each += 4 * size if moments is None else 2 * bytes_an_element(moments)
    if moments is not None and size == 2:
        each += 8 - size  # the master is read and written, the parameter only written
    if recipe is not None:
        reads = {"tensorwise": 2, "rowwise": 2}.get(recipe, 1)
        reads -= follows and recipe != "rowwise"
        each += 2 + reads * size
    return count * each


def timed(step: Callable[[], Any], device: str) -> tuple[float, float]:
    """Median milliseconds of a step on the device, and of the host."""
    for _ in range(WARM):
        step()
    device_times, host_times = [], []
    for _ in range(TIMED):
        if device == "cpu":
            start = time.perf_counter()
            step()
            device_times.append((time.perf_counter() - start) * 1e3)
            host_times.append(device_times[-1])
            continue
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # a millisecond's head start: the host is not what the events measure
        begin.record()
        start = time.perf_counter()
        step()
        host_times.append((time.perf_counter() - start) * 1e3)
        end.record()
        end.synchronize()
        device_times.append(begin.elapsed_time(end))
    return statistics.median(device_times), statistics.median(host_times)


def stale(model: nn.Module) -> int:
    """How many bytes of the codes held are not those of the weights as they are."""
    parts = [part for part in model.modules() if isinstance(part, Fp8Products)]
    held = [(part.codes.clone(), part.codes_t.clone(), part.scale.clone()) for part in parts]
    model.eval()
    fp8.refresh(model)
    model.train()
    return sum(
        int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
        for part, old in zip(parts, held, strict=True)
        for a, b in zip(old, (part.codes, part.codes_t, part.scale), strict=True)
    )


Builder = Callable[[nn.Module], torch.optim.Optimizer]


def arms() -> Iterator[tuple[str, str | None, str | None, bool, Builder]]:
    """(name, moments, recipe, whether codes follow, builder of the optimizer)."""

    def torchs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    yield "torch fused, no codes", None, None, False, torchs
    for recipe in RECIPES:
        yield "torch fused + refresh", None, recipe, False, torchs
    for moments in MOMENTS:
        build = lambda model, moments=moments: fp8.AdamW(model, lr=1e-4, moments=moments)  # noqa: E731
        yield f"fp8.AdamW {moments}, no codes", moments, None, False, build
        for recipe in RECIPES:
            yield f"fp8.AdamW {moments}", moments, recipe, True, build


def measure(
    layers: int, dtype: torch.dtype, device: str, matrices: Any = MATRICES, only: list[str] | None = None
) -> list[Row]:
    """Every arm, and the refresh alone."""
    rows = []
    name_of = str(dtype)[6:]
    for arm, moments, recipe, follows, build in arms():
        if only and not any(word in f"{arm} {recipe}" for word in only):
            continue
        model = stack(layers, dtype, recipe, device, matrices)
        optimizer = build(model)
        if recipe is not None:
            fp8.attach(model, optimizer)
        count = sum(parameter.numel() for parameter in model.parameters())
        times = timed(optimizer.step, device)
        wrong = None if recipe is None else stale(model)
        moved = bytes_of(count, dtype, moments, recipe, follows)
        rows.append(Row(name_of, arm, recipe or "-", *times, moved / 1e9, wrong))
        print(rows[-1].line(), flush=True)
        if recipe is not None and moments is None:
            times = timed(lambda model=model: fp8.refresh(model), device)
            reads = 2 if recipe in ("tensorwise", "rowwise") else 1
            rows.append(Row(name_of, "refresh", recipe, *times, count * (2 + reads * dtype.itemsize) / 1e9))
            print(rows[-1].line(), flush=True)
        del model, optimizer
        if device != "cpu":
            torch.cuda.empty_cache()
    return rows


def variants(layers: int, dtype: torch.dtype) -> list[Row]:
    """`update_tiles` in other shapes than those it runs in."""
    from ..fused.adamw import triton
    from ..fused.adamw.triton import Shape

    found = []
    tried = [Shape(8, 16, 128), Shape(8, 16), Shape(8, 32, 128), Shape(16, 16, 64), Shape(16, 32, 64), Shape(16, 32)]
    for recipe, moments in (("delayed", "fp32"), ("blockwise", "fp32"), ("blockwise", "bf16"), ("blockwise", "fp8")):
        model = stack(layers, dtype, recipe, "cuda")
        optimizer = fp8.AdamW(model, lr=1e-4, moments=moments)
        handle = fp8.attach(model, optimizer)
        optimizer.step()
        optimizer.step()
        work = list(optimizer._work(handle._before_update(None)))
        count = sum(parameter.numel() for parameter in model.parameters())
        for shape in tried:
            prepared: list[Any] = [None] * len(work)

            def run(shape: Shape = shape, work: Any = work, prepared: list[Any] = prepared) -> None:
                for place, (slots, settings) in enumerate(work):
                    prepared[place] = triton.adamw(slots, settings, prepared[place], shape)

            try:
                times = timed(run, "cuda")
            except Exception as error:  # noqa: BLE001 - a shape that does not build must not cost the others
                print(f"{recipe} {moments} {shape}: {error!r}"[:200], flush=True)
                continue
            name = f"{moments} w{shape.warps} r{shape.rows} {shape.registers or '-'}"
            found.append(Row(str(dtype)[6:], name, recipe, *times, bytes_of(count, dtype, moments, recipe, True) / 1e9))
            print(found[-1].line(), flush=True)
        handle.remove()
        del model, optimizer, handle, work
        torch.cuda.empty_cache()
    return found


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for optimizer.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--only", nargs="*", default=[], help="only the arms whose name or recipe holds one of these words"
    )
    parser.add_argument("--variants", action="store_true", help="also other shapes of the kernel that writes codes")
    options = parser.parse_args(arguments)
    print(machine())
    print(HEAD)
    results: dict[str, Any] = {"options": vars(options), "rows": [], "variants": []}
    for dtype in (torch.float32, torch.bfloat16):
        results["rows"] += [
            asdict(r) | {"share": r.share} for r in measure(options.layers, dtype, "cuda", only=options.only)
        ]
        save(options.out, "optimizer", results)
    if options.variants:
        results["variants"] = [asdict(r) | {"share": r.share} for r in variants(options.layers, torch.float32)]
    print(f"written to {save(options.out, 'optimizer', results)}")


if __name__ == "__main__":
    main()
