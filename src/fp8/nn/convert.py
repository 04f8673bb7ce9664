"""Turn a model's layers into FP8 ones, turn them back, and say what was done.

A layer is converted by changing its class (and giving it an `fp8` part), not by putting another module in its place.
Parameters, names in the state dict, hooks, tied weights and references to the module all stay as they are, and undoing
it is changing the class back. Only exact types are converted: a subclass may have a forward of its own, so it stays as
it is, and the report says so.

What to do with each type is a table. `register` adds a row; a type without one stays in high precision.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import ConvertError
from ..recipe import Recipe
from .attention import MultiheadAttention
from .autocast import count_products
from .break_even import gain
from .kv_rounding import unround_kv
from .linear import Conv2d, Linear
from .products import Fp8Products

HEADS = ("lm_head", "head", "output_head", "embed_out", "classifier")
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


@dataclass(frozen=True)
class Decision:
    """What became of one module: `fp8` or not, why, how many parameters it has. `ran` is None until `Report.trace`."""

    name: str
    type: str
    fp8: bool
    reason: str
    parameters: int
    ran: bool | None = None


@dataclass(frozen=True)
class Report:
    """One decision for each module that holds parameters of its own."""

    recipe: Recipe
    decisions: tuple[Decision, ...]

    @property
    def converted(self) -> list[str]:
        return [d.name for d in self.decisions if d.fp8]

    @property
    def kept(self) -> dict[str, str]:
        """The modules in high precision, each with the reason."""
        return {d.name: d.reason for d in self.decisions if not d.fp8}

    @property
    def share(self) -> float:
        """The share of parameters whose products are FP8."""
        return sum(d.parameters for d in self.decisions if d.fp8) / max(sum(d.parameters for d in self.decisions), 1)

    def trace(self, model: nn.Module, *inputs: Any, **keywords: Any) -> Report:
        """Run one forward and tell, of each converted layer, whether its FP8 product ran. In evaluation mode and
        without gradients, so that running statistics stay as they are."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            with torch.no_grad(), count_products() as products:
                model.eval()(*inputs, **keywords)
        finally:
            for module, training in modes:
                module.training = training
        ran = products.layers() | products.layers("rounded")
        seen = [replace(d, ran=_ran(d.name, ran)) if d.fp8 else d for d in self.decisions]
        return replace(self, decisions=tuple(seen))

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_dict(), "decisions": [asdict(d) for d in self.decisions]}

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> Report:
        """What `to_dict` wrote. Raises `ConvertError` for what is no report."""
        try:
            return Report(Recipe.from_dict(plain["recipe"]), tuple(Decision(**one) for one in plain["decisions"]))
        except (KeyError, TypeError) as error:
            raise ConvertError(f"this is no report of a conversion: {error!r}.") from None

    def __str__(self) -> str:
        lines = [f"recipe {self.recipe.name}: {len(self.converted)} FP8 layers, {self.share:.1%} of the parameters"]
        width = max((len(d.name) for d in self.decisions), default=0)
        for d in self.decisions:
            state = "FP8 " if d.fp8 else "high"
            state += "" if d.ran is None else " ran    " if d.ran else " NOT RUN"
            lines.append(f"  {d.name or '(root)':{width}}  {state}  {d.type}: {d.reason}")
        return "\n".join(lines)


def _ran(name: str, ran: set[str]) -> bool:
    return any(other == name or other.startswith(f"{name}.") for other in ran)


# --------------------------------------------------------------------------- the table of types

Converter = Callable[[nn.Module, Recipe, str], nn.Module | None]


def _linear(module: nn.Module, recipe: Recipe, name: str) -> None:
    module.__class__ = Linear
    module.fp8 = Fp8Products(recipe, name)


def _conv2d(module: nn.Module, recipe: Recipe, name: str) -> None:
    module.__class__ = Conv2d
    module.fp8 = Fp8Products(recipe, name)


def _attention(module: nn.Module, recipe: Recipe, name: str) -> None:
    assert isinstance(module, nn.MultiheadAttention)
    module.__class__ = MultiheadAttention
    module.add_products(recipe, name)  # type: ignore[operator]


def _own(module: nn.Module, recipe: Recipe, name: str) -> None:
    """A layer of this library that was built without a recipe, or with another one."""
    for part in _parts(module):
        part.set_recipe(recipe)
    if isinstance(module, MultiheadAttention):
        module.add_products(recipe, name)
    else:
        module.fp8.name = name  # type: ignore[union-attr]


CONVERTERS: dict[type[nn.Module], Converter] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.MultiheadAttention: _attention,
    Linear: _own,
    Conv2d: _own,
    MultiheadAttention: _own,
}
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    Linear: nn.Linear,
    Conv2d: nn.Conv2d,
    MultiheadAttention: nn.MultiheadAttention,
}


def register(module_type: type[nn.Module], converter: Converter) -> None:
    """Teach `convert` a type of your own.

    `converter(module, recipe, name)` returns the module to put in its place (`revert` puts the old one back), or
    changes the module in place and returns None. `fp8.nn.Fp8Products` is the part that multiplies in FP8.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ConvertError(f"register needs a subclass of torch.nn.Module, not {module_type!r}.")
    CONVERTERS[module_type] = converter


def _transposed_linear(kind: type[nn.Module]) -> Converter | None:
    """Hugging Face's `Conv1D`, a linear layer with its weight stored as [in, out]; known by name, not imported."""
    if (kind.__module__, kind.__name__) != ("transformers.pytorch_utils", "Conv1D"):
        return None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.fp8(x, self.weight.t(), self.bias)

    def fp8_weights(self: Any) -> Iterable[Any]:
        yield self.fp8, self.weight.t()

    def reduce(self: Any) -> Any:
        return _empty, (kind,), self.__dict__

    methods = {"forward": forward, "fp8_weights": fp8_weights, "__reduce__": reduce}
    subclass = type("Conv1D", (kind,), methods)

    def convert_one(module: nn.Module, recipe: Recipe, name: str) -> None:
        module.__class__ = subclass
        module.fp8 = Fp8Products(recipe, name)

    CONVERTERS[kind], CONVERTERS[subclass], ORIGINALS[subclass] = convert_one, _own, kind
    return convert_one


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A converted Conv1D before its state is read: pickle knows no class that was made while running."""
    if kind not in CONVERTERS:
        _transposed_linear(kind)
    subclass = next(new for new, old in ORIGINALS.items() if old is kind)
    return subclass.__new__(subclass)


# --------------------------------------------------------------------------- convert and revert


def convert(
    model: nn.Module,
    recipe: str | Recipe = "tensorwise",
    skip: Iterable[str] = (),
    *,
    head: bool = False,
    only_if_faster: bool = False,
    tokens: int = 8192,
) -> Report:
    """Make a model's linear layers, convolutions and attention projections FP8, in place; returns what was done and
    why.

    recipe          a preset's name or a `Recipe`; its `overrides` choose by name pattern
    skip            name patterns (`fnmatch`, as in "*.attention.out") that stay in high precision
    head            also the output head, which is otherwise kept: a layer called lm_head, head, output_head, embed_out
                    or classifier, or one that shares the embedding's weight
    only_if_faster  keep a layer whose FP8 products would be slower than BF16 at `tokens` rows on this device

    Embeddings and norms always stay. The report also stays with the model, as `model.fp8_report`, from where
    checkpoints take it: what was decided here, for the sake of speed too, is fixed. Raises `ConvertError`, before
    anything is changed, for a weight with NaN or Inf. `revert` undoes.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"convert changes a torch.nn.Module in place; got {type(model).__name__}.")
    base = Recipe.of(recipe)
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConvertError(f"skip takes names or patterns of names, as in '*.attention.out'; got {skip!r}.")
    names: dict[nn.Module, list[str]] = {}  # a shared module has several
    for name, m in model.named_modules(remove_duplicate=False):
        names.setdefault(m, []).append(name)
    unused = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for each in names.values() for n in each)]
    if unused:
        raise ConvertError(f"skip={unused[0]!r} matches no module; the first are {_first_names(model)}.")
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    plan = [
        (name, m, *_decide(names[m], m, base, patterns, embeddings, head, only_if_faster, tokens))
        for name, m in _holders(model)
    ]
    for name, module, chosen, _ in plan:
        if chosen is not None:
            _refuse_non_finite(name, module)
    decisions = [Decision(n, type(m).__name__, r is not None, why, _size(m)) for n, m, r, why in plan]
    for name, module, chosen, _ in plan:
        if chosen is not None:
            convert_module(model, name, module, chosen)
    _stay_off_the_fast_path(model, True)
    model.fp8_report = Report(base, tuple(decisions))  # type: ignore[assignment]
    return model.fp8_report  # type: ignore[return-value]


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, `prepare_qat` and `finalize`, in place: torch's own classes, with the parameters as they are
    now."""
    for name, module in list(model.named_modules()):
        if "fp8_original" in module.__dict__:
            put_in_place(model, name, module.__dict__["fp8_original"])
        elif type(module) in ORIGINALS:
            for part in [key for key, child in module.named_children() if isinstance(child, Fp8Products)]:
                delattr(module, part)
            module.__class__ = ORIGINALS[type(module)]
        unround_kv(module)
    _stay_off_the_fast_path(model, False)
    model.__dict__.pop("fp8_report", None)
    return model


def _holders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules to decide on: those that hold parameters, but not the inside of an attention module or of one
    registered."""
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside) or isinstance(module, Fp8Products):
            continue
        whole = isinstance(module, nn.MultiheadAttention) or (
            type(module) in CONVERTERS and type(module) not in (nn.Linear, nn.Conv2d)
        )
        if whole:
            inside.append(name)
        if whole or next(module.parameters(recurse=False), None) is not None:
            found.append((name, module))
    return found


def _decide(
    names: list[str],
    module: nn.Module,
    base: Recipe,
    skip: list[str],
    embeddings: set[torch.Tensor],
    head: bool,
    only_if_faster: bool,
    tokens: int,
) -> tuple[Recipe | None, str]:
    """The recipe of one module, or None, and the reason. Its first name chooses the recipe; any may be skipped."""
    pattern = next((p for p in skip if any(fnmatch.fnmatchcase(name, p) for name in names)), None)
    if pattern is not None:
        return None, f"skipped by request ({pattern!r})"
    kind = type(module)
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return None, "its parameters have no shape yet: run the model once, then convert"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None, "an embedding is a look-up, not a product"
    if "norm" in kind.__name__.lower():
        return None, "normalization stays in high precision"
    if kind not in CONVERTERS and _transposed_linear(kind) is None:
        return None, f"no converter is registered for {kind.__name__} (fp8.register adds one)"
    if not head and (
        any(name.rpartition(".")[2] in HEADS for name in names) or getattr(module, "weight", None) in embeddings
    ):
        return None, "output head (head=True converts it)"
    if (reason := _cannot(module)) is not None:
        return None, reason
    chosen = base.for_layer(names[0])
    if chosen is None:
        return None, "kept by the recipe's overrides"
    if only_if_faster:
        ratio, why = gain(module, chosen, tokens)
        if ratio <= 1:
            return None, why
        return chosen, f"recipe {chosen.name}; {why}"
    return chosen, f"recipe {chosen.name}"


def _cannot(module: nn.Module) -> str | None:
    """Why a module of a known type cannot be FP8."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a convolution in {module.groups} groups has products too thin for FP8"
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "attention with bias_k or add_zero_attn is not supported"
    types = {p.dtype for p in module.parameters()} - set(INPUTS)
    return f"its parameters are {str(types.pop())[6:]}" if types else None


def convert_module(model: nn.Module, name: str, module: nn.Module, recipe: Recipe) -> None:
    replacement = CONVERTERS[type(module)](module, recipe, name)
    if replacement is not None and replacement is not module:
        replacement.__dict__["fp8_original"] = module
        replacement.train(module.training)
        put_in_place(model, name, replacement)
        module = replacement
    device = next((p.device for p in module.parameters()), None)
    for part in _parts(module):
        part.train(module.training)
        if device is not None:
            part.to(device)


def put_in_place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in every place that holds the one called `name`."""
    if not name:
        raise ConvertError("the root module itself would have to be replaced: wrap it in nn.Sequential first.")
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old:
                setattr(parent, key, module)


def _parts(module: nn.Module) -> list[Fp8Products]:
    return [m for m in module.modules() if isinstance(m, Fp8Products)]


def _stay_off_the_fast_path(model: nn.Module, on: bool) -> None:
    """Keep `nn.TransformerEncoderLayer` from its fused evaluation kernel, which would pass its FP8 layers by, and
    `nn.TransformerEncoder` from the nested tensors that only this kernel takes."""
    for module in model.modules():
        switch = next((name for kind, name in FAST_PATHS.items() if isinstance(module, kind)), None)
        if switch is None or not hasattr(module, switch):
            continue
        if on and _parts(module) and "fp8_fast_path" not in module.__dict__:
            module.__dict__["fp8_fast_path"] = getattr(module, switch)
            setattr(module, switch, False)
        elif not on and "fp8_fast_path" in module.__dict__:
            setattr(module, switch, module.__dict__.pop("fp8_fast_path"))


def _refuse_non_finite(name: str, module: nn.Module) -> None:
    for key, parameter in module.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ConvertError(
                f"{name}.{key} holds NaN or Inf, so its FP8 codes would too. Find where they come from, or skip "
                f"the layer: convert(model, skip=[{name!r}]). Nothing was changed."
            )


def _size(module: nn.Module) -> int:
    whole = isinstance(module, nn.MultiheadAttention)
    return sum(p.numel() for p in module.parameters(recurse=whole) if not isinstance(p, UninitializedParameter))


def _first_names(model: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in list(model.named_modules())[1:6])
