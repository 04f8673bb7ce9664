"""Bytes of a training step at its peak.

    state       parameters and AdamW's two moments; weight codes in both orientations where they are kept
    saved       what forward leaves for backward, by tensor (the tables below), T tokens a block
    gradients   made in backward while what was saved is freed, so only the larger of the two counts
    workspace   what one block's backward holds beside; fitted to measured peaks, see `WORKSPACE`
    loss        logits and their gradient, while everything saved is alive

    peak = state + weights' copies + max(saved + loss, saved + workspace, gradients + workspace)

Checked against `fp8 bench train`: four Llama-3-8B layers in BF16, eager and compiled, and in FP8; the difference of
two builds there is, byte for byte, the tensor that one of them saves more (SiLU of the gate).
"""

from __future__ import annotations

from dataclasses import dataclass

from .shape import Architecture
from .step import Setting, elements

# Bytes an element that one block saves for backward, by tensor of the block (`traffic.py` names them).
SAVED: dict[str, dict[str, float]] = {
    # two residuals, two normed inputs; q, k, v; attention's output; gate and up; what down multiplies
    "bf16": {"x": 8.0, "qkv": 2.0, "ctx": 2.0, "up": 2.0, "h": 2.0},
    # two residuals, two normed inputs as codes; attention's output in BF16 for attention, as codes for the product
    "fp8": {"x": 6.0, "qkv": 2.0, "ctx": 3.0, "up": 2.0, "h": 1.0},
    # codes of normed inputs and of h are made again in backward
    "fp8 fused": {"x": 4.0, "qkv": 2.0, "ctx": 3.0, "up": 2.0, "h": 0.0},
}
EAGER_MORE = {"h": 2.0}  # SiLU of the gate, which compiled code computes again
# Bytes of a block's backward beside what was saved, an element of `up`: fitted to the peaks of `fp8 bench train`.
WORKSPACE = {"bf16": 2.4, "fp8": 3.5}
LOGITS = {"compiled": 2.0, "eager": 10.0}
WIDE = {"x": 4.0}  # two residuals in FP32, where parameters are FP32 under autocast
ENDS = 6.0  # the stack's input, output and the gradient of one of them, an element of x
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for; `peak` is what `torch.cuda.max_memory_allocated` would say."""

    parameters: float
    moments: float
    codes: float
    gradients: float
    saved: float
    workspace: float
    loss: float

    @property
    def peak(self) -> float:
        most = max(self.saved + self.loss, self.saved + self.workspace, self.gradients + self.workspace)
        return self.parameters + self.moments + self.codes + most

    @property
    def gib(self) -> float:
        return self.peak / GIB


def memory(model: Architecture, setting: Setting) -> Memory:
    """The predicted peak of a step. With `shards` above 1, parameters, gradients and moments are divided, and two
    blocks' weights are gathered in BF16."""
    each, n = float(setting.weights), model.parameters
    size = "fp8" if setting.recipe is not None else "bf16"
    parameters = each * n / setting.shards
    if setting.shards > 1:
        parameters += 2 * 2.0 * model.block_parameters / model.layers
    return Memory(
        parameters=parameters,
        moments=2 * each * n / setting.shards if setting.optimizer else 0.0,
        codes=_codes(model, setting),
        gradients=each * n / setting.shards,
        saved=model.layers * saved_bytes(model, setting) + ENDS * elements("x", model, setting.tokens),
        workspace=WORKSPACE[size] * elements("up", model, setting.tokens),
        loss=LOGITS["compiled" if setting.compiled else "eager"] * setting.tokens * model.vocab if model.head else 0.0,
    )


def saved_bytes(model: Architecture, setting: Setting) -> float:
    """What one block keeps between forward and backward. A block with layers in both precisions is counted by the
    layer that multiplies most."""
    products = model.products()
    most = max(products, key=lambda p: p.parameters)
    low = setting.recipe_of(most) is not None
    table = dict(SAVED["bf16" if not low else "fp8 fused" if setting.fused else "fp8"])
    if not setting.compiled and model.gated and not setting.fused:
        table["h"] = table["h"] + EAGER_MORE["h"]
    if setting.weights == 4:
        table["x"] = table["x"] + WIDE["x"]
    return sum(each * elements(name, model, setting.tokens) for name, each in table.items())


def _codes(model: Architecture, setting: Setting) -> float:
    """Weight codes: both orientations where they are refreshed once a step, else one between forward and backward; and
    autocast's BF16 copies of FP32 weights that are not FP8."""
    low = sum(p.parameters for p in model.products() if setting.recipe_of(p) is not None)
    high = sum(p.parameters for p in model.products()) - low
    if model.head:
        head = model.head_product.parameters
        low, high = (low + head, high) if setting.recipe is not None and setting.head_fp8 else (low, high + head)
    copies = 2.0 * high if setting.weights == 4 and setting.shards == 1 else 0.0
    held = 2.0 * low if setting.optimizer else low - _made_again(model, setting)
    return held / setting.shards + copies


def _made_again(model: Architecture, setting: Setting) -> float:
    """Weight codes that the backward of a fused block makes anew (`nn/fused.py`): those of `up`, with one scale."""
    recipe = setting.recipe
    if recipe is None or not setting.fused or str(recipe.w.tile) != "tensor":
        return 0.0
    return sum(p.parameters for p in model.products() if p.name == "up" and setting.recipe_of(p) is not None)
