"""Models as they are served: `load_model` reads a checkpoint of a known architecture into a `ServedModel`.

    layers.py    the calls that a layer makes, each one a fusion
    weights.py   a checkpoint's tensors, as layers ask for them; random_weights.py: those of no checkpoint
    served.py    embedding, blocks, head
    experts.py   a routed SwiGLU
    llama.py, qwen2.py, qwen3.py, mixtral.py, qwen3_moe.py     one architecture each

A new architecture is a file with its block, a row in `BLOCKS`, and a row in `models/architecture.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.export import encode, fp8_layers
from ...checkpoint.load import groups_of
from ...checkpoint.quantize import SCHEMES
from ...checkpoint.source import Source
from ...errors import ConfigError, suggest
from ...models.architecture import Architecture
from ...models.huggingface import to_config, to_huggingface
from ...models.llama import Decoder
from .llama import LlamaBlock
from .mixtral import MixtralBlock
from .qwen2 import Qwen2Block
from .qwen3 import Qwen3Block
from .qwen3_moe import Qwen3MoeBlock
from .random_weights import RandomWeights
from .served import Block, ServedModel
from .weights import InMemory, Quantization, Weights

__all__ = ["BLOCKS", "Block", "ServedModel", "load_model", "random_model"]

BLOCKS: dict[str, type[LlamaBlock]] = {
    "llama": LlamaBlock,
    "mistral": LlamaBlock,
    "qwen2": Qwen2Block,
    "qwen3": Qwen3Block,
    "mixtral": MixtralBlock,
    "qwen3_moe": Qwen3MoeBlock,
}
QUANTIZATIONS: dict[str | None, Quantization] = {None: None, "fp8": SCHEMES["dynamic"], "int8": "int8"}


def load_model(
    model: str | Path | Decoder, *, device: torch.device | str | None = None, quantization: str | None = None
) -> ServedModel:
    """A model ready to serve.

    model          the folder of a checkpoint: BF16 (FP16 and FP32 are rounded to BF16), FP8 of `fp8 quantize`,
                   `fp8.checkpoint.save`, compressed-tensors or Hugging Face's `fp8`; or a `Decoder`
    device         where it is put
    quantization   None: as the file says. "fp8": what the file holds in high precision is quantized as it is read, one
                   scale a channel, and activations one a token, to the codes that `fp8 quantize` writes. Head, routers,
                   embedding and norms stay. "int8": INT8 W8A8 in the same layers, to compare with; not fused

    What a file holds in FP8 is served with its codes and scales, in bytes. Raises `CheckpointError`, naming the file,
    tensor or setting; `ConfigError` for an unknown quantization.
    """
    scheme = scheme_of(quantization)
    tensors = in_memory(model) if isinstance(model, Decoder) else Source.open(model)
    with tensors.reading() as read:
        weights = Weights(tensors, read, groups_of(tensors.config), scheme, device)
        served = read_model(tensors.config, weights)
    weights.refuse_leftovers()
    return served


def random_model(
    config: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    seed: int = 0,
) -> ServedModel:
    """A model with random weights, of the shape that a `config.json` describes; other arguments as for `load_model`."""
    return read_model(config, RandomWeights(config, scheme_of(quantization), device, seed))


def scheme_of(quantization: str | None) -> Quantization:
    """How matrices in high precision are quantized as they are read."""
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization cannot be {quantization!r}. {suggest(quantization, map(str, QUANTIZATIONS))}")
    return QUANTIZATIONS[quantization]


def read_model(config: Mapping[str, Any], weights: Weights) -> ServedModel:
    """The model of a `config.json`, out of these weights."""
    shape = Architecture.of(config)
    block = BLOCKS[shape.kind]
    return ServedModel(shape, weights, lambda held, i: block(held, i, shape)).eval()


def in_memory(decoder: Decoder) -> InMemory:
    """A decoder of ours as the checkpoint that `fp8.checkpoint.save` would write."""
    if any(True for _ in fp8_layers(decoder)):
        tensors, config = encode(decoder, torch.bfloat16)
        return InMemory(config, tensors)
    state = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    return InMemory(to_config(decoder.config, torch.bfloat16), to_huggingface(state, decoder.config))
