"""What a `config.json` says of a decoder that can be served: `Architecture`. Nothing here reads a tensor.

    llama, mistral   grouped-query attention with RoPE, SwiGLU, RMS norms
    qwen2            the same with biases on q, k and v
    qwen3            the same with an RMS norm on each head of q and k, and heads of any width
    mixtral          llama's attention; each token goes to the best of several SwiGLUs
    qwen3_moe        qwen3's attention; likewise

A setting that asks for something else than is computed is refused by name: a model that runs and is wrong is the one
failure that nobody sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, suggest
from .rope import Rope

KINDS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class Experts:
    """How tokens are routed.

    count, chosen     experts in all, and for each token
    ffn_hidden_size   of each expert
    normalized        the weights of the chosen sum to 1
    dense_layers      layers that have one SwiGLU instead
    """

    count: int
    chosen: int
    ffn_hidden_size: int
    normalized: bool
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The shape of a served decoder: sizes in elements."""

    kind: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tie_embeddings: bool
    attention_bias: bool = False
    experts: Experts | None = None

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Architecture:
        """The architecture of a `config.json`. Raises `CheckpointError`, naming the setting."""
        kind = plain.get("model_type")
        if kind not in KINDS:
            raise CheckpointError(f"config.json says model_type={kind!r}, which is not served. {suggest(kind, KINDS)}")
        refuse(plain)
        try:
            found = _of(kind, plain)
        except KeyError as error:
            raise CheckpointError(
                f"config.json lacks {error.args[0]!r}, without which no model can be built."
            ) from None
        if found.num_attention_heads % found.num_kv_heads or found.head_dim % 2:
            raise CheckpointError(
                f"config.json says {found.num_attention_heads} heads over {found.num_kv_heads} key heads of "
                f"{found.head_dim} channels; the first is a multiple of the second, and the third is even."
            )
        return found


def _of(kind: str, plain: Mapping[str, Any]) -> Architecture:
    heads = plain["num_attention_heads"]
    return Architecture(
        kind,
        vocab_size=plain["vocab_size"],
        hidden_size=plain["hidden_size"],
        ffn_hidden_size=plain["intermediate_size"],
        num_layers=plain["num_hidden_layers"],
        num_attention_heads=heads,
        num_kv_heads=plain.get("num_key_value_heads") or heads,
        head_dim=plain.get("head_dim") or plain["hidden_size"] // heads,
        max_positions=plain.get("max_position_embeddings", 2048),
        norm_eps=plain.get("rms_norm_eps", 1e-6),
        rope=Rope.of(plain),
        tie_embeddings=bool(plain.get("tie_word_embeddings", False)),
        attention_bias=bool(plain.get("attention_bias", False)),
        experts=_experts(kind, plain),
    )


def _experts(kind: str, plain: Mapping[str, Any]) -> Experts | None:
    if kind == "mixtral":
        return Experts(plain["num_local_experts"], plain["num_experts_per_tok"], plain["intermediate_size"], True)
    if kind != "qwen3_moe":
        return None
    step, dense = plain.get("decoder_sparse_step", 1), set(plain.get("mlp_only_layers") or ())
    dense |= {i for i in range(plain["num_hidden_layers"]) if (i + 1) % step}
    return Experts(
        plain.get("num_experts") or plain["num_local_experts"],
        plain["num_experts_per_tok"],
        plain["moe_intermediate_size"],
        bool(plain.get("norm_topk_prob", False)),
        tuple(sorted(dense)),
    )


def refuse(plain: Mapping[str, Any]) -> None:
    """Say which setting asks for something that is not computed."""
    for name, have, need in _facts(plain):
        if have != need:
            raise CheckpointError(f"config.json says {name}={have!r}; what is served has {name}={need!r}.")


def _facts(plain: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "hidden_act", plain.get("hidden_act", "silu"), "silu"
    yield "mlp_bias", bool(plain.get("mlp_bias", False)), False
    for kind in plain.get("layer_types") or ():
        yield "layer_types", kind, "full_attention"
    window = plain.get("sliding_window")
    if window is not None and plain.get("use_sliding_window", True):
        yield "sliding_window", None if window >= plain.get("max_position_embeddings", 2048) else window, None
