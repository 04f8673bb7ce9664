"""One pass over text, and the scales that follow: of the KV cache by head, and of static activations by layer.

The model runs in high precision. K is seen after the rotary embedding and V as projected, where the
model hands them to its cache: whatever a model does before that, this is what a server stores. Inputs of linear layers
are seen in hooks. All are counted exactly (`observers.py`).

Every eighth row of text is held out. It chooses nothing (but, with `auto`, which of four observers is believed); it
tells what share of it the chosen scales would clip, and how much larger than anything in the calibration text its
largest magnitude is. A text that does not represent what will be served shows here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layers import Layers, attention_layers, linear_layers
from ..checkpoint.quantize import Scales
from ..checkpoint.source import Source
from ..errors import ConfigError, DataError
from ..train.loop import device_of
from .observers import OBSERVERS, Magnitudes, choose, one_observer, saturated, scales_of
from .running import Runner, run_model
from .text import digest, read_texts, rows_of, tokenizer_for

SMALLEST = 1e-300
HELD_OUT = 8  # one row in so many
Seen = dict[tuple[str, str], Magnitudes]  # ("key" | "value" | "input", module)


@dataclass(frozen=True)
class Calibration:
    """What to calibrate, and on what. Called with a source and its layers, it gives `Scales`.

    texts        files, `*.jsonl` with a field "text", or `moby-dick`
    kv, inputs   scales of the KV cache by head; of the inputs of FP8 layers
    observer     "max", "percentile" with `percentile`, "mse", "kl", or "auto": whichever errs least on held-out text
    tokenizer    "bytes" or a folder, where the model's is not beside it
    scales       "power_of_two" or "none" (amax / 448)
    """

    texts: tuple[str, ...] = ("moby-dick",)
    kv: bool = True
    inputs: bool = False
    samples: int = 128
    length: int = 256
    observer: str = "max"
    percentile: float = 99.99
    guarded: bool = True  # take a choice back to max where it costs more squared error (`observers.py`)
    tokenizer: str | None = None
    scales: str = "power_of_two"
    device: str = "cpu"  # or auto, cuda, cuda:N
    stream: bool | None = None  # layer by layer from disk; None: where the model does not fit into memory
    progress: Callable[[int, int], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        one_observer(self.observer)
        object.__setattr__(self, "device", str(device_of(self.device)))
        for name, low in (("samples", 2), ("length", 2)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}.")
        if not 50 <= self.percentile <= 100:
            raise ConfigError(f"percentile must be from 50 to 100, not {self.percentile}.")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the scales."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("progress", "stream", "texts")}
        return plain | {"texts": digest(self.texts)}

    def __call__(self, source: Source, layers: Layers) -> Scales:
        """The scales. Raises `DataError`, `CheckpointError`."""
        tokenizer = tokenizer_for(source.folder, self.tokenizer)
        vocabulary = int(source.config.get("vocab_size") or 1 << 62)
        rows = rows_of(read_texts(self.texts), tokenizer, self.samples, self.length, vocabulary)
        chosen, held = split(rows)
        with run_model(source, self.device, self.stream, head=any("head" in name for name in layers.fp8)) as runner:
            if self.kv and not runner.generates:
                raise DataError("this model has no KV cache: go without its scales by --no-kv-cache.")
            total = len(rows)
            seen = watch(runner, source, layers, self, chosen, lambda n: self.tell(n, total))
            check = watch(runner, source, layers, self, held, lambda n: self.tell(len(chosen) + n, total))
        return self.choose(seen, check, chosen.numel(), held.numel())

    def tell(self, done: int, total: int) -> None:
        if self.progress:
            self.progress(done, total)

    def choose(self, seen: Seen, check: Seen, tokens: int, held: int) -> Scales:
        """Scales from what was counted, and what the held-out text says of them."""
        scales, won = self.scales_of(seen, check)
        by_kind: dict[str, dict[str, list[float]]] = {"key": {}, "value": {}, "input": {}}
        for (kind, name), scale in scales.items():
            by_kind[kind][name] = scale.tolist()
        how = {
            "observer": self.observer, **({"percentile": self.percentile} if self.observer == "percentile" else {}),
            "texts": list(self.texts), "tokens": tokens, "held_out_tokens": held,
            "held_out": {kind: verdict(kind, scales, seen, check) for kind in by_kind if by_kind[kind]},
            **({"observers": won} if won else {}),
        }  # fmt: skip
        return Scales({n: s[0] for n, s in by_kind["input"].items()}, by_kind["key"], by_kind["value"], how)

    def scales_of(self, seen: Seen, check: Seen) -> tuple[dict[tuple[str, str], Tensor], dict[str, Any]]:
        """The scales of each place, and with `auto` which observers they come from."""
        if self.observer != "auto":
            how = (self.observer, self.percentile, self.scales, self.guarded)
            return {place: scales_of(counts, *how) for place, counts in seen.items()}, {}
        found = {p: choose(counts, check[p], self.percentile, self.scales) for p, counts in seen.items()}
        kinds = dict.fromkeys(kind for kind, _ in seen)
        won = {kind: winners({name: rest for (k, name), (_, *rest) in found.items() if k == kind}) for kind in kinds}
        return {place: scales for place, (scales, *_) in found.items()}, won


def winners(found: Mapping[str, Any]) -> dict[str, Any]:
    """Which observer won how many groups, where, and its squared error on held-out text as a share of that of `max`.

    found    {module: (the observer of each group, {observer: squared error [groups]})}
    """
    count = Counter(name for names, _ in found.values() for name in names)
    total = {name: float(sum(errors[name].sum() for _, errors in found.values())) for name in OBSERVERS[:-1]}
    chosen = sum(float(errors[n][g]) for names, errors in found.values() for g, n in enumerate(names))
    share = {name: error / max(total["max"], SMALLEST) for name, error in (total | {"auto": chosen}).items()}
    where = {
        module: [[n, share_of(errors, n, g)] for g, n in enumerate(names)] for module, (names, errors) in found.items()
    }
    return {"won": dict(count.most_common()), "error_to_max": share, "where": where}


def share_of(errors: Mapping[str, Tensor], name: str, group: int) -> float:
    return float(errors[name][group]) / max(float(errors["max"][group]), SMALLEST)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to calibrate on, and rows held out: one in eight, and one at least."""
    index = torch.arange(len(rows))
    out = index % HELD_OUT == min(HELD_OUT, len(rows)) - 1
    return rows[~out], rows[out]


def verdict(kind: str, scales: Mapping[tuple[str, str], Tensor], seen: Seen, check: Seen) -> dict[str, Any]:
    """The mean and the largest share of held-out elements that would be clipped, where that is, and by how much its
    largest magnitude exceeds that of the calibration text."""
    clipped = {name: saturated(check[kind, name], s) for (k, name), s in scales.items() if k == kind}
    worst = max(clipped, key=lambda name: float(clipped[name].max()))
    growth = [check[kind, name].amax() / seen[kind, name].amax().clamp(min=1e-38) for name in clipped]
    return {
        "saturated": float(torch.cat(list(clipped.values())).mean()),
        "worst": {"module": worst, "group": int(clipped[worst].argmax()), "saturated": float(clipped[worst].max())},
        "amax_ratio": float(torch.cat(growth).max()),
    }


# --------------------------------------------------------------------------- watching a model


def watch(
    runner: Runner, source: Source, layers: Layers, what: Calibration, rows: Tensor, tell: Callable[[int], None]
) -> Seen:
    """Count what passes while the rows run."""
    seen: Seen = {}
    modules = attention_layers(runner.model)
    names = {module: name for name, module in linear_layers(source, runner.model) if name in set(layers.fp8)}
    with watched_inputs(runner.model, names if what.inputs else {}, seen):
        for first in range(0, len(rows), runner.batch):
            batch = rows[first : first + runner.batch]
            runner.run(batch, (lambda k, v, i: count_kv(seen, modules[i], k, v)) if what.kv else None)
            tell(min(first + runner.batch, len(rows)))
    if what.kv and not any(kind == "key" for kind, _ in seen):
        raise DataError("this model filled no KV cache: go without its scales by --no-kv-cache.")
    return seen


def count_kv(seen: Seen, module: str, keys: Tensor, values: Tensor) -> None:
    """Keys and values [B, KV, T, D], by head."""
    for kind, x in (("key", keys), ("value", values)):
        count(seen, (kind, module), x.transpose(0, 1).flatten(1))


def count(seen: Seen, place: tuple[str, str], x: Tensor) -> None:
    seen.setdefault(place, Magnitudes(len(x))).add(x)


@contextmanager
def watched_inputs(model: nn.Module, names: Mapping[str, str], seen: Seen) -> Iterator[None]:
    """Count the inputs of the modules in `names` (module: name in the file)."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: count(seen, ("input", name), args[0].reshape(1, -1))

    handles = [model.get_submodule(m).register_forward_pre_hook(hook(name)) for m, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
