"""Is a checkpoint what its source, quantized, is? `verify` answers in bytes.

    codes            the codes and scales in the file are those that quantizing the source again gives; codes that
                     were chosen with compensation are those whose digests were noted when they were, see below
    rest             what stayed in high precision is the source's, in the type that the file says
    transformers     real transformers decodes the same weights from the file
    logits           the model quantized in memory and the one read from the file give equal logits, bit for bit
    perplexity       of the source, of the model quantized in memory, and of the one read; the last two are equal

The last two run on the CPU with the definition of FP8 arithmetic, so they need no GPU and are the same everywhere. A
decoder trained here is compared with its own codes, which the file must hold: nothing is quantized a second time.

**With compensation** (`fp8 quantize --compensate`) codes follow from the source and from the text's statistics, which
are not kept. Then `codes` proves that scales are the source's, in bytes, and that every code is the one that was
chosen, by a digest of each layer's in `config.json`; it tells how many are not the nearest, and how much farther from
the source's the weights are for it: about as far, and many times where the source is another. That the choice was right
is proved by making it again: the same command gives the same bytes. Logits and perplexity are held against a model in
memory that has the source's scales and the file's codes.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Fp8Error
from ..models.llama import Decoder
from ..quantize import Quantized
from .decisions import code_digest
from .export import encode
from .fp8_folder import Fp8Folder
from .frozen import Layer, assembled, by_rows, frozen_model, outputs
from .layers import Layers, linear_layers, need_transformers
from .load import build, groups_of, load
from .quantize import Options, TensorScales, kept_dtype, quantize_weight, with_scales
from .source import Source


@dataclass(frozen=True)
class Check:
    """One question and its answer; `passed` is None where it could not be asked."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verdict:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return asdict(self) | {"passed": self.passed}


def verify(
    out: str | Path,
    against: str | Path | Source | Decoder,
    prompts: Tensor | None = None,
    text: Tensor | None = None,
    transformers: bool = True,
) -> Verdict:
    """Hold an FP8 checkpoint against the model that it was made of.

    against        a Hugging Face folder in high precision, a source with changes, or a decoder trained or loaded here
    prompts        tokens [n, T] whose logits must be equal; None: not asked
    text           tokens [n, T] for perplexity; None: not asked
    transformers   also load it with transformers, where that and compressed-tensors are installed

    Raises `CheckpointError` for a folder that cannot be read.
    """
    folder = Fp8Folder.open(out)
    if isinstance(against, Decoder):
        return Verdict(tuple(_decoder_checks(folder, against, prompts)))
    source = against if isinstance(against, Source) else Source.open(against)
    return Verdict(tuple(_checks(folder, source, prompts, text, transformers)))


def _checks(
    folder: Fp8Folder, source: Source, prompts: Tensor | None, text: Tensor | None, ask: bool
) -> Iterator[Check]:
    again = Again(folder, source)
    codes = asked("codes", lambda: same_codes(folder, again))
    rest = asked("rest", lambda: same_rest(folder, again))
    yield codes
    yield rest
    yield asked("transformers", lambda: same_in_transformers(folder)) if ask else _not_asked("transformers")
    if prompts is None and text is None:
        yield _not_asked("logits")
        return
    if again.missing or codes.passed is None:
        yield Check("logits", False, "the source lacks layers that the file has")
        return
    read, evaluated = frozen_model(folder), again.model()
    if prompts is not None:
        yield same_logits(outputs(evaluated, prompts), outputs(read, prompts))
    if text is not None:
        yield perplexities(source, evaluated, read, text)


def asked(name: str, question: Callable[[], Check]) -> Check:
    """A check; what cannot even be read has failed."""
    try:
        return question()
    except Fp8Error as error:
        return Check(name, False, str(error))


def _not_asked(name: str) -> Check:
    return Check(name, None, "not asked")


# --------------------------------------------------------------------------- the source, quantized again


class Again:
    """The source's layers, quantized as the file says that its were."""

    def __init__(self, folder: Fp8Folder, source: Source) -> None:
        told = (folder.source.config.get("fp8") or {}).get("quantized") or {}
        self.folder, self.source = folder, source
        self.options = Options(scales=told.get("weight_scale_rounding", "none"), dtype=told.get("kept_dtype", "auto"))
        self.digests: dict[str, str] = (told.get("compensation") or {}).get("codes") or {}
        self.missing = [name for name in folder.layers if f"{name}.weight" not in source.entries]
        self.scales = TensorScales(source, Layers(tuple(folder.layers), {}), self.options)

    def weight(self, name: str) -> Quantized:
        scheme = self.folder.layers[name]
        tensor = self.source.read(f"{name}.weight")
        return quantize_weight(
            tensor, with_scales(scheme, self.options.scales), self.scales.of(name) if scheme.per_tensor else None
        )

    def evaluated(self, name: str) -> Quantized:
        """As it was evaluated: with the codes that were chosen with compensation, where the file notes such."""
        q = self.weight(name)
        if name not in self.digests:
            return q
        return Quantized(self.folder.source.read(f"{name}.weight"), q.scale, q.tile, q.format)

    def rest(self) -> dict[str, Tensor]:
        fp8 = {f"{name}.weight" for name in self.folder.layers}
        return {n: self.source.read(n).to(self.kept(n)) for n in self.source.entries if n not in fp8}

    def kept(self, name: str) -> torch.dtype:
        there = self.folder.source.entries.get(name)
        return there.dtype if there is not None else kept_dtype(self.source.entries[name].dtype, self.options.dtype)

    def model(self) -> nn.Module:
        """The model that was evaluated: quantized in memory, with the calibrated scales that belong to it."""
        layers: dict[str, Layer] = {}
        for name, scheme in self.folder.layers.items():
            layers[name] = (by_rows(self.evaluated(name)), scheme, self.folder.input_scale(name))
        return assembled(self.source, layers, self.rest(), self.folder.source.dtype)


def same_codes(folder: Fp8Folder, again: Again) -> Check:
    """Codes and scales, in bytes."""
    if again.missing:
        return Check("codes", False, f"the source has no {again.missing[0]}.weight")
    codes = scales = count = 0
    worst: list[str] = []
    moved = Moved()
    for name in folder.layers:
        q, stored = again.weight(name), folder.source.read(f"{name}.weight")
        if stored.shape != q.codes.shape:
            return Check("codes", False, f"{name}.weight is {list(stored.shape)}, in the source {list(q.codes.shape)}")
        different = int((stored.view(torch.uint8) != q.codes.view(torch.uint8)).sum())
        if name in again.digests:
            moved.add(again.source.read(f"{name}.weight"), q, stored, different)
            different = 0 if code_digest(stored) == again.digests[name] else different
        scale = folder.scale(name)
        equal = scale.dtype == torch.float32 and torch.equal(scale.flatten(), q.scale.flatten())
        codes, count, scales = codes + different, count + stored.numel(), scales + (not equal)
        worst += [name] if different or not equal else []
    detail = f"{len(folder.layers)} layers, {count:,} codes: {codes:,} codes and the scales of {scales} layers differ"
    return Check("codes", not worst, detail + (f"; first in {worst[0]}" if worst else "") + str(moved))


class Moved:
    """How far compensation has moved weights from the source's, beside rounding to nearest."""

    def __init__(self) -> None:
        self.layers = self.codes = self.count = 0
        self.nearest = self.chosen = 0.0

    def add(self, weight: Tensor, q: Quantized, stored: Tensor, different: int) -> None:
        self.layers, self.codes, self.count = self.layers + 1, self.codes + different, self.count + stored.numel()
        chosen = Quantized(stored, q.scale, q.tile, q.format)
        self.nearest, self.chosen = (
            total + float((weight.double() - one.dequantize(torch.float32)).square().sum())
            for total, one in ((self.nearest, q), (self.chosen, chosen))
        )

    def __str__(self) -> str:
        if not self.layers:
            return ""
        farther = (self.chosen / self.nearest) ** 0.5 if self.nearest else 1.0
        return (
            f"; {self.layers} layers were rounded with compensation and are held to their digests: of their codes "
            f"{self.codes / self.count:.1%} are not the nearest, their weights {farther:.2f} times as far off"
        )


def same_rest(folder: Fp8Folder, again: Again) -> Check:
    """What is not FP8."""
    names = [name for name in again.source.entries if name.removesuffix(".weight") not in folder.layers]
    wrong = [name for name in names if not _same_tensor(folder, again, name)]
    extra = sorted(set(folder.rest) - set(again.source.entries))
    detail = f"{len(names)} tensors: {len(wrong)} differ, {len(extra)} are not in the source"
    return Check("rest", not wrong and not extra, detail + (f"; first {(wrong + extra)[0]}" if wrong or extra else ""))


def _same_tensor(folder: Fp8Folder, again: Again, name: str) -> bool:
    if name not in folder.source.entries:
        return False
    stored = folder.source.read(name)
    return same_bytes(stored, again.source.read(name).to(stored.dtype))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


# --------------------------------------------------------------------------- models


def same_in_transformers(folder: Fp8Folder) -> Check:
    """The weights that transformers decodes from the file, in FP32."""
    try:
        theirs = decoded_by_transformers(folder)
    except ImportError as error:
        return Check("transformers", None, f"not asked: {str(error).splitlines()[0]}")
    wrong = [n for n, weight in theirs.items() if not torch.equal(weight, folder.weight(n).dequantize(weight.dtype))]
    detail = f"{len(theirs)} weights decoded: {len(wrong)} differ" + (f"; first {wrong[0]}" if wrong else "")
    return Check("transformers", not wrong, detail)


def decoded_by_transformers(folder: Fp8Folder) -> Mapping[str, Tensor]:
    """By the names of the files. Raises `ImportError` where a package is missing."""
    transformers = need_transformers()
    importlib.import_module("accelerate" if folder.groups.parts else "compressed_tensors")
    settings = dict(folder.source.config["quantization_config"]) | {"dequantize": True}
    settings.pop("quant_method")
    wanted = transformers.CompressedTensorsConfig if not folder.groups.parts else transformers.FineGrainedFP8Config
    kind = getattr(transformers, folder.source.config["architectures"][0])
    with silent(transformers):
        model = kind.from_pretrained(folder.source.folder, dtype=torch.float32, quantization_config=wanted(**settings))
    modules = dict(linear_layers(folder.source, model))
    there = {name for name, _ in model.named_modules()}
    return {
        name: model.get_submodule(modules[name]).weight.detach() for name in folder.layers if modules[name] in there
    }


@contextmanager
def silent(transformers: Any) -> Iterator[None]:
    """Without its bars, and its reports of scales that it has no use for."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)


def same_logits(evaluated: Tensor, read: Tensor) -> Check:
    different = int((evaluated != read).sum())
    largest = float((evaluated.float() - read.float()).abs().max())
    detail = f"{evaluated.shape[0]} prompts, {evaluated.numel():,} numbers: {different:,} differ"
    return Check("logits", different == 0, detail + (f", by up to {largest:.3g}" if different else ""))


def perplexities(source: Source, evaluated: nn.Module, read: nn.Module, text: Tensor) -> Check:
    """Of the source, of what was evaluated, of what was read."""
    if not getattr(read, "can_generate", lambda: False)():
        return Check("perplexity", None, "not asked: this model predicts no next token")
    tensors = {name: source.read(name) for name in source.entries}
    high, then, now = (perplexity(m, text) for m in (assembled(source, {}, tensors, source.dtype), evaluated, read))
    tokens = text[:, 1:].numel()
    detail = (
        f"{tokens} tokens: source {high:.4f}, quantized {then:.4f} ({100 * (then / high - 1):+.2f} %), read {now:.4f}"
    )
    return Check("perplexity", then == now, detail)


def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Of each row's tokens after its first, `[n, T]`."""
    losses = [F.cross_entropy(outputs(model, row[None])[0, :-1].float(), row[1:]) for row in rows]
    return math.exp(float(torch.stack(losses).double().mean()))


# --------------------------------------------------------------------------- our own decoder


def _decoder_checks(folder: Fp8Folder, model: Decoder, prompts: Tensor | None) -> Iterator[Check]:
    """The file holds the decoder's own codes, and gives its logits."""
    config = folder.source.config
    dtype = getattr(torch, config.get("torch_dtype", "bfloat16"))
    tensors, plain = encode(model, dtype)
    wrong = [
        n for n, t in tensors.items() if n not in folder.source.entries or not same_bytes(t, folder.source.read(n))
    ]
    extra = sorted(set(folder.source.entries) - set(tensors) - set(folder.kv))
    detail = f"{len(tensors)} tensors of the decoder: {len(wrong)} differ, {len(extra)} are not its own"
    yield Check("codes", not wrong and not extra, detail + (f"; first {(wrong + extra)[0]}" if wrong + extra else ""))
    if prompts is None or wrong:
        yield _not_asked("logits")
        return
    evaluated = build(model.config, dict(tensors), groups_of(plain)).eval()
    with torch.no_grad():
        yield same_logits(evaluated(prompts), load(folder.source.folder)(prompts))


def table(checks: Sequence[Check]) -> Any:
    """The checks for a terminal."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("check", "", "what was found"):
        out.add_column(head)
    words = {True: "[green]equal[/]", False: "[bold red]NOT EQUAL[/]", None: "[dim]not asked[/]"}
    for check in checks:
        out.add_row(check.name, words[check.passed], check.detail)
    return out
