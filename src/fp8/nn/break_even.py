"""When is an FP8 layer faster than BF16? The question of `convert(only_if_faster=True)`, asked of one module.

The answer is `fp8.cost`'s: a model of the layer's training step from measured rates. It is a pure function of shape,
recipe and kind of device and never times anything, so that a model converts the same way twice. A converted layer
stands alone, so nothing is fused, and without `fp8.attach` every forward quantizes the weight: that is what is counted.

Convolutions are asked apart. Ours multiplies im2col rows: with a kernel of 3 x 3 that writes, casts and reads each
input nine times, and cuDNN's BF16 kernel reads it once. No shape has been measured where that pays, so they stay; a
1 x 1 kernel is a product like any other, but for two transposing copies (r2 w2 of input and output, and of both
gradients). A channels-last input needs none; a layer does not know what it will be given, so they are counted.
"""

from __future__ import annotations

from torch import nn

from ..backends import why_not_hopper
from ..cost import linear_gain, rates
from ..recipe import Recipe

TRANSPOSING = 8.0  # bytes an element of a 1 x 1 convolution's input and output


def gain(module: nn.Module, recipe: Recipe, tokens: int) -> tuple[float, str]:
    """Predicted BF16 time over FP8 time of one layer's forward and backward on `tokens` rows, and what to say of it."""
    weight = next((p for p in module.parameters() if p.dim() >= 2), None)
    if weight is None:
        return 0.0, "it has no weight matrix"
    reason = why_not_hopper(weight.device)
    if reason is not None:
        return 0.0, f"not faster: {reason}"
    if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
        size = " x ".join(map(str, module.kernel_size))
        return 0.0, f"not faster: no {size} convolution has been measured faster than cuDNN's BF16"
    copied = isinstance(module, nn.Conv2d)
    ratio = predict(tokens, weight.shape[0], weight[0].numel(), recipe, weight.element_size(), copied)
    word = "faster" if ratio > 1 else "not faster"
    return ratio, f"{word}: {ratio:.2f} times BF16 predicted at {tokens} rows"


def predict(m: int, n: int, k: int, recipe: Recipe, weight_bytes: int = 2, copied: bool = False) -> float:
    """The predicted speed-up of a layer [m, k] x [n, k]; `copied` for a 1 x 1 convolution."""
    found = linear_gain(m, n, k, recipe, weight_bytes=weight_bytes)
    copies = TRANSPOSING * m * (n + k) / rates().elementwise if copied else 0.0
    return found.bf16.seconds / (found.fp8.seconds + copies)
