"""What there is to know of a finished FP8 checkpoint, as plain data: `survey`.

From the file alone: what each weight's codes are like (share at the largest code, share of zeros), its scales, its
outlier channels, the scales of the KV cache by head, the bytes, and the speed that `cost` predicts. With the model that
it was made of: the signal-to-noise ratio of each weight, and what was flushed to zero. With text as well: what passes
through each layer and what the model loses by it (`sensitivity.py`), by the codes of the file. What `fp8 quantize
--budget` measured is read from `config.json` and need not be measured again.

A weight's input channels are its columns: a column whose largest magnitude is many times the median's takes the scale
of every row for itself. Weights pass one at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.fp8_folder import Fp8Folder
from ..checkpoint.layers import linear_layers, skeleton
from ..checkpoint.source import Source
from ..cost import rates
from ..cost.gemm import kind_of
from ..cost.serving import Served, decode_seconds, prompt_seconds
from ..errors import CheckpointError
from ..quantize import Quantized
from ..train.loop import device_of
from .running import run_model
from .sensitivity import OUTLIER, amax_of, decibel, energy, measure
from .text import read_texts, rows_of, tokenizer_for

CONTEXT, PROMPT = 8192, 2048  # tokens of the predictions
UNLIKE = 10.0  # dB: below it a weight is not the source's, rounded
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """The text that a survey runs: as many rows as `samples`, of `length` tokens."""

    texts: tuple[str, ...] = ("moby-dick",)
    samples: int = 4
    length: int = 256
    tokenizer: str | None = None
    device: str = "cpu"


def survey(
    out: str | Path,
    against: str | Path | None = None,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures of a checkpoint, as JSON holds them.

    against    the model that it was made of; None: only what the file tells
    reading    text to measure sensitivity on, for which the model is needed

    Raises `CheckpointError` for folders that cannot be read or do not belong together.
    """
    folder = Fp8Folder.open(out)
    source = None if against is None else Source.open(against)
    if reading is not None and source is None:
        raise CheckpointError("text shows what FP8 changed only beside the model: name it by --against.")
    own = (folder.source.config.get("fp8") or {}).get("quantized") or {}
    weights = [weight_facts(folder, source, name) for name in sorted(folder.layers, key=in_order)]
    budget = dict(own.get("budget") or {})
    stored = budget.pop("sensitivity", None)
    sensitivity = measured(folder, source, reading, progress) if source and reading else stored
    return {
        "checkpoint": folder.source.folder.name, "model_type": folder.source.config.get("model_type"),
        "against": None if source is None else source.folder.name,
        "scheme": own.get("scheme"), "scale_rounding": own.get("weight_scale_rounding"),
        "calibration": own.get("calibration"), "budget": budget or None,
        "bytes": sizes(folder), "speed": {gpu: speed(folder, gpu) for gpu in ("H200", "H100")},
        "weights": weights, "kept": kept(folder), "scales": scale_counts(folder), "kv": kv_scales(folder),
        "sensitivity": sensitivity,
        "sensitivity_from": None if sensitivity is None else "text" if reading else "budget",
        "unlike": [w["name"] for w in weights if w["sqnr"] is not None and w["sqnr"] < UNLIKE],
    }  # fmt: skip


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10.

    >>> sorted(["m.10.w", "m.2.w"], key=in_order)
    ['m.2.w', 'm.10.w']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


# --------------------------------------------------------------------------- weights


def weight_facts(folder: Fp8Folder, source: Source | None, name: str) -> dict[str, Any]:
    """One weight [rows, cols]; `flushed` and `sqnr` need the source."""
    q = folder.weight(name)
    bits, real = q.codes.view(torch.uint8) & 0x7F, q.dequantize()
    columns, scale = amax_of(real), q.scale.double()
    middle = float(columns.median())
    facts: dict[str, Any] = {
        "name": name, "rows": q.shape[0], "cols": q.shape[1],
        "saturated": float((bits == 0x7E).float().mean()), "zeros": float((bits == 0).float().mean()),
        "subnormal": float(((bits > 0) & (bits < 8)).float().mean()),
        "scale_low": float(scale.min()), "scale_high": float(scale.max()),
        "outliers": int((columns > OUTLIER * middle).sum()) if middle else 0,
        "outlier_ratio": float(columns.max()) / middle if middle else 1.0, "flushed": None, "sqnr": None,
    }  # fmt: skip
    return facts if source is None else facts | beside(q, bits, real, source, name)


def beside(q: Quantized, bits: Tensor, real: Tensor, source: Source, name: str) -> dict[str, Any]:
    """What rounding did to a weight."""
    entry = source.entries.get(f"{name}.weight")
    if entry is None or entry.shape != tuple(q.shape):
        shape = "none" if entry is None else list(entry.shape)
        raise CheckpointError(f"{name}.weight is {list(q.shape)} here, and {shape} in {source.folder}: another model.")
    weight = source.read(f"{name}.weight").float()
    flushed = float(((bits == 0) & (weight != 0)).float().mean())
    return {"flushed": flushed, "sqnr": decibel(energy(weight), energy(real - weight))}


def scale_counts(folder: Fp8Folder) -> dict[str, int]:
    """How many scales of weights lie in each binade: exponents, as words, and counts."""
    counts: Counter[int] = Counter()
    for name in folder.layers:
        exponents, many = torch.frexp(folder.scale(name).float())[1].sub(1).unique(return_counts=True)
        counts.update(dict(zip(exponents.tolist(), many.tolist(), strict=True)))
    return {str(exponent): counts[exponent] for exponent in sorted(counts)}


def kv_scales(folder: Fp8Folder) -> list[dict[str, Any]]:
    """The scales of keys and values of each attention module, by head (or one for all)."""
    modules = sorted({name.rpartition(".")[0] for name in folder.kv}, key=in_order)
    found = []
    for module in modules:
        row: dict[str, Any] = {"module": module}
        for kind in ("k", "v"):
            name = f"{module}.{kind}_scale"
            row[kind] = folder.source.read(name).float().flatten().tolist() if name in folder.kv else []
        found.append(row)
    return found


def kept(folder: Fp8Folder) -> list[str]:
    """The linear layers that are not FP8."""
    names = [name for name, _ in linear_layers(folder.source, skeleton(folder.source))]
    return [name for name in names if name not in folder.layers and f"{name}.weight" in folder.source.entries]


# --------------------------------------------------------------------------- bytes and speed


def sizes(folder: Fp8Folder) -> dict[str, int]:
    """Bytes of the file by kind; `bf16`: what all of it would be in BF16."""
    entries = folder.source.entries
    codes = sum(entries[f"{name}.weight"].nbytes for name in folder.layers)
    scales = sum(
        e.nbytes for n, e in entries.items() if n.endswith((folder.groups.scale_name, folder.groups.input_name))
    )
    cache = sum(entries[name].nbytes for name in folder.kv)
    rest = sum(entries[name].nbytes for name in folder.rest)
    return {"codes": codes, "scales": scales, "kv_scales": cache, "rest": rest,
            "total": codes + scales + cache + rest, "bf16": 2 * codes + rest}  # fmt: skip


def speed(folder: Fp8Folder, gpu: str) -> dict[str, Any]:
    """Predicted seconds in FP8 and BF16: a decoded token of one sequence, and the linear layers of a prompt."""
    known, entries = rates(gpu), folder.source.entries
    low = [served(folder, name) for name in folder.layers]
    high = [Served.high(layer.n, layer.k) for layer in low]
    stay = [Served.high(*entries[f"{name}.weight"].shape) for name in kept(folder)]
    rest = read_once(folder) - sum(layer.nbytes for layer in stay)
    cache = kv_bytes(folder.source.config, CONTEXT)
    decode = {
        "fp8": decode_seconds([*low, *stay], rest, cache / (2 if folder.kv else 1), known),
        "bf16": decode_seconds([*high, *stay], rest, cache, known),
    }
    prompt = {name: prompt_seconds([*found, *stay], PROMPT, known) for name, found in (("fp8", low), ("bf16", high))}
    return {"decode": decode, "context": CONTEXT, "prompt": prompt, "prompt_tokens": PROMPT,
            "kv_fp8": bool(folder.kv), "note": known.gpu.note or None}  # fmt: skip


def served(folder: Fp8Folder, name: str) -> Served:
    scheme, (n, k) = folder.layers[name], folder.source.entries[f"{name}.weight"].shape
    nbytes = n * k + 4 * math.prod(scheme.scale_shape(n, k))
    if scheme.inputs == "none":
        return Served(n, k, "bf16", nbytes, False)
    kind = "1x128 128x128" if scheme.block else "tensor" if scheme.inputs == "static" and scheme.per_tensor else "row"
    return Served(n, k, kind_of(kind, scheme.accumulate), nbytes)


def read_once(folder: Fp8Folder) -> int:
    """Bytes of what is not FP8 and is read for every token: all but an input embedding that is not the head too."""
    tied = not any(name.endswith("lm_head.weight") for name in folder.rest)
    names = [n for n in folder.rest if tied or not n.endswith(("embed_tokens.weight", "wte.weight"))]
    return sum(folder.source.entries[name].nbytes for name in names)


def kv_bytes(config: Mapping[str, Any], tokens: int) -> float:
    """Keys and values of a context in BF16; 0 for a model whose config does not tell."""
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if not (heads and layers and hidden):
        return 0.0
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    return 2.0 * 2.0 * tokens * layers * heads * width


# --------------------------------------------------------------------------- with text


def measured(folder: Fp8Folder, source: Source, reading: Reading, progress: Progress | None) -> dict[str, Any]:
    """The sensitivity to the codes of the file."""
    layers = {name: (folder.weight(name), scheme, folder.input_scale(name)) for name, scheme in folder.layers.items()}
    tokenizer = tokenizer_for(source.folder, reading.tokenizer)
    vocabulary = int(source.config.get("vocab_size") or 1 << 62)
    rows = rows_of(read_texts(reading.texts), tokenizer, max(reading.samples, 2), reading.length, vocabulary)
    with run_model(source, str(device_of(reading.device)), None, head=True) as runner:
        return measure(runner.model, source, layers, rows, progress).to_dict()
