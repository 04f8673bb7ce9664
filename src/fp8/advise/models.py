"""From what a user calls a model to its sizes: a name, a Hugging Face config.json, our own configuration or checkpoint.

Only configurations are read, never weights (of a checkpoint of ours the header alone, for the vocabulary), so a model
of any size is planned for in a moment. A plain Hugging Face model keeps q, k and v apart, and gate and up; ours joins
them, and larger products gain more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..cost import Architecture
from ..errors import CheckpointError, ConfigError, suggest
from ..models.llama import DecoderConfig
from ..train import checkpoint
from ..train.config import TrainConfig

# Sizes from the configurations that their makers published.
#         hidden    ffn layers heads kv   vocabulary
LLAMAS: dict[str, tuple[int, ...]] = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "decoder-124m": (768, 2048, 12, 12, 12, 50304),
}
GPT2S: dict[str, tuple[int, int, int]] = {  # hidden, layers, heads
    "gpt2-124m": (768, 12, 12),
    "gpt2-355m": (1024, 24, 16),
    "gpt2-774m": (1280, 36, 20),
    "gpt2-1.5b": (1600, 48, 25),
}
TIED = ("llama-3.2-1b", "llama-3.2-3b")
NAMES = (*LLAMAS, *GPT2S)

# Model types whose blocks are: norm, attention, norm, gated MLP, with rotary positions.
GATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4")


def named(name: str) -> Architecture:
    """A model of the table, in our decoder's layout."""
    if name in GPT2S:
        hidden, layers, heads = GPT2S[name]
        return _gpt2(name, hidden, 4 * hidden, layers, heads, 50257, 1024, joined=True)
    hidden, ffn, layers, heads, kv_heads, vocab = LLAMAS[name]
    return Architecture(name, hidden, ffn, layers, heads, kv_heads, vocab, tied=name in TIED)


def architecture(model: str | Path | Architecture | DecoderConfig) -> Architecture:
    """The sizes of a model.

    model   a name of the table; the path of a config.json (Hugging Face's, or our `DecoderConfig`), of a folder that
            holds one, of a checkpoint or a run of `fp8 train`; or a configuration itself

    Raises `ConfigError`, with the nearest names, for a name that is none, and `CheckpointError` for a file that is no
    configuration or describes something else.
    """
    if isinstance(model, Architecture):
        return model
    if isinstance(model, DecoderConfig):
        return from_decoder(model, "decoder")
    if str(model).lower() in NAMES:
        return named(str(model).lower())
    path = Path(model)
    if not path.exists():
        hint = suggest(str(model).lower(), NAMES)
        raise ConfigError(f"there is no model {str(model)!r}, and no file or folder of that name. {hint}")
    return from_folder(path) if path.is_dir() else from_file(path)


def from_folder(folder: Path) -> Architecture:
    if (folder / "config.json").is_file():
        return from_file(folder / "config.json")
    if (folder / checkpoint.STATE).is_file():
        return from_training(folder)
    if saved := checkpoint.checkpoints(folder):
        return from_training(saved[-1])
    raise CheckpointError(
        f"{folder} holds neither config.json (a Hugging Face model) nor state.json or checkpoints/ (fp8 train)."
    )


def from_file(path: Path) -> Architecture:
    plain = _json(path)
    if "ffn_hidden_size" in plain:
        return from_decoder(DecoderConfig.from_dict(plain), path.stem)
    name = path.parent.name if path.stem == "config" else path.stem
    return from_huggingface(plain, name or path.stem, path)


def from_decoder(config: DecoderConfig, name: str) -> Architecture:
    c = config
    return Architecture(
        name, c.hidden_size, c.ffn_hidden_size, c.num_layers, c.num_attention_heads, c.num_kv_heads, c.vocab_size,
        tied=c.tie_embeddings,
    )  # fmt: skip


def from_training(folder: Path) -> Architecture:
    """A checkpoint of `fp8 train`: sizes from its settings, the vocabulary from the header of its weights."""
    state = _json(folder / checkpoint.STATE)
    settings = TrainConfig.from_dict(state.get("config", {}))
    try:
        with safe_open(folder / checkpoint.MODEL, framework="pt") as tensors:
            vocabulary = tensors.get_slice("embedding.weight").get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the header of {folder / checkpoint.MODEL}: {error}") from None
    sizes: dict[str, Any] = dict(settings.sizes)
    return from_decoder(DecoderConfig(vocab_size=vocabulary, **sizes), folder.name)


def from_huggingface(plain: Mapping[str, Any], name: str, path: Path) -> Architecture:
    """The sizes in a Hugging Face config.json; its projections are apart."""
    kind = plain.get("model_type")
    try:
        if kind == "gpt2":
            hidden = plain["n_embd"]
            inner = plain.get("n_inner") or 4 * hidden
            return _gpt2(name, hidden, inner, plain["n_layer"], plain["n_head"], plain["vocab_size"],
                         plain["n_positions"], joined=True)  # fmt: skip
        if kind in GATED:
            return _llama(plain, name, joined=kind == "phi3")
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]!r}, without which nothing can be planned.") from None
    if kind in EXPERTS or "num_local_experts" in plain or "num_experts" in plain:
        raise CheckpointError(
            f"{path} is a mixture of experts ({kind}): how many rows each expert multiplies depends on the routing, "
            "which is not modelled. fp8.convert(only_if_faster=True, tokens=rows of one expert) decides layer by layer."
        )
    known = ", ".join((*GATED, "gpt2"))
    raise CheckpointError(f"{path} has model_type={kind!r}; modelled are {known}. A DecoderConfig as JSON works too.")


def _llama(plain: Mapping[str, Any], name: str, joined: bool) -> Architecture:
    heads = plain["num_attention_heads"]
    return Architecture(
        name=name,
        hidden=plain["hidden_size"],
        ffn=plain["intermediate_size"],
        layers=plain["num_hidden_layers"],
        heads=heads,
        kv_heads=plain.get("num_key_value_heads") or heads,
        vocab=plain["vocab_size"],
        head_dim=plain.get("head_dim") or 0,
        tied=bool(plain.get("tie_word_embeddings", False)),
        joined=joined,
    )


def _gpt2(name: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int, positions: int, joined: bool) -> Any:
    return Architecture(
        name, hidden, ffn, layers, heads, heads, vocab,
        gated=False, rope=False, tied=True, positions=positions, joined=joined,
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path} holds a {type(plain).__name__}; a model's configuration is a JSON object.")
    return plain
