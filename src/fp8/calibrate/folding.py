"""Rotations and migrations folded into the weights of a Llama-family checkpoint, one tensor at a time, on reading.

`rotated(source, seed)` and `migrated(source, exponents)` are sources themselves: `read` gives the changed tensor. So
whatever goes through a checkpoint tensor by tensor (quantizing, calibrating from disk, verifying) sees the changed
model, and none of it needs more memory. In high precision both compute what the model computed.

**R1 turns the residual stream.** x' = x Q, with one Q for the whole model. A layer that reads the stream takes W Q, one
that writes it Q^T W, the embedding E Q. RMSNorm divides by the length of x, which Q does not change; its weight gamma
stands between the norm and the layers that follow, so it is multiplied into them first and becomes 1. Biases of layers
that write the stream are turned too.

**R2 turns the values of each head**, with one Q a layer: the rows of v_proj (and its bias) and, for every query head,
the columns of o_proj. Attention weighs values, and a weighted sum of turned values is the turned sum.

**Migration** divides what makes a layer's input and multiplies the layer's columns. The input comes from

    input_layernorm             into q_proj, k_proj, v_proj
    post_attention_layernorm    into gate_proj, up_proj
    v_proj, by channel          into o_proj; query heads that share values share the factors
    up_proj, by channel         into down_proj: the gate multiplies, so a factor passes

Factors are powers of two, and no bit of the model changes. After a rotation weights are rounded once, from FP64 to
FP32, and what stays is rounded to BF16 when it is written: the model differs by that.

**A head that is tied to the embedding** cannot stay so: the embedding becomes E Q, the head E diag(gamma) Q. It is
written as a tensor of its own, and `config.json` says `tie_word_embeddings: false`.

Left out: q and k of each head (R3) and the input of down_proj (R4), whose rotations have no layer to vanish into (RoPE
and the gate stand between) and need a kernel where the model is served; and other architectures, which are refused:
norms with a centre or an offset, scaled embeddings, and projections that are stored joined need formulae of their own.

Source: QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406), whose names R1 and R2 are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import Entry, Source
from ..errors import CheckpointError
from ..models.huggingface import IGNORED
from .hadamard import Rotation

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
READS = {  # which layers read the stream behind which norm
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITES = ("self_attn.o_proj", "mlp.down_proj")
KNOWN = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight|model\.layers\.\d+\.("
    r"input_layernorm\.weight|post_attention_layernorm\.weight|self_attn\.[qk]_norm\.weight|"
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias))"
)
SLAB = 1 << 22  # elements of a tensor that are changed at once


@dataclass(frozen=True)
class Times:
    """Multiplies along an axis: 0, outputs (or the elements of a vector); 1, inputs. `by` is FP64."""

    by: Tensor
    axis: int

    def __call__(self, t: Tensor) -> Tensor:
        return t * (self.by[:, None] if self.axis == 0 and t.ndim == 2 else self.by)


@dataclass(frozen=True)
class Turn:
    """Turns the vectors that lie along an axis."""

    rotation: Rotation
    axis: int

    def __call__(self, t: Tensor) -> Tensor:
        return self.rotation.turn(t.t()).t() if self.axis == 0 and t.ndim == 2 else self.rotation.turn(t)


@dataclass(frozen=True)
class Ones:
    """What is left of a norm's weight when it stands in the layers behind it."""

    axis: int = 0

    def __call__(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


Edit = Times | Turn | Ones


@dataclass(frozen=True)
class Folded(Source):
    """A source with edits of its tensors, in order, computed in FP64; `origin`: whose tensor a new one begins as."""

    inner: Source = field(kw_only=True)
    edits: Mapping[str, Sequence[Edit]] = field(kw_only=True)
    origin: Mapping[str, str] = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        tensor, edits = self.inner.read(self.origin.get(name, name)), self.edits.get(name, ())
        if not edits:
            return tensor
        by_rows = tensor.ndim == 2 and all(edit.axis == 1 for edit in edits)
        rows = max(SLAB // tensor.shape[-1], 1) if by_rows else len(tensor)
        return torch.cat([edited(part, edits).to(self.entries[name].dtype) for part in tensor.split(rows)])


def edited(tensor: Tensor, edits: Sequence[Edit]) -> Tensor:
    tensor = tensor.double()
    for edit in edits:
        tensor = edit(tensor)
    return tensor


# --------------------------------------------------------------------------- the model by its names


@dataclass(frozen=True)
class Anatomy:
    """What the foldings need to know of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(source: Source) -> Anatomy:
        """Raises `CheckpointError` for a model that is not understood."""
        refuse_unknown(source)
        c = source.config
        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        return Anatomy(c["num_hidden_layers"], c["hidden_size"], heads, c.get("num_key_value_heads") or heads, head_dim)

    def each(self) -> list[str]:
        """The prefix of every layer."""
        return [f"model.layers.{i}" for i in range(self.layers)]

    @property
    def repeats(self) -> tuple[int, int, int]:
        """KV heads, query heads to each, channels."""
        return self.kv_heads, self.heads // self.kv_heads, self.head_dim


def refuse_unknown(source: Source) -> None:
    """Only models whose every tensor has a known part in the formulae."""
    way_out = "go without them, by --outliers none, or fold your own into its weights beforehand."
    names = list(source.config.get("architectures") or [])
    if not names or names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.folder} is {names[0] if names else 'of no named architecture'}; rotation and smoothing are "
            f"understood for {', '.join(ARCHITECTURES)}: {way_out}"
        )
    unknown = [n for n in source.entries if not KNOWN.fullmatch(n) and not n.endswith(IGNORED)]
    if unknown:
        raise CheckpointError(f"{unknown[0]} has no known part in {names[0]}, so nothing can be folded: {way_out}")


def folded(source: Source, edits: Mapping[str, Sequence[Edit]], dtype: torch.dtype | None = None) -> Folded:
    """A source with edits, whose tensors have their type or the one given."""
    changed = {n: replace(source.entries[n], dtype=dtype or source.entries[n].dtype) for n in edits}
    return Folded(source.folder, source.config, {**source.entries, **changed}, inner=source, edits=edits, origin={})


# --------------------------------------------------------------------------- rotation


def rotated(source: Source, seed: int) -> Source:
    """R1 and R2 with the signs of a seed. Raises `CheckpointError`, and `ConfigError` where a width has no rotation."""
    anatomy = Anatomy.of(source)
    stream = Rotation(anatomy.hidden, seed)
    edits: dict[str, list[Edit]] = defaultdict(list)
    edits[f"{EMBEDDING}.weight"].append(Turn(stream, 1))
    edits[f"{HEAD}.weight"] += [gamma(source, NORM), Turn(stream, 1)]
    edits[f"{NORM}.weight"].append(Ones())
    for i, layer in enumerate(anatomy.each()):
        for norm, readers in READS.items():
            for reader in readers:
                edits[f"{layer}.{reader}.weight"] += [gamma(source, f"{layer}.{norm}"), Turn(stream, 1)]
            edits[f"{layer}.{norm}.weight"].append(Ones())
        values = Rotation(anatomy.head_dim, seed, stream=i + 1)
        edits[f"{layer}.self_attn.o_proj.weight"].append(Turn(values, 1))
        for writer, turn in (*((w, stream) for w in WRITES), ("self_attn.v_proj", values)):
            for name in (f"{layer}.{writer}.weight", f"{layer}.{writer}.bias"):
                if name in source.entries or name.endswith("weight"):
                    edits[name].append(Turn(turn, 0))
    return untied(source, edits)


def gamma(source: Source, norm: str) -> Times:
    """A norm's weight, into the columns behind it."""
    return Times(source.read(f"{norm}.weight").double(), 1)


def untied(source: Source, edits: Mapping[str, Sequence[Edit]]) -> Folded:
    """With a head of its own, in FP32."""
    head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    entries = dict(source.entries)
    entries.setdefault(head, entries[embedding])
    entries |= {name: Entry(entries[name].file, torch.float32, entries[name].shape) for name in edits}
    origin = {} if head in source.entries else {head: embedding}
    config = {**source.config, "tie_word_embeddings": False}
    return Folded(source.folder, config, entries, inner=source, edits=edits, origin=origin)


# --------------------------------------------------------------------------- migration


@dataclass(frozen=True)
class Migration:
    """What makes an input, the layers that take it, and how channels are repeated on the way (`Anatomy.repeats`)."""

    maker: str
    takers: tuple[str, ...]
    repeats: tuple[int, int, int] | None = None

    def spread(self, channels: Tensor) -> Tensor:
        """The maker's channels as the takers have them."""
        if self.repeats is None:
            return channels
        kv, times, dim = self.repeats
        return channels.view(kv, 1, dim).expand(kv, times, dim).flatten()

    def gather(self, channels: Tensor) -> Tensor:
        """The largest of what comes of each of the maker's channels."""
        if self.repeats is None:
            return channels
        kv, times, dim = self.repeats
        return channels.view(kv, times, dim).amax(1).flatten()


def migrations(source: Source) -> list[Migration]:
    """All of a model. Raises `CheckpointError` for one that is not understood."""
    anatomy = Anatomy.of(source)
    out = []
    for layer in anatomy.each():
        out += [Migration(f"{layer}.{norm}", tuple(f"{layer}.{r}" for r in readers)) for norm, readers in READS.items()]
        out.append(Migration(f"{layer}.self_attn.v_proj", (f"{layer}.self_attn.o_proj",), anatomy.repeats))
        out.append(Migration(f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)))
    return out


def migrated(source: Source, exponents: Mapping[str, Sequence[int]]) -> Source:
    """Each maker's channels divided by 2^exponent, and its takers' columns multiplied by it."""
    edits: dict[str, list[Edit]] = defaultdict(list)
    for one in migrations(source):
        factor = torch.exp2(torch.tensor(list(exponents.get(one.maker, ())), dtype=torch.float64))
        if not len(factor) or bool((factor == 1).all()):
            continue
        for name in (f"{one.maker}.weight", f"{one.maker}.bias"):
            if name in source.entries:
                edits[name].append(Times(1 / factor, 0))
        for taker in one.takers:
            edits[f"{taker}.weight"].append(Times(one.spread(factor), 1))
    half = any(source.entries[name].dtype == torch.float16 for name in edits)
    return folded(source, edits, torch.float32 if half else None)


def remedied(source: Source, found: Mapping[str, Any]) -> Source:
    """What a record of `remedies.py` says: {"rotation": seed or None, "migration": {maker: exponents} or None}."""
    steps: list[Callable[[Source], Source]] = []
    if found.get("rotation") is not None:
        steps.append(lambda s: rotated(s, int(found["rotation"])))
    if found.get("migration"):
        steps.append(lambda s: migrated(s, found["migration"]))
    for step in steps:
        source = step(source)
    return source
