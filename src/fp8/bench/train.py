"""Training steps beside BF16 and beside every peer that is installed, in one run.

    fp8 bench train                                               everything: about 10 minutes on an H200
    python -m fp8.bench.train --out DIR --workloads stack 1b --only delayed BF16 --tokens 2048 --profile

Ratios are to the faster of the two BF16 arms, compiled torch and our own fused BF16 kernels, which have the same
attention and joined projections. Medians of steps one after the other, as in training, with no wait between them; their
spread; peak memory of a step; model FLOP utilization against the 989 TFLOP/s of BF16; joules a token from the GPU's own
counter, where NVML is installed.
`--profile` adds the kernels of one step, by name.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from .machine import save
from .workloads import ARMS, Workload, build, names, why_not, workload

WARM, TIMED, PEAK = 4, 9, 989e12


def time_step(step: Any, tokens: int, flops: float) -> dict[str, float]:
    """Median milliseconds and spread of a step, peak GiB, tokens a second, utilization, joules a token."""
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = joules()
    times = step_milliseconds(step, TIMED)
    ms = statistics.median(times)
    found = {
        "ms": ms, "spread_ms": max(times) - min(times), "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tokens_per_second": tokens / ms * 1e3, "utilization": flops / ms * 1e3 / PEAK,
    }  # fmt: skip
    after = joules()
    if before is not None and after is not None:
        found["joules_per_token"] = (after - before) / (TIMED + 1) / tokens
    return found


def step_milliseconds(step: Any, timed: int) -> list[float]:
    """Milliseconds of `timed` steps one after the other, behind one more in which the host gets ahead of the GPU, as in
    training; it stays there if it can."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    step()
    for end in ends[:-1]:
        end.record()
        step()
    ends[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairwise(ends)]


def joules() -> float | None:
    """The energy that the GPU has used since the driver was loaded; None where nothing tells."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # noqa: BLE001 - NVML raises types of its own, and an arm is worth more than its joules
        return None


def kernels(step: Any) -> list[tuple[str, float, int]]:
    """The kernels of one step: name, microseconds in all, how often; most expensive first."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    time: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time[event.name] += event.device_time_total
            count[event.name] += 1
    return [(name, round(us, 1), count[name]) for name, us in time.most_common()]


def measure(work: Workload, only: list[str], profile: bool) -> dict[str, Any]:
    """Every arm of a workload, one after the other; one that fails is reported with its error."""
    results: dict[str, Any] = {}
    for arm, name in zip(work.arms, names(work.arms), strict=True):
        if only and not any(word in name for word in only):
            continue
        if (reason := why_not(arm)) is not None:
            results[name] = reason
            continue
        torch._dynamo.reset()
        try:
            step, model = build(work, arm)
            results[name] = time_step(step, work.batch * work.tokens, work.flops)
            if profile:
                results[name]["kernels"] = kernels(step)
            del step, model
        except Exception as error:  # noqa: BLE001 - a benchmark goes on, and says what failed
            results[name] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
        print(line(name, results), flush=True)
    return results


def baseline(results: dict[str, Any]) -> float | None:
    """Milliseconds of the faster BF16 arm."""
    high = [r["ms"] for name, r in results.items() if "BF16" in name and isinstance(r, dict)]
    return min(high) if high else None


def line(name: str, results: dict[str, Any]) -> str:
    r, high = results[name], baseline(results)
    if isinstance(r, str):
        return f"{name:36}  {r}"
    ratio = f"{high / r['ms']:8.2f}" if high else " " * 8
    energy = f"{1e3 * r['joules_per_token']:9.2f}" if "joules_per_token" in r else ""
    speed = f"{r['tokens_per_second']:11.0f}{100 * r['utilization']:7.1f}"
    return f"{name:36}{r['ms']:9.2f}{r['spread_ms']:8.2f}{ratio}{speed}{r['peak_gib']:9.2f}{energy}"


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for train.json")
    parser.add_argument("--workloads", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--only", nargs="*", default=[], help="only the arms whose name holds one of these words")
    parser.add_argument("--batch", type=int, help="sequences; by default the workload's")
    parser.add_argument("--tokens", type=int, nargs="*", default=[None], help="tokens a sequence, one run for each")
    parser.add_argument("--layers", type=int, default=4, help="layers of stack and plain")
    parser.add_argument("--profile", action="store_true", help="also the kernels of one step of each arm")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    head = f"{'':36}{'ms':>9}{'spread':>8}{'x BF16':>8}{'tokens/s':>11}{'MFU %':>7}{'peak GiB':>9}{'mJ/token':>9}"
    for name in options.workloads:
        for tokens in options.tokens:
            work = workload(name, options.batch, tokens, options.layers)
            print(f"\n{name}, {work.batch} x {work.tokens} tokens\n{head}", flush=True)
            key = f"{name} {work.batch}x{work.tokens}"
            found[key] = {"flops": work.flops, "arms": measure(work, options.only, options.profile)}
            save(options.out, "train", {"options": vars(options), "workloads": found})


if __name__ == "__main__":
    main()
