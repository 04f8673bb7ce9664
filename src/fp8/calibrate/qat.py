"""Quantization-aware training: `prepare_qat` before an ordinary loop, `finalize` behind it.

    fp8.prepare_qat(model, "dynamic", kv="head")      every forward now rounds as the checkpoint will
    ...                                               any loop, any optimizer, transformers.Trainer
    model.save_pretrained(folder)                     the same names and types as before: `fp8 quantize` takes it
    fp8.finalize(model)                               the codes themselves, in the place of the weights
    fp8.revert(model)                                 undoes either

**One meaning of a scheme.** Names are those of `fp8 quantize`, and what they mean is read from its table
(`checkpoint.quantize.SCHEMES`); which layers of a transformers model become FP8 is asked of the same function
(`choose_layers`). So the codes in every forward, those that `finalize` leaves and those that `fp8 quantize` writes of
the saved model are the same bytes. They are if the model is saved in the type that it was trained in: an FP32 master
that is saved in BF16 was rounded in between. (FSDP's mixed precision does that to the weight before a layer sees it:
train FP32 masters under autocast instead.)

**What is rounded.** Weights of linear layers, and their inputs (not with `weight-only`). Keys and values with `kv`. In
a model that is not of transformers also convolutions and the projections of `nn.MultiheadAttention`, as `fp8.convert`
chooses. The embedding, norms, softmax and, unless `head`, the head stay. `nn/fake_quantize.py` tells how, and what
happens to gradients.

A layer changes its class, not its parameters: names in the state dict, hooks, tied weights and an optimizer made before
stay as they are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..checkpoint.compressed_tensors import Scheme
from ..checkpoint.frozen import by_rows
from ..checkpoint.layers import InMemory, attention_layers, choose_layers, fused_group
from ..checkpoint.quantize import Options, Scales
from ..errors import ConfigError, ConvertError, suggest
from ..nn.convert import Decision, Report, convert, convert_module, put_in_place, revert
from ..nn.fake_quantize import FakeProducts, MeasuredScale
from ..nn.frozen_linear import FrozenLinear
from ..nn.kv_rounding import KVRounding, round_kv
from ..nn.linear import Linear
from ..nn.products import Fp8Products
from ..nn.transformer import SelfAttention
from ..recipe import Recipe

KV = (None, "head", "token")
Model = TypeVar("Model", bound=nn.Module)


def prepare_qat(
    model: nn.Module,
    scheme: str = "dynamic",
    skip: Iterable[str] = (),
    kv: str | None = None,
    *,
    head: bool = False,
    scale_rounding: str = "power_of_two",
    scales: Scales | None = None,
) -> Report:
    """Make a model's forward round as its FP8 checkpoint will, in place; gradients pass straight through.

    scheme          of `fp8 quantize`: "dynamic", "static", "block" or "weight-only"
    skip            layers that stay: names with `*`; for a transformers model also `re:` and a regular expression
    kv              "head": keys and values with one scale a head, as a checkpoint for vLLM has; "token": with one a
                    token and head, as the cache of this library has; None: they stay
    head            also the output head
    scale_rounding  "power_of_two", "none" (amax / 448), or "search": the weights' best, looked for anew at every
                    rounding (23 candidates: next to nothing on a GPU, most of a step's time on a CPU)
    scales          calibrated scales of static inputs and of KV heads; else the largest magnitude in training counts

    Returns which layers are rounded and why the others are not. Raises `ConfigError` for a setting that is unknown,
    `ConvertError` or `CheckpointError` for a model that cannot be prepared; it is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"prepare_qat changes a torch.nn.Module in place; got {type(model).__name__}.")
    if kv not in KV:
        raise ConfigError(f"kv cannot be {kv!r}. {suggest(kv, ('head', 'token'))}")
    if any(isinstance(part, FakeProducts) for part in model.modules()):
        raise ConvertError("this model is prepared already: fp8.revert(model) first.")
    options = Options(scheme, (skip,) if isinstance(skip, str) else tuple(skip), head, scale_rounding)
    cached = attention_modules(model) if kv else {}
    if kv and not cached:
        raise ConvertError("no attention of this model is known to fill a KV cache: leave out kv.")
    report = _convert_chosen(model, options) if from_transformers(model) else _convert_any(model, options)
    try:
        _round_products(model, options.layout, scales)
        for name, module in cached.items():
            round_kv(module, _rounding(model, name, module, kv, options, scales))
    except ConvertError:
        revert(model)
        raise
    return report


def from_transformers(model: nn.Module) -> bool:
    """Whether its architecture is transformers'."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def _convert_chosen(model: nn.Module, options: Options) -> Report:
    """The layers that `fp8 quantize` would take."""
    refuse_joined_experts(model, options.skip)
    layers = choose_layers(InMemory.of(model), model, options.skip, options.head)
    recipe, decisions = recipe_of(options), []
    for name in layers.fp8:
        module = model.get_submodule(layers.modules.get(name, name))
        decisions.append(Decision(name, "Linear", True, f"scheme {options.scheme}", module.weight.numel()))  # type: ignore[operator, union-attr]
        convert_module(model, name, module, recipe)
    for name, why in layers.kept.items():
        module = model.get_submodule(layers.modules.get(name, name))
        decisions.append(Decision(name, "Linear", False, why, module.weight.numel()))  # type: ignore[operator, union-attr]
    model.fp8_report = Report(recipe, tuple(decisions))  # type: ignore[assignment]
    return model.fp8_report  # type: ignore[return-value]


def refuse_joined_experts(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Experts that transformers holds as one tensor pass no linear layer, and an export would round them all the
    same."""
    joined = [name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    if joined and not any(fnmatch.fnmatchcase(joined[0], pattern) for pattern in skip):
        raise ConvertError(
            f"{joined[0]} holds all experts of a layer in one tensor, which is not rounded in training, but would be "
            "in the export: skip '*.experts.*' in both."
        )


def _convert_any(model: nn.Module, options: Options) -> Report:
    return convert(model, recipe_of(options), options.skip, head=options.head)


def recipe_of(options: Options) -> Recipe:
    """A scheme as a layer's recipe."""
    layout = options.layout
    return layout.recipe(layout.tile).replace(name=f"qat {options.scheme}")


def _round_products(model: nn.Module, scheme: Scheme, scales: Scales | None) -> None:
    """Put rounded products in the place of FP8 ones."""
    recipe: Recipe = model.fp8_report.recipe  # type: ignore[union-attr, assignment]
    made: dict[str, tuple[FakeProducts, nn.Module]] = {}
    for parent in list(model.modules()):
        for key, part in list(parent.named_children()):
            if type(part) is Fp8Products and part.recipe == recipe:
                fake = FakeProducts(
                    recipe,
                    part.name,
                    weight_only=scheme.inputs == "none",
                    searched=scheme.searched,
                    inputs=_input_scale(part.name, scales, recipe) if scheme.inputs == "static" else None,
                )
                fake.train(parent.training).to(next(parent.parameters()).device)
                setattr(parent, key, fake)
                made[part.name] = (fake, parent)
    if scheme.per_tensor:
        for name, (fake, _) in made.items():
            fake.with_it = tuple(made[other][1] for other in fused_group(name) if other in made)


def _input_scale(name: str, scales: Scales | None, recipe: Recipe) -> MeasuredScale:
    if scales is None or not scales.inputs:
        return MeasuredScale(1, recipe.power_of_two)
    if name not in scales.inputs:
        raise ConvertError(f"the calibrated scales have none for the input of {name}: calibrate this model.")
    return MeasuredScale(1, recipe.power_of_two, torch.tensor([scales.inputs[name]]))


# --------------------------------------------------------------------------- keys and values


def attention_modules(model: nn.Module) -> Mapping[str, nn.Module]:
    """The modules that fill a KV cache, by name."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, SelfAttention)}
    return own or {name: model.get_submodule(name) for name in attention_layers(model).values()}


def _rounding(
    model: nn.Module, name: str, module: nn.Module, kv: str | None, options: Options, scales: Scales | None
) -> KVRounding:
    if kv == "token":
        return KVRounding()
    made = []
    for found in (None, None) if scales is None or not scales.keys else (scales.keys, scales.values):
        if found is not None and name not in found:
            raise ConvertError(f"the calibrated scales have none for the KV cache of {name}: calibrate this model.")
        given = None if found is None else torch.tensor(list(found[name]))
        count = kv_heads(model, module) if given is None else len(given)
        made.append(MeasuredScale(count, options.scales == "power_of_two", given))
    rounding = KVRounding(*made).train(module.training)
    return rounding.to(next(module.parameters()).device)


def kv_heads(model: nn.Module, module: nn.Module) -> int:
    """How many heads of keys and values an attention module has."""
    if isinstance(module, SelfAttention):
        return module.kv_heads
    config: Any = getattr(module, "config", None) or model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


# --------------------------------------------------------------------------- behind the training


def finalize(model: Model) -> Model:
    """Put the codes in the place of the weights, in place; returns the model, which is then for inference.

    A linear layer becomes the layer that an FP8 checkpoint loads as, with codes and scales equal, in bytes, to those
    that `fp8 quantize` writes of the saved model; attention and convolutions multiply codes from here on. Scales that
    training measured are now fixed. `fp8.revert` puts the trained weights back: they are kept until then.

    Raises `ConvertError` for a model that is not prepared, or was never run in training mode where a scale needs that.
    """
    prepared = dict(_prepared(model))
    if not prepared:
        raise ConvertError("this model is not prepared for quantization-aware training: fp8.prepare_qat(model) first.")
    trained_scales(model)  # raises before anything is changed
    for name, module in list(model.named_modules()):
        if type(module) is Linear and isinstance(module.fp8, FakeProducts):
            _freeze(model, name, module)
    for part in model.modules():
        if isinstance(part, FakeProducts):
            part.serves = True
    return model.eval()


def _prepared(model: nn.Module) -> Iterator[tuple[str, FakeProducts]]:
    for part in model.modules():
        if isinstance(part, FakeProducts):
            yield part.name, part


def _freeze(model: nn.Module, name: str, module: Any) -> None:
    part: FakeProducts = module.fp8
    weight, bias = by_rows(part.rounded_weight(module.weight)), module.bias
    new = FrozenLinear(
        weight, part.recipe.replace(w=type(part.recipe.w)("e4m3", weight.tile)),  # type: ignore[union-attr]
        None if bias is None else bias.detach(), part.name,
        input_scale=part.input_scale, weight_only=part.weight_only,
    )  # fmt: skip
    del module.fp8
    module.__class__ = nn.Linear
    new.__dict__["fp8_original"] = module
    put_in_place(model, name, new)


def trained_scales(model: nn.Module) -> Scales:
    """The scales of inputs and KV heads that a prepared model goes by, for `quantize_folder`. Raises `ConvertError`
    where training has measured none yet."""
    inputs = {name: float(part.input_scale) for name, part in _prepared(model) if part.inputs is not None}  # type: ignore[arg-type]
    keys: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        rounding = module._modules.get("fp8_kv")
        if isinstance(rounding, KVRounding) and rounding.keys is not None and rounding.values is not None:
            keys[name] = rounding.keys.found(name).tolist()  # type: ignore[operator]
            values[name] = rounding.values.found(name).tolist()  # type: ignore[operator]
    return Scales(inputs, keys, values)
