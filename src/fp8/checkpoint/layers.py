"""Which tensors of a Hugging Face checkpoint are the weights of linear layers, and which of those become FP8.

Names alone do not tell: GPT-2's `c_attn.weight` lies transposed, an embedding is a matrix too. So the model is built
from its config without memory (on the meta device, by `transformers`), and its `nn.Linear` modules are looked up. The
experts of a mixture, which transformers keeps as one tensor and files as many, go by their names.

**What stays as it is**: embeddings, norms, routers, output heads and poolers; what `skip` names; and with a layer all
that readers fuse with it, since a server refuses q, k and v (or gate and up) of different kinds.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import CheckpointError, suggest
from .source import Source

# What servers multiply as one matrix.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "pooler", "cls", "classification_head")
ROUTERS = ("gate", "router", "shared_expert_gate")
EXPERT = re.compile(r"\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$")


class Held(Protocol):
    """Tensors by their names in the files: a `Source`, or a model in memory."""

    @property
    def folder(self) -> Any: ...

    @property
    def entries(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class InMemory:
    """A model that is no file yet, under the names that its file will have; tied tensors once."""

    folder: str
    entries: Mapping[str, Any]

    @staticmethod
    def of(model: nn.Module) -> InMemory:
        first: dict[int, str] = {}
        tensors = model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            first.setdefault(id(tensor), name)
        return InMemory(f"this {type(model).__name__}", {name: tensors[name] for name in first.values()})


@dataclass(frozen=True)
class Layers:
    """Linear layers by the names that the files give them: which become FP8, and why the others do not.

    `modules`: what the model calls them, where that differs (files without the prefix `model.` or `bert.`).
    """

    fp8: tuple[str, ...]
    kept: Mapping[str, str]
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def ignore(self) -> list[str]:
        """What stays, under every name that a reader may know it by."""
        return [*self.kept, *(self.modules[name] for name in self.kept if name in self.modules)]

    def keeping(self, reasons: Mapping[str, str]) -> Layers:
        """The same with more layers that stay, and why."""
        fp8 = tuple(name for name in self.fp8 if name not in reasons)
        return Layers(fp8, {**self.kept, **reasons}, self.modules)


def skeleton(source: Source) -> nn.Module:
    """The model of a config, on the meta device. Raises `CheckpointError`."""
    with torch.device("meta"):
        return model_class(source.config)(hf_config(source.folder, source.config))


def hf_config(folder: Path, plain: Mapping[str, Any]) -> Any:
    """The config as transformers understands it, without its quantization."""
    transformers = need_transformers()
    kind = plain.get("model_type")
    try:
        config = transformers.AutoConfig.for_model(**{k: v for k, v in plain.items() if k not in DROPPED})
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} says model_type={kind!r}, which transformers {transformers.__version__} cannot "
            f"build ({str(error).splitlines()[0]}): install a version that knows it."
        ) from None
    config.name_or_path = str(folder)
    return config


DROPPED = ("quantization_config", "fp8", "auto_map")


def model_class(plain: Mapping[str, Any]) -> Any:
    """The class that `architectures` names."""
    transformers = need_transformers()
    names = plain.get("architectures") or ()
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise CheckpointError(
            f"config.json says architectures={list(names)}; transformers {transformers.__version__} has no such model. "
            "Models with code of their own are not read: install a version of transformers that knows it."
        )
    return found


def need_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise CheckpointError("this needs the package 'transformers': pip install 'fp8[hf]'.") from None
    return transformers


# --------------------------------------------------------------------------- choosing


def choose_layers(source: Held, model: nn.Module, skip: Sequence[str] = (), head: bool = False) -> Layers:
    """Which linear layers become FP8. `skip` holds names with `*`, or `re:` and a regular expression."""
    linear = dict(linear_layers(source, model))
    refuse_unmatched(skip, linear)
    kept: dict[str, str] = {}
    for name in linear:
        if (reason := _reason(name, source, model, skip, head)) is not None:
            kept[name] = reason
    alone = dict(kept)
    for name in linear:
        if name not in alone and (with_it := next((p for p in partners(name) if p in alone), None)):
            kept[name] = f"fused with {with_it}, which stays"
    fp8 = tuple(name for name in linear if name not in kept)
    if not fp8:
        raise CheckpointError(f"no layer of {source.folder} would become FP8: {_nothing(kept)}")
    return Layers(fp8, kept, {name: module for name, module in linear.items() if name != module})


def linear_layers(source: Held, model: nn.Module) -> Iterator[tuple[str, str]]:
    """`(name in the files, name in the model)` of each linear layer; a tied head has no tensor and is called as is."""
    held = {name.removesuffix(".weight"): name for name in source.entries if name.endswith(".weight")}
    prefix = getattr(model, "base_model_prefix", "") + "."
    seen = set()
    for module in (name for name, layer in model.named_modules() if type(layer) is nn.Linear):
        name = next((n for n in (module, prefix + module, module.removeprefix(prefix)) if n in held), module)
        seen.add(name)
        yield name, module
    yield from ((name, name) for name in held if EXPERT.search(name) and name not in seen)


def _reason(name: str, source: Held, model: nn.Module, skip: Sequence[str], head: bool) -> str | None:
    parts = name.split(".")
    if any(names(pattern, name) for pattern in skip):
        return "skipped"
    if parts[-1] in ROUTERS:
        return "a router"
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if any(part in HEADS for part in parts) or (output is not None and output is _module(model, name)):
        if f"{name}.weight" not in source.entries:
            return "has no weight of its own"
        return None if head else "a head"
    if f"{name}.weight" not in source.entries:
        raise CheckpointError(f"the checkpoint has no tensor '{name}.weight', which config.json calls for.")
    return None


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def names(pattern: str, name: str) -> bool:
    """Whether a pattern means this layer."""
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)


def refuse_unmatched(skip: Sequence[str], linear: Iterable[str]) -> None:
    """A pattern that meets nothing is a misprint."""
    for pattern in skip:
        try:
            met = any(names(pattern, name) for name in linear)
        except re.error as error:
            raise CheckpointError(f"skip pattern {pattern!r} is no regular expression: {error}.") from None
        if not met:
            ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise CheckpointError(f"skip pattern {pattern!r} names no linear layer. {suggest(pattern, ends)}")


def partners(name: str) -> list[str]:
    """The other layers that readers make one matrix with this one.

    >>> partners("model.layers.0.mlp.up_proj")
    ['model.layers.0.mlp.gate_proj']
    """
    return [other for other in fused_group(name) if other != name]


def fused_group(name: str) -> tuple[str, ...]:
    """All layers that readers fuse with this one, itself among them."""
    stem, _, last = name.rpartition(".")
    group = next((group for group in FUSED if last in group), (last,))
    return tuple(f"{stem}.{part}" if stem else part for part in group)


def _nothing(kept: Mapping[str, str]) -> str:
    told = ", ".join(f"{name} ({why})" for name, why in list(kept.items())[:3]) or "none"
    return f"its nn.Linear layers are {told}. A Conv1D, as in GPT-2, cannot be stored so that servers read it."


def refuse_shapes(source: Source, model: nn.Module) -> None:
    """Every tensor that the model has by the same name has the shape that the config calls for."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, held in model.state_dict().items():
        there = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in source.entries), None)
        if there is not None and (shape := source.entries[there].shape) != tuple(held.shape):
            raise CheckpointError(f"{there} has shape {list(shape)}; config.json calls for {list(held.shape)}.")


def attention_layers(model: nn.Module) -> dict[int, str]:
    """The attention module of each layer index, by the model's names: where K and V come from."""
    return {
        int(module.layer_idx): name  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and type(module).__name__.endswith("Attention")
    }
