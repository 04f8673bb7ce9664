"""Which layers stay in BF16 so that a model loses no more than a budget: `Budget`.

The budget is a rise of perplexity in percent, as `fp8 eval` reports it: 0.5 % is log(1.005) = 0.005 nats a token. What
a choice costs is predicted from the groups' KL (`sensitivity.py`), each times one factor, the ratio of what all cost
together to the sum of what each costs alone. Weights and activations count; the KV cache does not.

The choice is greedy. Groups go back to BF16 in the order of impact per byte that this costs, until the rest is within
the budget; then those are taken back into FP8, the most expensive first, that turn out not to be needed. That is a
knapsack's usual approximation: exact choice would move one group at the edge.

Rows of text alternate: every other one chooses, and the ones between, which chose nothing, check. There the model is
measured as it is and as it was chosen: the rise of its loss, with a 95 % interval over blocks of 32 tokens (paired: the
same tokens), and the KL with its own. A prediction is what the arithmetic says; the check is what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.frozen import Layer, by_rows
from ..checkpoint.layers import Layers
from ..checkpoint.quantize import Choice, Options, Scales, TensorScales, kept_dtype, quantize_weight
from ..checkpoint.source import Source
from ..errors import ConfigError
from ..train.loop import device_of
from .running import run_model
from .sensitivity import Group, Sensitivity, divergences, logits_of, measure, placed, put, token_losses
from .text import digest, read_texts, rows_of, tokenizer_for

NORMAL = 1.959964  # of a 95 % interval
BLOCK = 32  # tokens whose rises count as one: those of neighbours are not independent


@dataclass(frozen=True)
class Budget:
    """What may be lost, and the text that decides. Called with a source, its layers, options and scales: a `Choice`.

    percent     the rise of perplexity that is allowed
    texts       as for `Calibration`
    samples     rows that choose; as many more check
    """

    percent: float
    texts: tuple[str, ...] = ("moby-dick",)
    samples: int = 8
    length: int = 256
    tokenizer: str | None = None
    device: str = "cpu"
    progress: Callable[[int, int], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(device_of(self.device)))
        if not 0 < self.percent <= 100:
            raise ConfigError(f"a budget is a rise of perplexity between 0 and 100 %, not {self.percent} %.")
        if self.samples < 2 or self.length < 2:
            raise ConfigError(f"a budget needs 2 rows of 2 tokens, not {self.samples} of {self.length}.")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the choice."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("progress", "texts")}
        return plain | {"texts": digest(self.texts)}

    def __call__(self, source: Source, layers: Layers, options: Options, scales: Scales) -> Choice:
        """Raises `ConfigError` where nothing could be FP8; `DataError`, `CheckpointError` as `measure` does."""
        tokenizer = tokenizer_for(source.folder, self.tokenizer)
        vocabulary = int(source.config.get("vocab_size") or 1 << 62)
        rows = rows_of(read_texts(self.texts), tokenizer, 2 * self.samples, self.length, vocabulary)
        codes = quantized(source, layers, options, scales)
        with run_model(source, self.device, None, head=True) as runner:
            seen = measure(runner.model, source, codes, rows[::2], self.progress)
            nbytes = {g: extra_bytes(g.layers, source, options) for g in seen.groups}
            kept = choose(seen, nbytes, budget_nats(self.percent))
            stays = {name for group in kept for name in group.layers}
            if stays == set(codes):
                raise ConfigError(nothing_left(self.percent, seen))
            left = {name: layer for name, layer in codes.items() if name not in stays}
            check = held_out(runner.model, source, left, rows[1::2], self.percent)
        return Choice(reasons(kept, self.percent), self.told(seen, kept, nbytes, check))

    def told(
        self, seen: Sensitivity, kept: Sequence[Group], nbytes: Mapping[Group, int], check: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What `config.json` says of it."""
        return {
            "percent": self.percent, "texts": list(self.texts), "predicted_percent": predicted(seen, kept),
            "all_in_fp8_percent": predicted(seen, ()), "held_out": dict(check),
            "kept": [{"layers": list(g.layers), "kl": g.kl, "bytes": nbytes[g]} for g in kept],
            "sensitivity": seen.to_dict(),
        }  # fmt: skip


def budget_nats(percent: float) -> float:
    """The rise of the loss, in nats a token, that raises perplexity by so much."""
    return math.log1p(percent / 100)


def percent_of(nats: float) -> float:
    """The rise of perplexity, in percent, that a rise of the loss is."""
    return 100 * math.expm1(nats)


def parse_budget(words: str) -> float:
    """
    >>> parse_budget("0.5%")
    0.5
    """
    try:
        if words.strip().endswith("%"):
            return float(words.strip()[:-1])
    except ValueError:
        pass
    raise ConfigError(f"a budget is a rise of perplexity in percent, such as --budget 0.5%; not {words!r}.")


def choose(seen: Sensitivity, nbytes: Mapping[Group, int], nats: float) -> list[Group]:
    """The groups that stay in high precision, in the order of the model."""
    impact = {group: group.kl * seen.interaction for group in seen.groups}
    left, kept = sum(impact.values()), []
    for group in sorted(seen.groups, key=lambda g: impact[g] / nbytes[g], reverse=True):
        if left <= nats:
            break
        kept.append(group)
        left -= impact[group]
    for group in sorted(kept, key=lambda g: nbytes[g], reverse=True):
        if left + impact[group] <= nats:
            kept.remove(group)
            left += impact[group]
    return [group for group in seen.groups if group in kept]


def predicted(seen: Sensitivity, kept: Sequence[Group]) -> float:
    """The rise of perplexity, in percent, with these groups in high precision."""
    return percent_of(seen.interaction * sum(group.kl for group in seen.groups if group not in kept))


def reasons(kept: Sequence[Group], percent: float) -> dict[str, str]:
    return {
        name: f"for a budget of {percent:g} %: in FP8 {percent_of(group.kl):.3f} % of perplexity"
        for group in kept
        for name in group.layers
    }


def nothing_left(percent: float, seen: Sensitivity) -> str:
    least = min(seen.groups, key=lambda group: group.kl)
    return (
        f"a budget of {percent:g} % leaves no layer in FP8: even {', '.join(least.layers)} alone costs "
        f"{percent_of(least.kl):.2g} % of perplexity. Allow more; all layers together cost {predicted(seen, ()):.2g} %."
    )


def quantized(source: Source, layers: Layers, options: Options, scales: Scales) -> dict[str, Layer]:
    """Each layer as `quantize_folder` will write it."""
    tensor_scales, found = TensorScales(source, layers, options), {}
    for name in layers.fp8:
        scale = tensor_scales.of(name) if options.layout.per_tensor else None
        inputs = torch.tensor([[scales.inputs[name]]]) if options.layout.inputs == "static" else None
        weight = quantize_weight(source.read(f"{name}.weight"), options.layout, scale)
        found[name] = (by_rows(weight), options.layout, inputs)
    return found


def extra_bytes(names: Sequence[str], source: Source, options: Options) -> int:
    """What it costs to keep these layers in high precision."""
    total = 0
    for name in names:
        entry = source.entries[f"{name}.weight"]
        scales = 4 * math.prod(options.layout.scale_shape(*entry.shape))
        total += math.prod(entry.shape) * (kept_dtype(entry.dtype, options.dtype).itemsize - 1) - scales
    return total


# --------------------------------------------------------------------------- the check


@torch.no_grad()
def held_out(
    model: nn.Module, source: Source, layers: Mapping[str, Layer], rows: torch.Tensor, percent: float
) -> dict[str, Any]:
    """The model with these layers in FP8 against itself, on text that chose nothing."""
    places = placed(model, source, layers)
    rises, kl = [], []
    for row in rows.to(next(model.parameters()).device):
        logits = logits_of(model, row)
        with put(model, places, list(places)):
            chosen = logits_of(model, row)
        rises += (token_losses(chosen, row) - token_losses(logits, row)).split(BLOCK)
        kl += divergences(logits, chosen).split(BLOCK)
    loss, by_kl = judged(rises, percent), judged(kl, percent)
    return {"tokens": rows.numel(), **loss, **{f"kl_{key}": value for key, value in by_kl.items()}}


def judged(nats: Sequence[Tensor], percent: float) -> dict[str, Any]:
    """A rise in nats, in blocks of tokens, as percent of perplexity: with its interval, and what that says."""
    mean, half = interval(nats)
    low, high = (percent_of(end) for end in (mean - half, mean + half))
    verdict = "within" if high <= percent else "above" if low > percent else "inconclusive"
    return {"percent": percent_of(mean), "interval": [low, high], "verdict": verdict}


def interval(blocks: Sequence[Tensor]) -> tuple[float, float]:
    """The mean of all numbers, and half of its 95 % interval: normal, of a ratio of sums over blocks."""
    count = sum(map(len, blocks))
    mean = sum(float(block.sum()) for block in blocks) / count
    off = [float(block.sum()) - mean * len(block) for block in blocks]
    variance = sum(value**2 for value in off) * len(blocks) / max(len(blocks) - 1, 1)
    return mean, NORMAL * math.sqrt(variance) / count
