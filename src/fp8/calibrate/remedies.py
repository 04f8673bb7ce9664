"""What is done about outliers before a model is quantized, and whether it helped: `Remedies`.

    rotate    R1 and R2 (`folding.py`)                  smooth    migration, alpha by group (`smoothing.py`)
    both      a rotation, then migration of what it left
    auto      of none, rotate, smooth and both, what helps on held-out text, and none where nothing does

Every remedy is judged on text that it was not chosen on: the rows that calibration holds out, run with each weight
and each input of an FP8 layer rounded to its codes. `auto` takes the remedy with the lowest loss, and only if its 95 %
interval against the plain FP8 model, paired by rows, lies below zero; of fewer than eight rows none is made. What was
measured goes into `config.json`:

    nats    loss a token of the model in high precision, of plain FP8 ("none"), and of FP8 behind each remedy
    gain    by how much each remedy lowers the loss of "none", and half the width of the 95 % interval of that

The rounded model is not the served one to the bit: products are summed in FP32, keys and values are not rounded, and a
static scale is measured on each batch. It compares remedies; `fp8 eval` judges what was written.

The exponents of a migration are too many for `config.json` and are written beside it (`RECORD`), so that `fp8 verify`
makes the changed model again from the original and compares codes in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.layers import Layers, choose_layers, linear_layers, skeleton
from ..checkpoint.quantize import Options, TensorScales
from ..checkpoint.source import Source
from ..checkpoint.tensorfile import read_json
from ..errors import ConfigError, suggest
from .calibration import Calibration, split
from .folding import Anatomy, migrations, remedied
from .running import Runner, run_model
from .smoothing import rounded_input, rounded_weight, searched
from .text import digest, read_texts, rows_of, tokenizer_for

METHODS = ("none", "rotate", "smooth", "both", "auto")
RECORD = "fp8-outliers.json"  # beside config.json
ROWS = 256  # rows of each layer's input on which alpha is searched
Z, FEWEST = 1.96, 8  # of a 95 % interval, and the rows that it needs


@dataclass(frozen=True)
class Remedies:
    """What to do about outliers, for weights that become FP8 as `options` says, on the text of a calibration."""

    method: str
    options: Options
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"outliers cannot be {self.method!r}. {suggest(self.method, METHODS)}")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be from 0 to below 2^64, not {self.seed}.")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result; the options and the rest of a calibration are facts of their own."""
        given = self.calibration
        text = {"texts": digest(given.texts), "samples": given.samples, "length": given.length}
        return {"method": self.method, "seed": self.seed, "tokenizer": given.tokenizer, "device": given.device} | text

    def find(self, source: Source, layers: Layers) -> dict[str, Any]:
        """`{"rotation": seed or None, "migration": {maker: exponents} or None, "told": what was measured}`.

        Raises `CheckpointError` for a model that is not understood, `DataError` for its text.
        """
        Anatomy.of(source)
        given = self.calibration
        tokenizer = tokenizer_for(source.folder, given.tokenizer)
        vocabulary = int(source.config.get("vocab_size") or 1 << 62)
        chosen, held = split(rows_of(read_texts(given.texts), tokenizer, given.samples, given.length, vocabulary))
        found: dict[str, dict[str, Any]] = {"none": {"rotation": None, "migration": None, "groups": {}}}
        for name in (self.method,) if self.method != "auto" else ("rotate", "smooth", "both"):
            found[name] = self.one(name, source, chosen)
        nats = {name: self.nats(rounded(remedied(source, one), self.options), held) for name, one in found.items()}
        name = self.method if self.method != "auto" else helpful(nats)
        told = self.told(name, source, found[name], nats, self.nats(source, held))
        return {k: found[name][k] for k in ("rotation", "migration")} | {
            "told": told | {"held_out_tokens": held.numel()}
        }

    def apply(self, source: Source, found: Mapping[str, Any]) -> Source:
        return remedied(source, found)

    @property
    def record(self) -> str:
        """The file beside `config.json` that holds what `apply` needs."""
        return RECORD

    def one(self, name: str, source: Source, rows: Tensor) -> dict[str, Any]:
        """A remedy, found on rows of text."""
        rotation = self.seed if name in ("rotate", "both") else None
        out: dict[str, Any] = {"rotation": rotation, "migration": None, "groups": {}}
        if name in ("smooth", "both"):
            out["migration"], out["groups"] = self.migration(remedied(source, out), rows)
        return out

    def told(
        self, name: str, source: Source, one: Mapping[str, Any], nats: Mapping[str, Tensor], high: Tensor
    ) -> dict[str, Any]:
        """What was measured, as `config.json` keeps it."""
        loss = {"high precision": high, **nats}
        gains = {n: gain(nats["none"], each) for n, each in nats.items() if n != "none"}
        alphas = [group["alpha"] for group in one["groups"].values()]
        return {
            "asked": self.method, "applied": name, "seed": self.seed,
            "nats": {n: float(each.mean()) for n, each in loss.items()},
            "gain": {n: {"mean": mean, "half_width": half} for n, (mean, half) in gains.items()},
            "alpha": {str(alpha): alphas.count(alpha) for alpha in sorted(set(alphas), key=str)},
            "head": "untied" if one["rotation"] is not None and "lm_head.weight" not in source.entries else "as it was",
        }  # fmt: skip

    # ----------------------------------------------------------------------- running the model

    def nats(self, source: Source, rows: Tensor) -> Tensor:
        """The mean loss a token of each row, FP64 [rows]."""
        scheme = self.options.layout
        with run_model(source, self.calibration.device, self.calibration.stream, head=True) as runner:
            layers = source.layers if isinstance(source, Rounded) else ()
            modules = {m: name for name, m in linear_layers(source, runner.model) if name in layers}
            with hooked(runner.model, modules, lambda name, x: rounded_like(x, scheme)), torch.no_grad():
                return torch.cat([losses(runner, part) for part in rows.split(runner.batch)])

    def migration(self, source: Source, rows: Tensor) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """`({maker: exponents}, {maker: what was measured})`, alpha searched for each group of layers."""
        groups = {one.takers[0]: one for one in migrations(source)}
        seen = {name: Inputs(-(-len(rows) // 8)) for name in groups}
        with run_model(source, self.calibration.device, self.calibration.stream, head=False) as runner:
            modules = {m: name for name, m in linear_layers(source, runner.model) if name in groups}
            with hooked(runner.model, modules, lambda name, x: seen[name].add(x)):
                for part in rows.split(runner.batch):
                    runner.run(part, None)
        moves, told = {}, {}
        for name, one in groups.items():
            weights = [source.read(f"{taker}.weight").float() for taker in one.takers]
            move, told[one.maker] = searched(
                seen[name].rows(), weights, self.options.layout, seen[name].amax, one.gather, one.spread
            )
            moves[one.maker] = move.tolist()
        return moves, told


def helpful(nats: Mapping[str, Tensor]) -> str:
    """The remedy of the lowest loss, if it is lower than that of none by more than chance."""
    name = min(nats, key=lambda n: float(nats[n].mean()))
    mean, half = gain(nats["none"], nats[name])
    return name if half is not None and mean > half else "none"


def gain(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """By how much a loss fell, and half the width of its 95 % interval, paired by rows."""
    difference = before - after
    half = Z * float(difference.std()) / len(difference) ** 0.5 if len(difference) >= FEWEST else None
    return float(difference.mean()), half


def losses(runner: Runner, rows: Tensor) -> Tensor:
    rows = rows.to(runner.device)
    logits = runner.inner(input_ids=rows).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double().mean(1).cpu()


def rounded_like(x: Tensor, scheme: Any) -> Tensor:
    return rounded_input(x.reshape(-1, x.shape[-1]), scheme).to(x.dtype).view(x.shape)


@contextmanager
def hooked(model: nn.Module, modules: Mapping[str, str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show the input of each module (module: name) to `see`, and put what it returns in its place."""

    def hook(name: str) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            new = see(name, args[0])
            return None if new is None else (new, *args[1:])

        return before

    handles = [model.get_submodule(m).register_forward_pre_hook(hook(name)) for m, name in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Inputs:
    """The largest magnitude of each channel of a layer's input, and some rows of it, evenly spread."""

    def __init__(self, batches: int) -> None:
        self.amax = torch.zeros(())
        self.each = max(ROWS // max(batches, 1), 1)
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.amax = torch.maximum(self.amax, rows.abs().amax(0).cpu())
        self.parts.append(rows[:: max(len(rows) // self.each, 1)][: self.each].cpu())

    def rows(self) -> Tensor:
        return torch.cat(self.parts)


# --------------------------------------------------------------------------- views


@dataclass(frozen=True)
class Rounded(Source):
    """A source whose FP8 layers' weights are, in FP32, what their codes say."""

    inner: Source = field(kw_only=True)
    layers: frozenset[str] = field(kw_only=True)
    options: Options = field(kw_only=True)
    scales: TensorScales = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        tensor, layer = self.inner.read(name), name.removesuffix(".weight")
        if layer not in self.layers or layer == name:
            return tensor
        scheme = self.options.layout
        return rounded_weight(tensor, scheme, self.scales.of(layer) if scheme.per_tensor else None)


def rounded(source: Source, options: Options) -> Rounded:
    """The layers that these options make FP8, rounded."""
    layers = choose_layers(source, skeleton(source), options.skip, options.head)
    plain = (source.folder, source.config, source.entries)
    scales = TensorScales(source, layers, options)
    return Rounded(*plain, inner=source, layers=frozenset(layers.fp8), options=options, scales=scales)


def as_written(source: Source, out: Path) -> Source:
    """The source as an FP8 checkpoint's own record says that it was changed, for `fp8 verify`."""
    told = (read_json(out / "config.json").get("fp8") or {}).get("quantized") or {}
    if not told.get("outliers"):
        return source
    return remedied(source, read_json(out / RECORD))


def recorded(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `RECORD` holds."""
    return {key: found[key] for key in ("rotation", "migration")}
