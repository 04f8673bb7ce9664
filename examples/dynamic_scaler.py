"""The `DynamicScaler` of the article "FP8 Training and Inference: Next-Generation Numerical Formats", and what it does.

The class below is the article's, word for word; `cast_to_fp8`, which the article leaves open, is `fp8.quantize` under a
scale of 1. It is run beside two recipes of this library on the same gradients: `delayed_article`, which is this scaler
inside a layer with its maximum corrected, and `delayed`, the default delayed scaling (amax history of 32, its maximum,
every step).

What is wrong with it, all of it computed and printed here:
  - 240 is the largest number of an IEEE-style E4M3. E5M2 ends at 57344; with 240 the scaler leaves 8 of its binades
  unused. - It averages scales. From 65536 the mean comes down by 1/32 of the way each time a scale is pushed, every 4th
  call: with the
    maximum corrected, gradients of amax 1 are clipped for the first 124 steps, and for 124 more after they grow
    tenfold.
  - The back-off multiplies `self.scale` by 0.99, but what is used is the mean of `self.history`, which it never
  reaches. - A tensor of zeros pushes 240 / 1e-8 = 2.4e10 into the history, which stays in the mean for 128 calls.

Prints a table and, for three rules, how full the format is over time. Takes a few seconds on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fp8
from fp8.scaling import ArticleState, DelayedState

E5M2_MAX = 57344.0


def cast_to_fp8(x: Tensor, format: str) -> Tensor:
    """The codes of x itself; what is beyond the largest code is clipped."""
    return fp8.quantize(x, format, scale=torch.ones(1, 1)).codes


# fmt: off
# Pseudocode: Transformer Engine scale management
class DynamicScaler:
    def __init__(self, history_size=32):
        self.scale = 65536.0  # Start at 2^16
        self.history = [self.scale] * history_size
        self.iteration = 0
        self.overflow_count = 0

    def scale_tensor(self, tensor_fp32, update_freq=4):
        # Compute new scale if it's time
        if self.iteration % update_freq == 0:
            max_val = torch.max(torch.abs(tensor_fp32))
            max_fp8 = 240.0  # Maximum E5M2 value
            self.scale = max_fp8 / (max_val + 1e-8)
            self.history.pop(0)
            self.history.append(self.scale)  # type: ignore[arg-type]  # a tensor among floats, as printed

        # Use historical average for stability
        scale_to_use = np.mean(self.history)

        # Cast and scale
        scaled = tensor_fp32 * scale_to_use
        tensor_fp8 = cast_to_fp8(scaled, format='e5m2')

        self.iteration += 1
        return tensor_fp8, scale_to_use

    def check_overflow(self, tensor_fp8_unscaled):
        if torch.isnan(tensor_fp8_unscaled).any() or torch.isinf(tensor_fp8_unscaled).any():
            self.overflow_count += 1
            # Reduce scale aggressively
            self.scale *= 0.99
            return True
        return False
# fmt: on


def gradients(amaxes: list[float]) -> list[Tensor]:
    """Random gradients [4, 4] whose largest magnitude is the one asked for, to the bit."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for amax in amaxes:
        g = torch.rand(4, 4, generator=generator) - 0.5
        made.append((g / g.abs().max() * amax).clamp(-amax, amax))
    return made


def article_scales(steps: list[Tensor]) -> list[float]:
    """The multiplying scale that the printed class uses at each step."""
    scaler, used = DynamicScaler(), []
    for gradient in steps:
        _, scale = scaler.scale_tensor(gradient)
        used.append(float(scale))
    return used


def recipe_scales(recipe: str, steps: list[Tensor]) -> list[float]:
    """The multiplying scale with which a layer quantizes each step's gradient under a recipe."""
    layer = fp8.Linear(4, 4, bias=False, recipe=recipe)
    used = []
    for gradient in steps:
        state = layer.fp8.delayed
        known = isinstance(state, DelayedState) and state.warm[2]
        before = float(state.scale[2]) if known else None  # type: ignore[union-attr,index]
        layer(torch.ones(4, 4)).backward(gradient)
        if isinstance(state, ArticleState):
            before = 1 / float(state.history[2].mean())
        if before is None:  # the first use is scaled by its own amax
            before = float(fp8.quantize(gradient, "e5m2").scale)
        used.append(1 / before)
        fp8.update_scales(layer)
    return used


def clipped(scales: list[float], amaxes: list[float]) -> tuple[int, int]:
    """In how many steps of the first and of the second half something was beyond the largest code."""
    over = [scale * amax > E5M2_MAX * (1 + 1e-6) for scale, amax in zip(scales, amaxes, strict=True)]
    half = len(over) // 2
    return sum(over[:half]), sum(over[half:])


def plot(name: str, scales: list[float], amaxes: list[float]) -> None:
    """How full the format is, every 20 steps: amax * scale / 57344 in half binades, down to 2^-12."""
    print(f"\n{name}: each = is half a binade, | is the largest code, # is what was clipped")
    for step in range(0, len(scales), 20):
        full = 2 * np.log2(scales[step] * amaxes[step] / E5M2_MAX) + 24
        level = int(np.ceil(full - 1e-4) if full > 24 else np.floor(full))
        bar = "=" * min(level, 24) + " " * (24 - level) + "|" + "#" * (level - 24)
        print(f"  step {step:3d}  amax {amaxes[step]:4.0f}  {bar}")


def main() -> None:
    amaxes = [1.0] * 200 + [10.0] * 200
    steps = gradients(amaxes)
    rules = {"as printed (240)": article_scales(steps)}
    rules |= {name: recipe_scales(name, steps) for name in ("delayed_article", "delayed")}
    print("400 steps, gradients of amax 1, from step 200 on of amax 10; E5M2's largest number is 57344\n")
    print(f"{'rule':18} {'clipped, 0-199':>15} {'clipped, 200-399':>17} {'used at the end':>16}")
    for name, scales in rules.items():
        first, second = clipped(scales, amaxes)
        print(f"{name:18} {first:>15} {second:>17} {scales[-1] * amaxes[-1] / E5M2_MAX:>16.1%}")
    for name, scales in rules.items():
        plot(name, scales, amaxes)

    scaler = DynamicScaler()
    scaler.check_overflow(torch.tensor([float("inf")]))
    mean = np.mean(scaler.history)
    print(f"\nafter an overflow: scale {scaler.scale:.2f}, but what is used, the mean, is still {mean:.2f}")
    _, scale = scaler.scale_tensor(torch.zeros(4, 4))
    print(f"after a tensor of zeros: scale {float(scaler.scale):.3g}, used {float(scale):.3g}")


if __name__ == "__main__":
    main()
