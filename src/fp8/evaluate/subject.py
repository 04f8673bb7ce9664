"""What is judged: a folder, how it is run, and the three things that an evaluation asks of it.

    logits      rows of tokens -> logits, for likelihoods
    go_on       tokens -> the likeliest next tokens, for answers that are generated
    embed       texts -> vectors, of encoders

Two engines run models. **fp8** is the decoder of this library: plain Llama-family folders and FP8 checkpoints
(compressed-tensors), whose codes are multiplied as they are; it needs no transformers. **transformers** runs all the
rest, encoders among them. `auto` takes fp8 where it can, for a model and its FP8 checkpoint then differ in nothing but
the codes.

The types: by default all that is not FP8 runs in FP32 on a CPU, into which BF16 weights go exactly (the stricter
yardstick: the FP8 side is charged with all of the rounding), and in BF16 on a GPU. Base and model run in the same type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import CACHE_DTYPES
from ..checkpoint import end_of_text, load, tokenizer_name
from ..checkpoint.fp8_folder import Fp8Folder
from ..checkpoint.tensorfile import read_json
from ..errors import CheckpointError, ConfigError, Fp8Error, suggest
from ..models import Decoder, stream
from ..models.huggingface import from_config
from ..train.loop import device_of
from ..train.tokenizer import Tokenizer, tokenizer_of
from .schemes import apply_scheme, recipe_of
from .stored_kv import FIXED, STORED, has_scales, round_fixed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = ("auto", "fp8", "transformers")
KV_CACHES = (*FIXED, *CACHE_DTYPES)


@dataclass(frozen=True)
class ModelSpec:
    """A model to judge. Raises `ConfigError` for a setting that is unknown.

    folder      a Hugging Face folder, or a checkpoint of ours
    scheme      what to make of it before it runs (`schemes.py`)
    kv_cache    "stored", the scales of the checkpoint; "scale-1", none; "fp8" (E4M3), "e5m2", a scale a token and head;
                "bf16", "fp32"; None: "stored" where the folder has scales, else in the type of the model
    dtype       "auto", "fp32", "bf16" or "fp16": the type of all that is not quantized
    engine      "auto", "fp8" or "transformers"
    tokenizer   "bytes" or a tokenizer.json; None: the folder's own
    """

    folder: Path
    scheme: str = "none"
    kv_cache: str | None = None
    dtype: str = "auto"
    engine: str = "auto"
    device: str = "auto"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("dtype", ("auto", *DTYPES)), ("engine", ENGINES), ("kv_cache", (None, *KV_CACHES))):
            if getattr(self, name) not in known:
                words = [word for word in known if word]
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}. {suggest(getattr(self, name), words)}")
        if self.scheme != "none":
            recipe_of(self.scheme)
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{self.folder} holds no config.json: name the folder of a model or a checkpoint.")

    @property
    def name(self) -> str:
        """The folder, and what is done to the model: "smollm2 · dynamic · kv fp8"."""
        kv = None if self.kv_cache is None else f"kv {self.kv_cache}"
        return " · ".join(filter(None, [short(self.folder), None if self.scheme == "none" else self.scheme, kv]))

    def resolved(self, encoder: bool = False) -> ModelSpec:
        """With no "auto" left."""
        device = device_of(self.device)
        dtype = self.dtype if self.dtype != "auto" else "fp32" if device.type == "cpu" else "bf16"
        engine = self.engine if self.engine != "auto" else engine_for(self.folder)
        kv = STORED if self.kv_cache is None and not encoder and has_scales(self.folder) else self.kv_cache
        return replace(self, device=str(device), dtype=dtype, engine="transformers" if encoder else engine, kv_cache=kv)

    def fingerprint(self) -> str:
        """Changes when the model could: settings, config.json, the scheme's recipe, weight files' sizes and times."""
        files = sorted(p for p in self.folder.glob("*") if p.suffix in (".safetensors", ".bin"))
        seen = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        own = asdict(self) | {"folder": str(self.folder.resolve())}
        recipe = "" if self.scheme == "none" else recipe_of(self.scheme).to_json()
        config = (self.folder / "config.json").read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([own, seen, recipe, config]).encode()).hexdigest()


def short(folder: Path) -> str:
    """The last part of a path; two where the last says only a type.

    >>> short(Path("models/smollm2/bf16")), short(Path("models/smollm2"))
    ('smollm2/bf16', 'smollm2')
    """
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1].lower() in (*DTYPES, "fp8", "hf", "model") else parts[-1]


def engine_for(folder: Path) -> str:
    """The engine that runs a folder: ours where it can."""
    try:
        from_config(read_json(folder / "config.json"))
    except Fp8Error:
        return "transformers"
    return "fp8" if any(folder.glob("model*.safetensors")) else "transformers"


class Causal(Protocol):
    """A language model, as an evaluation sees it."""

    words: Tokenizer
    about: str
    vocab_size: int
    max_positions: int
    ends: tuple[int, ...]

    def logits(self, rows: Tensor) -> Tensor:
        """`[B, T, V]` for tokens `[B, T]`; a position sees those before it, so padding on the right changes nothing."""
        ...

    def go_on(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        """The likeliest next tokens, one by one, up to the end of the text."""
        ...


class OwnDecoder:
    """A `Decoder` of this library."""

    def __init__(self, spec: ModelSpec) -> None:
        model = load(spec.folder, spec.device)
        frozen = sum(hasattr(module, "quantized_weight") for module in model.modules() if hasattr(module, "codes"))
        if frozen and spec.scheme != "none":
            raise ConfigError(f"{spec.folder} is quantized already: scheme {spec.scheme!r} is for a plain model.")
        self.model: Decoder = model.to(DTYPES[spec.dtype])
        self.about = as_stored(spec, frozen) if frozen else apply_scheme(model, spec.scheme)
        if spec.kv_cache in FIXED:
            round_fixed(model, spec.folder, spec.kv_cache)
        self.words = tokenizer_for(spec)
        self.vocab_size, self.max_positions = model.config.vocab_size, model.config.max_positions
        self.ends = end_of_text(spec.folder) or tuple(filter(None, [self.words.end_of_text]))
        self.device, self.kv_cache = torch.device(spec.device), measured_cache(spec)
        self.plain_cache = "fp32" if spec.dtype == "fp32" else "bf16"

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        cache = None
        if self.kv_cache is not None:
            cache = self.model.new_cache(rows.shape[0], self.kv_cache, capacity=rows.shape[1])
        return self.model(rows.to(self.device), cache)

    def go_on(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        cache = self.kv_cache or self.plain_cache
        given = stream(self.model, tokens, most, end_of_text=self.ends, kv_cache_dtype=cache)
        return (token for token in given if token not in self.ends)


def measured_cache(spec: ModelSpec) -> str | None:
    """The cache that rounds when it stores; None where there is none, or the attention module rounds before it."""
    return None if spec.kv_cache in FIXED else spec.kv_cache


def as_stored(spec: ModelSpec, layers: int) -> str:
    """What is judged of an FP8 checkpoint, in one line, and what is not."""
    scales, used = len(Fp8Folder.open(spec.folder).kv), "used" if spec.kv_cache == STORED else "not used"
    cache = f"; its {scales} scales of the KV cache are {used}" if scales else ""
    return f"{layers} layers of codes as stored{cache}"


def open_causal(spec: ModelSpec) -> Causal:
    """Load a language model. Raises `CheckpointError`, `ConfigError`, and `DataError` for a tokenizer it lacks."""
    spec = spec.resolved()
    if spec.engine == "fp8":
        return OwnDecoder(spec)
    from .transformers_engine import TransformersModel

    return TransformersModel(spec)


def tokenizer_for(spec: ModelSpec) -> Tokenizer:
    """The tokenizer of a folder, or the one asked for."""
    name = spec.tokenizer or tokenizer_name(spec.folder)
    if name is None:
        raise ConfigError(f"{spec.folder} has no tokenizer.json: name one by --tokenizer (a file, or 'bytes').")
    return _read(name)


@lru_cache(maxsize=4)
def _read(tokenizer: str) -> Tokenizer:
    return tokenizer_of(tokenizer)


def described(spec: ModelSpec) -> dict[str, Any]:
    """A spec as JSON holds it."""
    return asdict(spec) | {"folder": str(spec.folder), "name": spec.name}
