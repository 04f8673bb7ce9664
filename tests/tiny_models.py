"""Tiny Hugging Face models with random weights, in folders, with the byte tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8.checkpoint import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"head_dim": 48, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "tied": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "odd": ("LlamaForCausalLM", DECODER | {"hidden_size": 48, "intermediate_size": 100}),
    "qwen2": ("Qwen2ForCausalLM", DECODER | {"layer_types": ["full_attention"] * 2}),
    "mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 2}),
    "llama3": ("LlamaForCausalLM", DECODER | {"rope_parameters": LLAMA3}),
    "biased": ("LlamaForCausalLM", DECODER | {"attention_bias": True}),
    "mistral": ("MistralForCausalLM", DECODER | {"head_dim": 16, "sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 64}),
    "mixtral4": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", DECODER | EXPERTS),
    "qwen3_moe_mixed": ("Qwen3MoeForCausalLM", DECODER | EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "bert": ("BertModel", SIZES),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 260, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}),
}


def build(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, shards: str = "1GB") -> Path:
    """Write a model, the same for the same arguments."""
    transformers = pytest.importorskip("transformers")
    name, sizes = MODELS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).to(dtype)
    for parameter in model.parameters():  # nothing stays zero or one
        parameter.data += 0.02 * torch.randn(parameter.shape).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer.tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(byte_tokenizer.tokenizer_config()))
    return folder


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def retensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace (or, with None, remove) one tensor of a single-file checkpoint."""
    from fp8.checkpoint.tensorfile import write_tensors

    held = {n: t.clone() for n, t in tensors(folder).items()}
    held.pop(name, None)
    if tensor is not None:
        held[name] = tensor
    write_tensors(folder / "model.safetensors", held)


def reconfigure(folder: Path, *path: str, value: Any) -> None:
    """Set one setting of config.json."""
    plain = json.loads((folder / "config.json").read_text())
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(plain))
