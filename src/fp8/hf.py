"""FP8 inside transformers: `from_pretrained` gives a model whose linear layers multiply codes.

    import fp8.hf
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(OUT, config=fp8.hf.serving(OUT))                     # an FP8 checkpoint
    AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=fp8.hf.Fp8Config())       # BF16, quantized on load

Importing this module registers the quantization method `fp8-codes` with transformers. Its layers are `FrozenLinear`:
the codes and scales of the file, activations quantized as the file says, the product by `fp8.matmul` (tensor cores on a
Hopper GPU, the exact reference elsewhere). That is what `fp8 eval` judges. Without it transformers loads the same files
through its own formats, decodes their weights, and leaves activations alone on a CPU.

Why the first line names `config` and not `quantization_config`: a checkpoint says `compressed-tensors` (or `fp8`), so
that every server reads it, and transformers refuses a quantization config of another class beside it. `serving` reads
config.json and puts our method in the place of the file's, in memory; the file stays what it is.

How it loads. Before the weights come, each FP8 layer is taken out of the empty model; transformers fills the rest, and
passes over the tensors of those that were taken out. Then they are put in, read (or quantized) one at a time with all
the checks of `fp8.checkpoint`, so that a BF16 model never lies in memory whole. Codes equal those of `fp8 quantize`.

Not here: calibrated inputs on load (a checkpoint of scheme static has them), scales of the KV cache (it stays in high
precision), experts of a mixture (refused: transformers would read their codes and miss their scales), training, saving,
and `device_map="auto"` over several GPUs, which would take our layers to weigh nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.fp8_folder import Fp8Folder
from .checkpoint.frozen import Layer, frozen
from .checkpoint.layers import choose_layers, linear_layers, need_transformers
from .checkpoint.quantize import Options, quantize_weight, refuse_types
from .checkpoint.source import Source
from .errors import CheckpointError, ConfigError

need_transformers()

from transformers import AutoConfig  # noqa: E402
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "fp8-codes"


@register_quantization_config(METHOD)
class Fp8Config(QuantizationConfigMixin):
    """How a BF16 model is quantized when it is loaded, as `fp8 quantize` does it. Raises `ConfigError`.

    scheme    "dynamic", "block" or "weight-only"
    skip      layers that stay: names with *, or "re:EXPRESSION"
    head      the output head in FP8 too
    scales    "power_of_two" or "none" (amax / 448)
    """

    def __init__(
        self,
        scheme: str = "dynamic",
        skip: Iterable[str] = (),
        head: bool = False,
        scales: str = "power_of_two",
        **more: Any,
    ) -> None:
        if unknown := set(more) - {"quant_method"}:
            raise ConfigError(f"Fp8Config has no setting {sorted(unknown)[0]!r}: it has scheme, skip, head and scales.")
        if scheme == "static":
            raise ConfigError(
                "scheme 'static' needs calibrated scales: load what `fp8 quantize --scheme static` wrote."
            )
        self.quant_method: Any = METHOD
        self.scheme, self.skip, self.head, self.scales = scheme, list(skip), head, scales
        self.options()

    def options(self) -> Options:
        return Options(self.scheme, tuple(self.skip), self.head, self.scales)


def serving(checkpoint: str | Path, **how: Any) -> Any:
    """The config of an FP8 checkpoint with which transformers multiplies its codes; `how` goes to `AutoConfig`."""
    config = AutoConfig.from_pretrained(checkpoint, **how)
    if not getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{checkpoint} is not quantized: load it with quantization_config=fp8.hf.Fp8Config(), or quantize it first."
        )
    config.quantization_config = {"quant_method": METHOD}
    return config


class TakenOut(nn.Module):
    """The place of a layer that is yet to come."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.has_bias = bias


@register_quantizer(METHOD)
class Fp8Quantizer(HfQuantizer):
    """Takes the FP8 layers out of an empty model, and puts them in when the rest is loaded."""

    quantization_config: Any  # an Fp8Config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **named: Any) -> Any:
        if not checkpoint_files:
            raise CheckpointError(
                f"FP8 layers are read from files, and transformers {need_transformers().__version__} named none: give "
                "the folder of a checkpoint (not a state_dict), and transformers 5 or newer."
            )
        source = Source.open(Path(checkpoint_files[0]).parent)
        self.modules = dict(linear_layers(source, model))
        self.layer, names = self.from_codes(source) if self.pre_quantized else self.from_weights(source, model)
        self.names = [name for name in names if self.modules.get(name)]
        if missing := [name for name in names if name not in self.modules or not has(model, self.modules[name])]:
            raise CheckpointError(
                f"{missing[0]} is no linear layer of {type(model).__name__}, which would read its codes without their "
                "scales (the experts of a mixture): fp8 convert --to bf16 gives a folder that can be loaded."
            )
        self.source = source
        passed_over = set(model._keys_to_ignore_on_load_unexpected or ())
        for name in self.names:
            replace(model, self.modules[name], TakenOut(model.get_submodule(self.modules[name]).bias is not None))
            passed_over |= {rf"(^|\.){re.escape(stem)}\." for stem in (name, self.modules[name])}
        model._keys_to_ignore_on_load_unexpected = passed_over | {r"\.[qkv]_scale$"}
        return model

    def from_codes(self, source: Source) -> tuple[Callable[[str], Layer], list[str]]:
        """The layers of an FP8 checkpoint."""
        folder = Fp8Folder.open(source.folder)
        return lambda name: (folder.weight(name), folder.layers[name], folder.input_scale(name)), list(folder.layers)

    def from_weights(self, source: Source, model: nn.Module) -> tuple[Callable[[str], Layer], list[str]]:
        """The layers of a model in high precision, quantized."""
        options = self.quantization_config.options()
        layers = choose_layers(source, model, options.skip, options.head)
        refuse_types(source, layers)

        def made(name: str) -> Layer:
            return quantize_weight(source.read(f"{name}.weight"), options.layout), options.layout, None

        return made, list(layers.fp8)

    def _process_model_after_weight_loading(self, model: Any, **named: Any) -> Any:
        for name in self.names:
            where = self.modules[name]
            bias = self.bias(name, model.dtype) if model.get_submodule(where).has_bias else None
            replace(model, where, frozen(Biased(bias), name, self.layer(name)).to(device_near(model, where)))
        return model.requires_grad_(False)

    def bias(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.source.read(f"{name}.bias").to(dtype)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The file is there already, in a format that others read."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class Biased(nn.Module):
    """What `frozen` asks of the layer that it replaces."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)


def has(model: nn.Module, name: str) -> bool:
    return isinstance(dict(model.named_modules()).get(name), nn.Linear)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def device_near(model: nn.Module, name: str) -> torch.device:
    """Where the nearest parent that holds a parameter has it: a model may lie on several devices."""
    while name:
        name = name.rpartition(".")[0]
        if (held := next(model.get_submodule(name).parameters(), None)) is not None:
            return held.device
    return torch.device("cpu")
