"""Models that Hugging Face's transformers runs: any AutoModelForCausalLM, and encoders (AutoModel). Imported only when
such a model is opened.

An FP8 checkpoint runs as a server runs it, codes times codes (`checkpoint/frozen.py`): transformers itself would decode
its weights and leave activations alone, and so judge another model. The experts of a mixture are decoded all the same.

An FP8 cache is `quantize` and back on what enters the cache: each key (after the rotary embedding) and value is rounded
to BF16, then to codes with one scale a token and head, as in `attention/cache.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import CACHE_DTYPES
from ..checkpoint import frozen_model
from ..checkpoint.fp8_folder import Fp8Folder
from ..checkpoint.tensorfile import read_json
from ..errors import CheckpointError, ConfigError
from ..nn.frozen_linear import FrozenLinear
from ..quantize import quantize
from .schemes import apply_scheme
from .stored_kv import FIXED, round_fixed
from .subject import DTYPES, ModelSpec, as_stored, measured_cache, tokenizer_for

LONGEST = 1 << 20  # where a model names no limit


def transformers() -> Any:
    """The package, or how to get it."""
    try:
        import transformers as package
    except ImportError:
        raise ConfigError(
            "this model runs in the package 'transformers', which is not installed: pip install 'fp8[hf]'."
        ) from None
    package.utils.logging.disable_progress_bar()  # there is one already, `progress.py`
    return package


def read(kind: Any, spec: ModelSpec, **how: Any) -> Any:
    """A model or tokenizer from its folder, never from the network."""
    try:
        return kind.from_pretrained(spec.folder, local_files_only=True, trust_remote_code=False, **how)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {spec.folder}: {error}") from None


def pretrained(kind: Any, spec: ModelSpec) -> tuple[Any, str]:
    """A model for inference, and in one line what it is."""
    if not read_json(spec.folder / "config.json").get("quantization_config"):
        model = read(kind, spec, dtype=DTYPES[spec.dtype]).eval().requires_grad_(False).to(spec.device)
        return model, apply_scheme(model, spec.scheme)
    if spec.scheme != "none":
        raise ConfigError(f"{spec.folder} is quantized already: scheme {spec.scheme!r} is for a plain model.")
    folder = Fp8Folder.open(spec.folder)
    model = frozen_model(folder, DTYPES[spec.dtype]).to(spec.device)
    codes = sum(isinstance(module, FrozenLinear) for module in model.modules())
    decoded = len(folder.layers) - codes  # experts, which transformers keeps as one tensor
    return model, as_stored(spec, codes) + (f"; {decoded} decoded" if decoded else "")


class TransformersModel:
    """A causal language model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.words = tokenizer_for(spec)
        self.model, self.about = pretrained(transformers().AutoModelForCausalLM, spec)
        if spec.kv_cache in FIXED:
            round_fixed(self.model, spec.folder, spec.kv_cache)
        config = self.model.config
        self.vocab_size = config.vocab_size
        self.max_positions = getattr(config, "max_position_embeddings", None) or LONGEST
        end = self.model.generation_config.eos_token_id if self.model.generation_config else config.eos_token_id
        self.ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
        self.device, self.kv_cache = torch.device(spec.device), measured_cache(spec)

    def cache(self) -> Any:
        return new_cache(self.kv_cache)

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        cached = {"use_cache": False} if self.kv_cache is None else {"past_key_values": self.cache()}
        return self.model(rows.to(self.device), **cached).logits

    @torch.no_grad()
    def go_on(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        cache, given = self.cache(), list(tokens)
        for _ in range(min(most, self.max_positions - len(tokens))):
            logits = self.model(torch.tensor([given], device=self.device), past_key_values=cache).logits[0, -1]
            token = int(logits.argmax())
            if token in self.ends:
                return
            yield token
            given = [token]


def new_cache(dtype: str | None) -> Any:
    """An empty cache that rounds what it is given."""
    kind = transformers().DynamicCache
    if dtype is None:
        return kind()

    class Rounding(kind):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **keywords: Any) -> Any:
            return super().update(rounded(keys, dtype), rounded(values, dtype), *args, **keywords)

    return Rounding()


def rounded(x: Tensor, dtype: str) -> Tensor:
    """`x [B, KV, T, D]` as the cache gives it back, in its own type."""
    if (name := CACHE_DTYPES[dtype]) is None:
        return x.to(DTYPES[dtype]).to(x.dtype)
    return quantize(x.to(torch.bfloat16), name, "row").dequantize(x.dtype)


class Encoder:
    """An encoder of sentences: the mean of the last hidden states over the sentence's tokens."""

    def __init__(self, spec: ModelSpec) -> None:
        package = transformers()
        spec = spec.resolved(encoder=True)
        if spec.kv_cache is not None:
            raise ConfigError("an encoder has no KV cache: leave out --kv-cache.")
        self.words = read(package.AutoTokenizer, spec)
        whole, self.about = pretrained(package.AutoModel, spec)
        self.model = whole.base_model  # a checkpoint with codes has its head too
        self.device = torch.device(spec.device)
        limit = getattr(self.model.config, "max_position_embeddings", None) or LONGEST
        self.longest = min(self.words.model_max_length, limit)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """`[B, D]` in FP32, of length 1."""
        self.words.pad_token = self.words.pad_token or self.words.eos_token
        given = self.words(list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        given = given.to(self.device)
        hidden = self.model(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
