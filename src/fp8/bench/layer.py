"""Forward and backward of a stack of Llama-3-8B-shaped layers: BF16, ours, and torchao where it is installed, in one
run.

    python -m fp8.bench.layer --out DIR [--layers 4 --batch 2 --tokens 8192]

No optimizer, but every timed step quantizes the weights anew, as a step with one would. The BF16 arm is the same
`fp8.TransformerLayer` in high precision, with the same attention and the same joined projections; the ratio is to the
faster of it in eager mode and compiled. torchao converts the BF16 stack's `nn.Linear`s and is compiled. Medians; peak
memory of one step.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fp8

from .machine import save

HIDDEN, FFN, HEADS, KV_HEADS = 4096, 14336, 32, 8
RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
TORCHAO = ("tensorwise", "rowwise")
WARM, TIMED = 4, 9


def stack(layers: int) -> nn.Module:
    """The layers, in BF16, as `nn.Linear`s."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        blocks = [
            fp8.TransformerLayer(
                HIDDEN, FFN, HEADS, num_kv_heads=KV_HEADS, norm="rmsnorm", activation="swiglu", bias=False, causal=True,
                rope_theta=500000.0,
            )
            for _ in range(layers)
        ]  # fmt: skip
    return fp8.revert(nn.Sequential(*blocks).to(torch.bfloat16))


def arms(layers: int) -> dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]]]:
    """What is measured: name -> builder of (module, callable)."""

    def ours(recipe: str | None, compiled: bool, fused: bool = True) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        model = stack(layers)
        if not fused:
            for layer in model.children():
                assert isinstance(layer, fp8.TransformerLayer)
                layer.why_not_fused = lambda x: "this arm measures it module by module"  # type: ignore[method-assign]
        if recipe is not None:
            fp8.convert(model, recipe)
        return model, torch.compile(model) if compiled else model

    def torchao(recipe: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

        model = stack(layers)
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
        return model, torch.compile(model)

    found: dict[str, Any] = {"bf16 torch compiled": lambda: ours(None, True, fused=False)}
    for compiled in (True, False):
        mode = "compiled" if compiled else "eager"
        found[f"bf16 fused {mode}"] = lambda c=compiled: ours(None, c)
        for recipe in RECIPES:
            found[f"fp8 {recipe} {mode}"] = lambda r=recipe, c=compiled: ours(r, c)
    for recipe in RECIPES:
        found[f"fp8 {recipe} modules compiled"] = lambda r=recipe: ours(r, True, fused=False)
    for recipe in TORCHAO:
        found[f"torchao {recipe} compiled"] = lambda r=recipe: torchao(r)
    return found


def time_step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> dict[str, float]:
    """Median milliseconds, their spread, and peak GiB of one forward and backward."""

    def step() -> None:
        call(x).backward(grad)
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        fp8.update_scales(model)

    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(TIMED):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": statistics.median(times), "spread_ms": max(times) - min(times), "peak_gib": peak}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm, one after the other, saved as it comes; one that fails is reported with its error."""
    layers, batch, tokens, only = options.layers, options.batch, options.tokens, options.only
    x = torch.randn(batch, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    results: dict[str, Any] = {}
    for name, build in arms(layers).items():
        if only and not any(word in name for word in only):
            continue
        if name.startswith("torchao") and importlib.util.find_spec("torchao") is None:
            results[name] = "torchao is not installed"
            continue
        torch._dynamo.reset()
        try:
            model, call = build()
            results[name] = time_step(model, call, x, grad)
            del model, call
        except Exception as error:  # noqa: BLE001 - a benchmark goes on, and says what failed
            results[name] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
        save(options.out, "layer", {"options": vars(options), "arms": results})
        print(name, results[name], flush=True)
    return results


def show(results: dict[str, Any], tokens: int) -> None:
    high = [r["ms"] for name, r in results.items() if name.startswith("bf16") and isinstance(r, dict)]
    print(f"\n{'':30}{'ms':>9}{'spread':>8}{'x BF16':>8}{'tokens/s':>11}{'peak GiB':>10}")
    for name, r in results.items():
        if isinstance(r, str):
            print(f"{name:30}  {r}")
            continue
        ratio = f"{min(high) / r['ms']:8.2f}" if high else " " * 8
        rate = tokens / r["ms"] * 1e3
        print(f"{name:30}{r['ms']:9.2f}{r['spread_ms']:8.2f}{ratio}{rate:11.0f}{r['peak_gib']:10.2f}")


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for layer.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="*", default=[], help="only the arms whose name holds one of these words")
    options = parser.parse_args(arguments)
    results = measure(options)
    show(results, options.batch * options.tokens)


if __name__ == "__main__":
    main()
