"""What a decoder and its parts are called in Hugging Face's Llama, both ways. Nothing here reads or writes a file.

    ours                        Hugging Face                                    rows
    embedding                   model.embed_tokens                              all
    layers.i.attention_norm     model.layers.i.input_layernorm                  all
    layers.i.attention.qkv      model.layers.i.self_attn.{q,k,v}_proj           H*D, KV*D, KV*D
    layers.i.attention.out      model.layers.i.self_attn.o_proj                 all
    layers.i.mlp_norm           model.layers.i.post_attention_layernorm         all
    layers.i.mlp.up             model.layers.i.mlp.{gate,up}_proj               ffn, ffn
    layers.i.mlp.down           model.layers.i.mlp.down_proj                    all
    norm                        model.norm                                      all
    head                        lm_head                                         all, unless tied to the embedding

Both keep the rotary convention "first half, second half", so no row changes place: our fused matrices are theirs, one
on top of the other.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .llama import DecoderConfig

# Buffers that some versions of transformers stored and all of them compute; and scales for servers whose KV cache has
# static ones (ours are measured when a token is stored).
IGNORED = (".rotary_emb.inv_freq", ".self_attn.q_scale", ".self_attn.k_scale", ".self_attn.v_scale")


class Shard(NamedTuple):
    """One Hugging Face module, and the rows of ours that it holds."""

    name: str
    start: int
    stop: int


def shards(config: DecoderConfig) -> dict[str, list[Shard]]:
    """Each module of ours that has a weight, with the Hugging Face modules that hold its rows, in order."""
    c = config
    q, kv, hidden, ffn = c.hidden_size, c.num_kv_heads * c.head_dim, c.hidden_size, c.ffn_hidden_size
    out = {"embedding": _cut(("model.embed_tokens", c.vocab_size))}
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        out[f"{ours}.attention_norm"] = _cut((f"{theirs}.input_layernorm", hidden))
        out[f"{ours}.attention.qkv"] = _cut(
            (f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)
        )
        out[f"{ours}.attention.out"] = _cut((f"{attention}.o_proj", hidden))
        out[f"{ours}.mlp_norm"] = _cut((f"{theirs}.post_attention_layernorm", hidden))
        out[f"{ours}.mlp.up"] = _cut((f"{theirs}.mlp.gate_proj", ffn), (f"{theirs}.mlp.up_proj", ffn))
        out[f"{ours}.mlp.down"] = _cut((f"{theirs}.mlp.down_proj", hidden))
    out["norm"] = _cut(("model.norm", hidden))
    out["head"] = _cut(("lm_head", c.vocab_size))
    return out


def _cut(*parts: tuple[str, int]) -> list[Shard]:
    found, start = [], 0
    for name, rows in parts:
        found.append(Shard(name, start, start + rows))
        start += rows
    return found


def to_huggingface(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The weights of a decoder's `state_dict` under Hugging Face's names; the head is left out where it is tied."""
    out = {}
    for ours, parts in shards(config).items():
        if ours == "head" and config.tie_embeddings:
            continue
        weight = state[f"{ours}.weight"]
        for part in parts:
            out[f"{part.name}.weight"] = weight[part.start : part.stop]
    return out


def from_huggingface(
    tensors: Mapping[str, Tensor], config: DecoderConfig, skip: Container[str] = ()
) -> dict[str, Tensor]:
    """The weights for `Decoder.load_state_dict(..., strict=False)` out of a Hugging Face Llama's, but for the modules
    of ours in `skip`.

    Raises `CheckpointError`, naming the tensor, where one is missing, has another shape, or belongs to no part.
    """
    layout, out, used = shards(config), {}, set()
    for ours, parts in layout.items():
        if ours in skip:
            continue
        tied = ours == "head" and config.tie_embeddings and "lm_head.weight" not in tensors
        names = ["model.embed_tokens.weight"] if tied else [f"{part.name}.weight" for part in parts]
        pieces = [_piece(tensors, name, part, config) for name, part in zip(names, parts, strict=True)]
        out[f"{ours}.weight"] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        used.update(names)
    extra = [name for name in tensors if name not in used and not name.endswith(IGNORED)]
    if extra:
        names = ", ".join(sorted(extra)[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise CheckpointError(f"tensors that belong to no part of a Llama decoder without biases: {names}.")
    return out


def _piece(tensors: Mapping[str, Tensor], name: str, part: Shard, config: DecoderConfig) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}, which config.json calls for.")
    tensor = tensors[name]
    need = shape_of(part, config)
    if tuple(tensor.shape) != need:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; config.json calls for {need}.")
    return tensor


def shape_of(part: Shard, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of a Hugging Face module's weight."""
    rows = part.stop - part.start
    if part.name.endswith("norm"):
        return (rows,)
    return rows, config.ffn_hidden_size if part.name.endswith("down_proj") else config.hidden_size


# --------------------------------------------------------------------------- config.json


def to_config(config: DecoderConfig, dtype: torch.dtype, end_of_text: int | None = None) -> dict[str, Any]:
    """The `config.json` of a LlamaForCausalLM. `rope_theta` stands where transformers 4 and where 5 look for it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def from_config(plain: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes. Raises `CheckpointError` for what our decoder does not compute."""
    refuse_other_models(plain)
    try:
        return DecoderConfig(
            vocab_size=plain["vocab_size"],
            hidden_size=plain["hidden_size"],
            ffn_hidden_size=plain["intermediate_size"],
            num_layers=plain["num_hidden_layers"],
            num_attention_heads=plain["num_attention_heads"],
            num_kv_heads=plain.get("num_key_value_heads") or plain["num_attention_heads"],
            max_positions=plain.get("max_position_embeddings", 2048),
            rope_theta=float(rope(plain).get("rope_theta", plain.get("rope_theta", 10000.0))),
            norm_eps=plain.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(plain.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]!r}, without which no model can be built.") from None


def rope(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the rotary embedding, wherever this version of transformers keeps them."""
    return plain.get("rope_parameters") or plain.get("rope_scaling") or {}


def refuse_other_models(plain: Mapping[str, Any]) -> None:
    """Say which setting asks for something that `Decoder` does not compute."""
    width = plain.get("hidden_size", 0) // (plain.get("num_attention_heads") or 1)
    rope_type = rope(plain).get("rope_type", rope(plain).get("type", "default"))
    facts = {
        "model_type": (plain.get("model_type", "llama"), "llama"),
        "hidden_act": (plain.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(plain.get("attention_bias", False)), False),
        "mlp_bias": (bool(plain.get("mlp_bias", False)), False),
        "rope_type": (rope_type, "default"),
        "head_dim": (plain.get("head_dim") or width, width or plain.get("head_dim")),
    }
    for name, (have, need) in facts.items():
        if have != need:
            raise CheckpointError(f"config.json says {name}={have!r}; the decoder computes only {name}={need!r}.")
