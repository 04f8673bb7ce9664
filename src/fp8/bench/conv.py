"""Convolutions in FP8 beside cuDNN's in BF16: forward and backward of one layer, channels last.

    python -m fp8.bench.conv --out DIR [--recipe tensorwise]

A 1 x 1 kernel is a product of pixels; a 3 x 3 one multiplies im2col rows, which are nine times its input (see
`nn/break_even.py`). Medians by CUDA events of calls that the host has queued ahead; each quantizes the weight anew.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import nn

import fp8

from ..nn.break_even import predict
from ..recipe import Recipe
from .machine import save

SHAPES = (  # batch, channels in and out, height and width, kernel
    (64, 256, 1024, 56, 1),
    (64, 1024, 512, 28, 1),
    (64, 2048, 2048, 28, 1),
    (32, 1280, 1280, 64, 1),
    (16, 4096, 4096, 32, 1),
    (16, 1280, 1280, 32, 3),
)
WARM, TIMED, AHEAD = 3, 11, 4_000_000  # cycles that the GPU waits, so that launching is not what is timed


def milliseconds(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> float:
    """The median of a forward and backward."""
    times = []
    for i in range(WARM + TIMED):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        start.record()
        layer(x).backward(grad)
        stop.record()
        stop.synchronize()
        times += [start.elapsed_time(stop)] if i >= WARM else []
        x.grad = layer.weight.grad = None  # type: ignore[assignment]
    return statistics.median(times)


def row(shape: tuple[int, int, int, int, int], recipe: str) -> dict[str, Any]:
    """One shape: milliseconds of both, and the speed-up that `fp8.cost` predicts for a product without copies."""
    batch, inputs, outputs, size, kernel = shape
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, dtype=torch.bfloat16, device="cuda")
    layer = layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, grad = (
        torch.randn(batch, channels, size, size, device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        for channels in (inputs, outputs)
    )
    x.requires_grad_()
    high = milliseconds(layer, x, grad)
    fp8.convert(layer, recipe)
    low = milliseconds(layer, x, grad)
    found: dict[str, Any] = {"shape": shape, "bf16_ms": high, "fp8_ms": low}
    if kernel == 1:
        found["predicted"] = predict(batch * size * size, outputs, inputs, Recipe.of(recipe))
    return found


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for conv.json")
    parser.add_argument("--recipe", default="tensorwise")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    print(f"{'batch, in, out, size, kernel':34}{'BF16 ms':>9}{'FP8 ms':>9}{'x BF16':>8}{'predicted':>11}")
    rows = []
    for shape in SHAPES:
        found = row(shape, options.recipe)
        rows.append(found)
        predicted = f"{found['predicted']:11.2f}" if "predicted" in found else f"{'stays':>11}"
        ratio = found["bf16_ms"] / found["fp8_ms"]
        print(f"{shape!s:34}{found['bf16_ms']:9.3f}{found['fp8_ms']:9.3f}{ratio:8.2f}{predicted}", flush=True)
    save(options.out, "conv", {"recipe": options.recipe, "rows": rows})


if __name__ == "__main__":
    main()
