"""Compensated rounding of a whole model, layer by layer from disk: `Compensation`.

Hidden states walk through the model as they will when it is served: through weights that are rounded already, and with
every input of a linear layer rounded as the scheme says. At each linear layer they give its statistics
(`compensate.py`). With `target="output"` or `"stream"` a second stream in high precision walks beside, from the same
rows of text, and says what should have come out.

Within a block the layers are rounded in the order in which they run, those with one input (q, k and v; gate and up)
together. For each such stage all rows run through the block up to there, batch by batch, so that memory holds one
block's weights twice, the streams, and the moments of one input; of a 70B model only the size of its blocks counts
(`blocks.py`).

    OUT.partial/compensated/block-0007.safetensors     codes of block 7, and squared errors, plain rounding's beside
    OUT.partial/compensated/streams-0008.safetensors   the streams as they enter block 8; the older ones are gone

Every eighth row is held out: it decides nothing, and tells what share of the error of rounding to nearest remains on
text that the codes were not chosen by. Text of another kind than will be served shows only there, where it is mixed in.

Files appear by renaming, so a stop loses one block's work at most. Streams are stored as they are computed, hence what
was stopped and continued has the bytes of what was not.

**What is not compensated** is rounded to nearest: layers outside the blocks (an output head), and those that the text
does not reach. `config.json` says which were. Experts of a mixture, which transformers makes one tensor of many, cannot
be read layer by layer and are refused.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.compressed_tensors import Scheme, row_scales
from ..checkpoint.layers import Layers, linear_layers
from ..checkpoint.quantize import Options, Rounded, Scales, TensorScales, quantize_weight
from ..checkpoint.source import Source
from ..checkpoint.tensorfile import read_tensors, refuse_full_disk, write_tensors
from ..errors import CheckpointError, ConfigError
from ..quantize import Quantized, quantize
from ..quantize.reference import nearest
from ..tile import Tile
from ..train.loop import device_of
from .blocks import Call, Enough, calls_of, entering
from .calibration import split
from .compensate import DAMPING, E4M3, REGRESSION, Moments, factor, one_order, output_error, regressed, sweep
from .running import fill, hollow, stored_as
from .text import digest, read_texts, rows_of, tokenizer_for

BATCH = 16  # rows that run at once
Stream = list[Tensor]  # hidden states [B, T, D] of every batch
TARGETS = ("output", "stream", "weight")


@dataclass(frozen=True)
class Compensation:
    """How to round with compensation, and on what text. Called by `quantize_folder`, it gives codes.

    texts       files, `*.jsonl` with a field "text", or `moby-dick`; `samples` rows of `length` tokens
    target      "weight": that of the file is rounded; "output": what it regresses to on outputs in high precision;
                "stream": likewise, and the last layer of a block gives what the hidden states behind it lack
    damping     what is added to the diagonal of the inputs' second moments, times its mean
    regression  likewise where weights are regressed
    order       "activation": columns with the largest inputs first; "index": from left to right
    tokenizer   "bytes" or a folder, where the model's is not beside it
    """

    texts: tuple[str, ...] = ("moby-dick",)
    samples: int = 128
    length: int = 256
    target: str = "weight"
    damping: float = DAMPING
    regression: float = REGRESSION
    order: str = "activation"
    tokenizer: str | None = None
    device: str = "cpu"  # or auto, cuda, cuda:N
    progress: Callable[[int, int], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        one_order(self.order)
        object.__setattr__(self, "device", str(device_of(self.device)))
        if self.target not in TARGETS:
            raise ConfigError(f"target must be one of {', '.join(TARGETS)}, not {self.target!r}.")
        for name in ("samples", "length"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, not {getattr(self, name)}.")
        for name in ("damping", "regression"):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(
                    f"{name} must be from 0 to 10 times the mean of the diagonal, not {getattr(self, name)}."
                )

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the codes."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("progress", "texts")}
        return plain | {"texts": digest(self.texts)}

    def __call__(self, source: Source, layers: Layers, options: Options, scales: Scales, folder: Path) -> Rounded:
        """The codes, made in `folder` or found there. Raises `DataError`, `CheckpointError`."""
        tokenizer = tokenizer_for(source.folder, self.tokenizer)
        vocabulary = int(source.config.get("vocab_size") or 1 << 62)
        rows = rows_of(read_texts(self.texts), tokenizer, self.samples, self.length, vocabulary)
        chosen, held = split(rows)
        walk = Walk(source, layers, options, scales, self, [part.to(self.device) for part in (chosen, held)])
        with torch.no_grad():
            files, errors = walk.through(folder, self.progress)
        own = {name: getattr(self, name) for name in ("target", "damping", "regression", "order")}
        how = {
            "texts": list(self.texts), "tokens": chosen.numel(), "held_out_tokens": held.numel(), **own,
            "layers": len(files), "held_out": told_errors(errors),
        }  # fmt: skip
        return Rounded(files, how)


class Walk:
    """A model, and the way through its blocks. `rows`: to compensate on, and held out."""

    def __init__(
        self, source: Source, layers: Layers, options: Options, scales: Scales, what: Compensation, rows: list[Tensor]
    ) -> None:
        self.source, self.what = source, what
        self.batches = [len(batch) for part in rows for batch in part.split(BATCH)]
        self.chosen = len(rows[0].split(BATCH))  # so many of them
        self.rows = torch.cat(rows).split(self.batches)
        self.scheme, self.scales, self.tensor_scales = options.layout, scales, TensorScales(source, layers, options)
        self.model, self.blocks = hollow(source, what.device, head=False)
        unread = [n for _, _, names in self.blocks for n in names if stored_as(self.model, source, n) is None]
        if unread:
            raise CheckpointError(
                f"{source.folder} has no tensor {unread[0]!r}: transformers makes it of several (as in a mixture of "
                "experts), which cannot be read layer by layer. Quantize it without compensation."
            )
        fp8 = set(layers.fp8)
        self.names = {module: name for name, module in linear_layers(source, self.model) if name in fp8}

    def through(
        self, folder: Path, progress: Callable[[int, int], None] | None
    ) -> tuple[dict[str, Path], dict[str, list[float]]]:
        """Round every block that is not yet there. The file of each layer's codes; squared errors by layer."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"block-{i:04}.safetensors" for i in range(len(self.blocks))]
        if not all(file.is_file() for file in files):
            self.walk(folder, files, progress)
        found = [(file, read_tensors(file)) for file in files]
        codes = {n.removesuffix(".weight"): file for file, held in found for n in held if n.endswith(".weight")}
        errors = {n.removesuffix(".errors"): t.tolist() for _, held in found for n, t in held.items() if ".errors" in n}
        return codes, errors

    def walk(self, folder: Path, files: list[Path], progress: Callable[[int, int], None] | None) -> None:
        first, high, served = self.start(folder)
        calls = calls_of(self.model, self.blocks, self.source, self.rows, self.what.device)
        for i in range(first, len(files)):
            if progress:
                progress(i, len(files))
            prefix, module, tensors = self.blocks[i]
            fill(self.model, self.source, tensors, self.what.device)
            block = Block(self, prefix, module, calls[i])
            put(files[i], block.round(high, served))
            if i + 1 < len(files):
                served = block.run(served, served=True)
                high = block.run(high, served=False) if self.two else served
                streams = {"served": torch.cat(served), **({"high": torch.cat(high)} if self.two else {})}
                put(folder / f"streams-{i + 1:04}.safetensors", streams)
            (folder / f"streams-{i:04}.safetensors").unlink(missing_ok=True)
            module.to("meta")
        if progress:
            progress(len(files), len(files))

    def start(self, folder: Path) -> tuple[int, Stream, Stream]:
        """Where an earlier start stopped, and the two streams there."""
        kept = sorted(folder.glob("streams-*.safetensors"))
        if kept:
            held = read_tensors(kept[-1])
            streams = {name: list(held[name].to(self.what.device).split(self.batches)) for name in held}
            return int(kept[-1].stem.split("-")[1]), streams["high" if self.two else "served"], streams["served"]
        hidden = [entering(self.model, self.blocks[0][1], rows) for rows in self.rows]
        refuse_full_disk(folder, 5 * sum(part.nbytes for part in hidden) + self.codes_bytes())
        return 0, hidden, hidden

    @property
    def two(self) -> bool:
        """Whether outputs in high precision are asked for."""
        return self.what.target != "weight"

    def codes_bytes(self) -> int:
        shapes = (self.source.entries[f"{name}.weight"].shape for name in self.names.values())
        return sum(n * k for n, k in shapes)


def told_errors(errors: Mapping[str, list[float]]) -> dict[str, Any]:
    """The squared error that compensation leaves, as a share of rounding to nearest's: the median, and the worst."""
    shares = {name: after / before if before else 1.0 for name, (before, after) in errors.items()}
    worst = max(shares, key=lambda name: shares[name])
    return {"median": statistics.median(shares.values()), "worst": {"layer": worst, "share": shares[worst]}}


def put(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file that is there whole or not at all."""
    aside = path.with_suffix(".writing")
    write_tensors(aside, tensors)
    aside.replace(path)


# --------------------------------------------------------------------------- one block


class Block:
    """A block with its weights as the file has them, and as far as they are rounded."""

    def __init__(self, walk: Walk, prefix: str, module: nn.Module, call: Call) -> None:
        self.walk, self.module, self.call = walk, module, call
        inside = {m: name for m, name in walk.names.items() if m.startswith(prefix + ".")}
        self.linear = {name: walk.model.get_submodule(m) for m, name in inside.items()}
        self.high: dict[str, Any] = {name: layer.weight.data for name, layer in self.linear.items()}
        self.served: dict[str, Tensor] = {}
        self.last: str | None = None

    def round(self, high: Stream, served: Stream) -> dict[str, Tensor]:
        """Codes of all layers, and their squared errors on held-out rows, beside those of the nearest codes:
        `NAME.weight` and `NAME.errors`, FP64 [nearest, compensated]."""
        out: dict[str, Tensor] = {}
        count = self.walk.chosen
        stages = self.stages(high[0])
        self.last = self.last_layer(stages[-1], high[0]) if self.walk.what.target == "stream" else None
        for stage in stages:
            moments = self.moments(stage[0], high[:count], served[:count])
            check = self.moments(stage[0], high[count:], served[count:], regress=False).hessian
            carried = factor(moments.hessian, self.walk.what.damping, self.walk.what.order)
            for name in stage:
                weight = self.walk.source.read(f"{name}.weight")
                scale = spread(self.plain(name, weight))
                wanted = regressed(weight.float(), moments, self.walk.what.regression)
                codes = sweep(wanted.to(self.walk.what.device), scale.to(self.walk.what.device), carried).cpu()
                out[f"{name}.weight"] = codes
                both = (
                    output_error(wanted - q.float() * scale, check).sum()
                    for q in (nearest(wanted / scale, E4M3), codes)
                )
                out[f"{name}.errors"] = torch.stack(list(both))
                layer: Any = self.linear[name]
                self.served[name] = (codes.float() * scale).to(layer.weight)
        return out

    def plain(self, name: str, weight: Tensor) -> Quantized:
        scheme = self.walk.scheme
        return quantize_weight(weight, scheme, self.walk.tensor_scales.of(name) if scheme.per_tensor else None)

    def stages(self, hidden: Tensor) -> list[list[str]]:
        """The layers in the order in which they run, those that get the same tensor together."""
        seen: list[tuple[list[str], Tensor]] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple) -> None:
                if seen and seen[-1][1] is args[0]:
                    seen[-1][0].append(name)
                else:
                    seen.append(([name], args[0]))

            return hook

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in self.linear.items()]
        self.call(self.module, hidden)
        for handle in handles:
            handle.remove()
        return [names for names, _ in seen]

    def moments(self, name: str, high: Stream, served: Stream, regress: bool = True) -> Moments:
        """Of what enters a layer, over all batches."""
        hessian = lost = None
        for a, b in zip(high, served, strict=True):
            x = rounded_input(self.entering(name, b, served=True), self.walk.scheme, self.input_scale(name))
            hessian = added(hessian, x.t() @ x)
            if regress and self.walk.two:
                lost = added(lost, self.lacks(name, a, b, x).t() @ x)
        assert hessian is not None
        found = None if lost is None else lost.cpu()
        return Moments(hessian.cpu(), **{"lack" if name == self.last else "drift": found})

    def lacks(self, name: str, high: Tensor, served: Tensor, x: Tensor) -> Tensor:
        """What a layer's inputs x lack, of the last layer: the hidden states behind the block; FP32 [B * T, ...]."""
        if name != self.last:
            return self.entering(name, high, served=False) - x
        self.served[name] = self.high[name]  # so that its input is rounded, and its weight not yet
        behind = [self.run([part], served=kind)[0].float() for part, kind in ((high, False), (served, True))]
        return (behind[0] - behind[1]).flatten(0, -2)

    def last_layer(self, stage: list[str], hidden: Tensor) -> str | None:
        """The layer whose outputs are added to the hidden states as they leave the block, if there is one."""
        layer: Any = self.linear[stage[0]]
        if len(stage) > 1 or layer.weight.shape[0] != hidden.shape[-1]:
            return None
        gave: list[Tensor] = []

        def double(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            gave.append(out)
            return 2 * out

        before = self.call(self.module, hidden)
        handle = layer.register_forward_hook(double)
        moved = self.call(self.module, hidden) - before
        handle.remove()
        near = moved.shape == gave[0].shape and float((moved - gave[0]).norm()) < 0.1 * float(gave[0].norm())
        return stage[0] if near else None

    def input_scale(self, name: str) -> float | None:
        return self.walk.scales.inputs.get(name)

    def entering(self, name: str, hidden: Tensor, served: bool) -> Tensor:
        """The input of a layer, FP32 [B * T, K]; the block runs no further than there."""

        def stop(module: nn.Module, args: tuple) -> None:
            raise Enough(args[0])

        with self.as_served(served):
            handle = self.linear[name].register_forward_pre_hook(stop, prepend=True)
            try:
                self.call(self.module, hidden)
            except Enough as enough:
                return enough.found.reshape(-1, enough.found.shape[-1]).float()
            finally:
                handle.remove()
        raise AssertionError(f"{name} was met before, and is not now")

    def run(self, hidden: Stream, served: bool) -> Stream:
        """The hidden states behind the block."""
        with self.as_served(served):
            return [self.call(self.module, part) for part in hidden]

    @contextmanager
    def as_served(self, served: bool) -> Iterator[None]:
        """With the weights that are rounded so far, and their inputs rounded; or with none."""
        handles = []
        for name, layer in self.linear.items():
            kind: Any = layer
            kind.weight.data = self.served.get(name, self.high[name]) if served else self.high[name]
            if served and name in self.served:
                handles.append(layer.register_forward_pre_hook(self.rounding(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rounding(self, name: str) -> Callable[..., Tensor]:
        scale = self.input_scale(name)

        def hook(module: nn.Module, args: tuple) -> Tensor:
            x = args[0]
            return rounded_input(x.reshape(-1, x.shape[-1]), self.walk.scheme, scale).view(x.shape).to(x.dtype)

        return hook


def added(total: Tensor | None, more: Tensor) -> Tensor:
    return more.double() if total is None else total + more.double()


def rounded_input(x: Tensor, scheme: Scheme, scale: float | None) -> Tensor:
    """A layer's input [T, K] as its scheme serves it, decoded, FP32."""
    if scheme.inputs == "none":
        return x.float()
    x = x.contiguous()
    if scheme.inputs == "static":
        assert scale is not None, "refused before"
        given = torch.full((1, 1), scale, device=x.device)
        return quantize(x, "e4m3", "tensor", scale=given).dequantize(torch.float32)
    return quantize(x, "e4m3", Tile(1, scheme.group), scheme.scale_rounding).dequantize(torch.float32)


def spread(q: Quantized) -> Tensor:
    """The scale of every weight [N, K]."""
    width = q.tile.shape(*q.shape)[1]
    return row_scales(q).repeat_interleave(width, 1)[:, : q.shape[1]]
