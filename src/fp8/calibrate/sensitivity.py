"""What each layer of a model loses in FP8, and what the model loses by it.

Of each layer, while text passes: the signal-to-noise ratio of its weight and of its input, the relative error of its
output, and what its input's channels are like. Of each *group*, the layers that servers fuse and that therefore stay
or go together (q, k and v; gate and up), the loss impact, in nats a token, in two ways:

    KL       KL(p || q) of the next-token distributions, p of the model as it is, q with that group alone in FP8, over
             the whole vocabulary. Measured: a forward pass for each group. What precedes the group's block is not
             computed again, for it is the same.
    Fisher   1/2 sum_i (g_i d_i)^2 a token: d = y_fp8 - y, the error of a layer's output on the same input, and g the
             gradient by y of the loss on tokens drawn from p. Estimated: one backward pass for all groups.

The second is the first's expansion: to second order KL = 1/2 d' F d, where F = E[g g'] for labels from the model's own
distribution, of which the diagonal is kept (BRECQ, Li et al. 2021, eq. 10; NVIDIA's auto_quantize sums (g d)^2 with the
text's labels and without the 1/2). It leaves out that errors of one layer correlate, and the noise of one draw. Where
one can afford the first it decides, and the second shows whether it would have done.

Why KL and not the loss: both are the same in expectation where the model is right about the text, but the loss of a few
thousand tokens varies by more than a layer costs, in both directions; KL never goes below zero and varies little.

Impacts are added up elsewhere (`budget.py`), so all groups are measured together too: the ratio of the two shows how
far adding goes wrong.

Not here: models that do not fit into memory (a backward pass needs all of it), and the experts of a mixture, which
transformers keeps as one tensor: they are listed as not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.frozen import Layer, frozen
from ..checkpoint.layers import fused_group, linear_layers
from ..checkpoint.source import Source
from ..errors import CheckpointError, DataError
from ..nn.frozen_linear import FrozenLinear
from .running import repeated

OUTLIER = 20.0  # times the median channel
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerError:
    """One layer. Ratios in dB (None: nothing is rounded, or nothing was seen); `output_error` is ||d|| / ||y||.

    `saturated`, `flushed`: shares of input elements at the largest code, and that became zero without being zero.
    `outliers`: input channels whose largest magnitude exceeds 20 times the median channel's; `outlier_ratio`: the
    largest over the median.
    """

    name: str
    weight_sqnr: float | None
    input_sqnr: float | None
    output_error: float
    saturated: float
    flushed: float
    outliers: int
    outlier_ratio: float
    fisher: float


@dataclass(frozen=True)
class Group:
    """Layers that stay together, their impact in nats a token, and their elements."""

    layers: tuple[str, ...]
    kl: float
    fisher: float
    elements: int


@dataclass(frozen=True)
class Sensitivity:
    """All of it. `together`: KL with every group in FP8. `loss`: of the model as it is, nats a token."""

    tokens: int
    loss: float
    together: float
    layers: tuple[LayerError, ...]
    groups: tuple[Group, ...]
    not_measured: tuple[str, ...] = ()

    @property
    def interaction(self) -> float:
        """KL together over the sum of the groups' own."""
        total = sum(group.kl for group in self.groups)
        return self.together / total if total > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return asdict(self) | {"interaction": self.interaction}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Sensitivity:
        layers = tuple(LayerError(**row) for row in plain["layers"])
        groups = tuple(Group(**row | {"layers": tuple(row["layers"])}) for row in plain["groups"])
        rest = tuple(plain["not_measured"])
        return Sensitivity(plain["tokens"], plain["loss"], plain["together"], layers, groups, rest)


def measure(
    model: nn.Module, source: Source, layers: Mapping[str, Layer], rows: Tensor, progress: Progress | None = None
) -> Sensitivity:
    """The sensitivity of a model in high precision to FP8 layers that stand ready.

    model    in memory, in evaluation mode, with an output of logits
    layers   weight, scheme and calibrated input scale of each, by the names of the files
    rows     tokens [n, T]

    Raises `DataError` for a model without logits or too large, `CheckpointError` where no layer can be put in.
    """
    refuse_unfit(model)
    places = placed(model, source, layers)
    groups = grouped(places)
    sums, watched = Sums(groups), {name: Watched() for name in places}
    for index, row in enumerate(rows.to(next(model.parameters()).device)):
        replay = Replay(model)
        with torch.no_grad(), replay.recording():
            logits = logits_of(model, row)
        sums.count(logits, row)
        backward(model, row, drawn(logits, index), places, watched)
        for at, group in enumerate(groups):
            with torch.no_grad(), put(model, places, group), replay.before([places[n].module for n in group]):
                sums.kl[group] += divergence(logits, logits_of(model, row))
            if progress:
                progress(index * len(groups) + at + 1, len(rows) * len(groups))
        with torch.no_grad(), put(model, places, list(places)):
            sums.together += divergence(logits, logits_of(model, row))
    return sums.result(places, watched, tuple(name for name in layers if name not in places))


# --------------------------------------------------------------------------- the model and its parts


@dataclass(frozen=True)
class Place:
    """A layer's module in the model, that module, and what stands in its place in FP8."""

    module: str
    linear: nn.Linear
    frozen: FrozenLinear


def refuse_unfit(model: nn.Module) -> None:
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        raise DataError(
            "this model does not predict each next token: what its loss is sensitive to cannot be measured."
        )
    if any(p.is_meta for p in model.parameters()):
        raise DataError(
            "sensitivity needs the whole model in memory (a backward pass runs through it), and this one does not fit: "
            "use a machine with more, or choose what stays by --skip."
        )


def placed(model: nn.Module, source: Source, layers: Mapping[str, Layer]) -> dict[str, Place]:
    """The layers that the model has as linear modules."""
    found = {}
    there = dict(model.named_modules())
    for name, module in linear_layers(source, model):
        if name in layers and isinstance(linear := there.get(module), nn.Linear):
            found[name] = Place(module, linear, frozen(linear, name, layers[name]).to(linear.weight.device))
    if not found:
        raise CheckpointError("no layer of this model can be measured: none of them is a linear module.")
    return found


def grouped(names: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The layers by what servers fuse, in the order of the model."""
    return list(dict.fromkeys(tuple(n for n in fused_group(name) if n in names) for name in names))


@contextmanager
def put(model: nn.Module, places: Mapping[str, Place], names: Sequence[str]) -> Iterator[None]:
    """These layers in FP8 for as long as the context lasts."""
    try:
        for name in names:
            replace(model, places[name].module, places[name].frozen)
        yield
    finally:
        for name in names:
            replace(model, places[name].module, places[name].linear)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class Replay:
    """What each block gave, so that blocks before a change need not run again. Where a model passes one block twice,
    or has no list of blocks, all of it runs."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = repeated(model) if any(isinstance(m, nn.ModuleList) for m in model.modules()) else []
        self.given: list[Any] = [None] * len(self.blocks)
        self.once = True

    @contextmanager
    def recording(self) -> Iterator[None]:
        def keep(at: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: Any, out: Any) -> None:
                self.once = self.once and self.given[at] is None
                self.given[at] = out

            return hook

        handles = [block.register_forward_hook(keep(at)) for at, (_, block) in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def before(self, modules: Sequence[str]) -> Iterator[None]:
        """Blocks before the first that holds one of these modules give what they gave."""
        first = next((at for at, (name, _) in enumerate(self.blocks) if modules[0].startswith(name + ".")), 0)
        with ExitStack() as stack:
            for at in range(first if self.once else 0):
                stack.enter_context(giving(self.blocks[at][1], self.given[at]))
            yield


@contextmanager
def giving(block: Any, out: Any) -> Iterator[None]:
    """A block that computes nothing."""
    block.forward = lambda *args, **named: out
    try:
        yield
    finally:
        del block.forward


# --------------------------------------------------------------------------- what is measured


def logits_of(model: nn.Module, row: Tensor) -> Tensor:
    """`[T, V]` for tokens `[T]`."""
    return model(input_ids=row[None], use_cache=False).logits[0]


def divergence(reference: Tensor, logits: Tensor) -> float:
    """The sum over positions of KL(p || q), in nats; p from `reference`, q from `logits`, both [T, V]."""
    return float(divergences(reference, logits).sum())


def divergences(reference: Tensor, logits: Tensor, at_once: int = 256) -> Tensor:
    """KL(p || q) of each position, FP64 [T]."""
    found = []
    for p, q in zip(reference.split(at_once), logits.split(at_once), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
    return torch.cat(found)


def token_losses(logits: Tensor, row: Tensor) -> Tensor:
    """The cross entropy of each of a row's tokens after its first, FP64 [T - 1]."""
    return F.cross_entropy(logits[:-1].float(), row[1:], reduction="none").double()


def drawn(logits: Tensor, seed: int) -> Tensor:
    """A next token `[T]` for every position, from the model's own distribution; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def backward(
    model: nn.Module, row: Tensor, labels: Tensor, places: Mapping[str, Place], watched: Mapping[str, Watched]
) -> None:
    """One pass forward and backward, in which each layer's errors are taken and weighed by its gradient."""

    def hook(name: str) -> Callable[..., None]:
        def look(linear: nn.Module, args: Any, y: Tensor) -> None:
            error = watched[name].look(places[name], args[0].detach(), y.detach())
            y.register_hook(lambda grad: watched[name].weigh(grad, error))

        return look

    embedding: Any = getattr(model, "get_input_embeddings")()  # noqa: B009  nn.Module has none by type
    with ExitStack() as stack:
        handles = [place.linear.register_forward_hook(hook(name)) for name, place in places.items()]
        handles.append(embedding.register_forward_hook(lambda module, args, out: out.requires_grad_()))
        for handle in handles:
            stack.callback(handle.remove)
        F.cross_entropy(logits_of(model, row).float(), labels, reduction="sum").backward()


@dataclass
class Watched:
    """Sums over what passed through one layer."""

    x_energy: float = 0.0
    x_noise: float = 0.0
    y_energy: float = 0.0
    y_noise: float = 0.0
    fisher: float = 0.0
    elements: int = 0
    saturated: int = 0
    flushed: int = 0
    channels: Tensor | None = None

    @torch.no_grad()
    def look(self, place: Place, x: Tensor, y: Tensor) -> Tensor:
        """Count the input and the error of the output, and give the error."""
        x = x.reshape(-1, x.shape[-1])
        self.channels = amax_of(x) if self.channels is None else torch.maximum(self.channels, amax_of(x))
        if not place.frozen.weight_only:
            self.see_input(place.frozen, x)
        error = place.frozen(x).reshape(y.shape).float() - y.float()
        self.y_energy, self.y_noise = self.y_energy + energy(y), self.y_noise + energy(error)
        return error

    def see_input(self, layer: FrozenLinear, x: Tensor) -> None:
        q = layer.quantized_input(x.contiguous())
        bits = q.codes.view(torch.uint8) & 0x7F
        self.elements += x.numel()
        self.saturated += int((bits == 0x7E).sum())
        self.flushed += int(((bits == 0) & (x != 0)).sum())
        self.x_energy, self.x_noise = self.x_energy + energy(x), self.x_noise + energy(q.dequantize() - x.float())

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        self.fisher += 0.5 * energy(grad.float() * error)

    def result(self, name: str, place: Place, tokens: int) -> LayerError:
        weight = place.linear.weight.detach().float()
        noise = place.frozen.quantized_weight().dequantize() - weight
        middle = float(self.channels.median()) if self.channels is not None else 0.0
        channels = torch.zeros(1) if self.channels is None else self.channels
        count = max(self.elements, 1)
        return LayerError(
            name, decibel(energy(weight), energy(noise)), decibel(self.x_energy, self.x_noise),
            math.sqrt(self.y_noise / self.y_energy) if self.y_energy else 0.0, self.saturated / count,
            self.flushed / count, int((channels > OUTLIER * middle).sum()) if middle else 0,
            float(channels.max()) / middle if middle else 1.0, self.fisher / tokens,
        )  # fmt: skip


def energy(x: Tensor) -> float:
    """The sum of squares."""
    return float(x.double().square().sum())


def amax_of(x: Tensor) -> Tensor:
    """The largest magnitude of each channel of x [rows, K], FP32 [K]."""
    return x.float().abs().amax(0)


def decibel(signal: float, noise: float) -> float | None:
    """
    >>> decibel(1000.0, 1.0), decibel(1.0, 0.0)
    (30.0, None)
    """
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


@dataclass
class Sums:
    """Sums over the rows."""

    groups: Sequence[tuple[str, ...]]
    tokens: int = 0
    scored: int = 0
    loss: float = 0.0
    together: float = 0.0
    kl: dict[tuple[str, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kl = dict.fromkeys(self.groups, 0.0)

    def count(self, logits: Tensor, row: Tensor) -> None:
        self.tokens += len(row)
        self.scored += len(row) - 1
        self.loss += float(token_losses(logits, row).sum())

    def result(
        self, places: Mapping[str, Place], watched: Mapping[str, Watched], not_measured: tuple[str, ...]
    ) -> Sensitivity:
        layers = {name: watched[name].result(name, place, self.tokens) for name, place in places.items()}
        groups = tuple(
            Group(group, kl / self.tokens, sum(layers[n].fisher for n in group),
                  sum(places[n].linear.weight.numel() for n in group))
            for group, kl in self.kl.items()
        )  # fmt: skip
        loss, together = self.loss / self.scored, self.together / self.tokens
        return Sensitivity(self.tokens, loss, together, tuple(layers.values()), groups, not_measured)
