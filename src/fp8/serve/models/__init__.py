"""Models as they are served: `load_model` reads a checkpoint of a known architecture into a `ServedModel`.

    layers.py    the calls that a layer makes, each one a fusion
    weights.py   a checkpoint's tensors, as layers ask for them
    served.py    embedding, blocks, head
    experts.py   a routed SwiGLU
    llama.py, qwen2.py, qwen3.py, mixtral.py, qwen3_moe.py     one architecture each

A new architecture is a file with its block, a row in `BLOCKS`, and a row in `models/architecture.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoint.compressed_tensors import Scheme
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
from .served import Block, ServedModel
from .weights import InMemory, Tensors, Weights

__all__ = ["BLOCKS", "Block", "ServedModel", "load_model"]

BLOCKS: dict[str, type[LlamaBlock]] = {
    "llama": LlamaBlock,
    "mistral": LlamaBlock,
    "qwen2": Qwen2Block,
    "qwen3": Qwen3Block,
    "mixtral": MixtralBlock,
    "qwen3_moe": Qwen3MoeBlock,
}
QUANTIZATIONS = {None: None, "fp8": "dynamic"}


def load_model(
    model: str | Path | Decoder, *, device: torch.device | str | None = None, quantization: str | None = None
) -> ServedModel:
    """A model ready to serve.

    model          the folder of a checkpoint: BF16 (FP16 and FP32 are rounded to BF16), FP8 of `fp8 quantize`,
                   `fp8.checkpoint.save`, compressed-tensors or Hugging Face's `fp8`; or a `Decoder`
    device         where it is put
    quantization   None: as the file says. "fp8": what the file holds in high precision is quantized as it is read, one
                   scale a channel, and activations one a token, to the codes that `fp8 quantize` writes. Head, routers,
                   embedding and norms stay

    What a file holds in FP8 is served with its codes and scales, in bytes. Raises `CheckpointError`, naming the file,
    tensor or setting; `ConfigError` for an unknown quantization.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization cannot be {quantization!r}. {suggest(quantization, map(str, QUANTIZATIONS))}")
    tensors = in_memory(model) if isinstance(model, Decoder) else Source.open(model)
    name = QUANTIZATIONS[quantization]
    return read_model(tensors, None if name is None else SCHEMES[name], device)


def read_model(tensors: Tensors, scheme: Scheme | None, device: torch.device | str | None) -> ServedModel:
    """The model of a checkpoint that is open."""
    config = Architecture.of(tensors.config)
    block = BLOCKS[config.kind]
    with tensors.reading() as read:
        weights = Weights(tensors, read, groups_of(tensors.config), scheme, device)
        model = ServedModel(config, weights, lambda held, i: block(held, i, config))
    weights.refuse_leftovers()
    return model.eval()


def in_memory(decoder: Decoder) -> InMemory:
    """A decoder of ours as the checkpoint that `fp8.checkpoint.save` would write."""
    if any(True for _ in fp8_layers(decoder)):
        tensors, config = encode(decoder, torch.bfloat16)
        return InMemory(config, tensors)
    state = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    return InMemory(to_config(decoder.config, torch.bfloat16), to_huggingface(state, decoder.config))
