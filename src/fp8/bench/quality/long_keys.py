"""One decode step's attention over very many stored keys, against exact references.

**Where keys and values come from.** A served model reads windows of real text, with a BF16 cache; the keys (rotated)
and values of all windows are laid one behind the other, and the queries are those of the last positions of the last
window. So 131,072 keys come from a model that was made for 8,192 positions: content, outliers and means are those of
real text; positions repeat. Later windows leave out their first `SINK` keys, on which attention would rest anew.

**What is compared**, a query and head at a time, with o the exact attention (FP64) over the BF16 keys and values:

    ô         exact attention (FP64) over what the codes stand for
    kernel    what `attend` gives, BF16

    format    ||ô - o|| / ||o||              what the codes cost, whoever reads them
    kernel    ||kernel - ô|| / ||o||         what reading them costs
    total     ||kernel - o|| / ||o||
    bound     max |kernel - ô| / (2^-8 |ô| + (2^-11 or 2^-8) A + 2^-38 n max |v|), which `attention/paged/triton.py`
              derives: at most 1, or the kernel is wrong. A is the weighted sum of |v|

**The budget of the codes.** To first order, with p the weights, errors dk and dv of keys and values shift the result by
the sum of p_j ((q · dk_j) s (v_j - o) + dv_j), s the scale of scores. If errors of different elements are independent,
its squared size is expected to be

    budget^2 = sum over j of p_j^2 ( s^2 sum over c of (q_c dk_jc)^2 * (v_j - o)^2 + dv_j^2 )

computed here from the errors that were made, without constants. `of_budget` is ||ô - o|| over it: about 1 where errors
are independent, so that they average out over many keys; above where they pull one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.paged import LayerPages, attend, rope_write
from ...serve import Batch
from ...serve.models import ServedModel
from ...serve.models.layers import norm_linear, settled
from .caches import KINDS, Cached, Calibration, whole
from .chunks import pages_of

SINK = 4
KEYS_AT_ONCE = 1 << 14
LONG_KINDS = (
    "bf16",
    "e4m3",
    "e4m3, full keys",
    "e4m3, key offsets",
    "e4m3, full keys, offsets",
    "e4m3, static",
    "e5m2",
)


@dataclass(frozen=True)
class Recorded:
    """Of one layer, BF16: queries [S, H, D] of the last S positions, keys and values [N, KV, D] in order."""

    q: Tensor
    keys: Tensor
    values: Tensor


def record(model: ServedModel, windows: Tensor, keys: int, queries: int) -> list[Recorded]:
    """Queries, keys and values of each layer from tokens [W, T], T a multiple of the page; W T >= keys + SINK W."""
    asked: list[Tensor] = []
    hooks = [block.attention.register_forward_pre_hook(asking(asked, queries)) for block in model.layers]  # type: ignore[union-attr]
    try:
        cache = whole(model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    last = asked[-len(model.layers) :]
    return [
        Recorded(q, in_row(p.key_codes, windows, keys), in_row(p.value_codes, windows, keys))
        for q, p in zip(last, cache.layers, strict=True)
    ]


def asking(asked: list[Tensor], queries: int) -> Callable[..., None]:
    """A hook of an attention module that keeps the rotated queries of the last rows it is given."""

    def hook(module: Any, given: tuple[Any, ...]) -> None:
        h, batch, pages, rope, *_ = given
        qkv, _ = norm_linear(settled(h)[-queries:], module.norm, module.qkv)
        nowhere = torch.full_like(batch.slots[-queries:], -1)
        q = rope_write(qkv, batch.positions[-queries:], nowhere, pages, rope, module.q_norm, module.k_norm, module.eps)
        asked.append(q)

    return hook


def in_row(codes: Tensor, windows: Tensor, keys: int) -> Tensor:
    """The first window of a BF16 cache, then the last of the others' positions, `keys` in all: [keys, KV, D]."""
    count, length = windows.shape
    flat = codes.transpose(1, 2).reshape(count, length, codes.shape[1], codes.shape[3])
    if keys <= length:
        return flat[-1, -keys:]
    return torch.cat([flat[0], flat[1:, SINK:].flatten(0, 1)[length - keys :]])


# --------------------------------------------------------------------------- a cache, and one step over it


def stored(arm: Cached, layer: int, held: Recorded) -> LayerPages:
    """One layer's pages with all keys and values in them, written as the engine writes."""
    count, _, width = held.keys.shape
    pages = arm.new_layer(layer, pages_of(count))
    still = torch.ones(1, width // 2, device=held.keys.device), torch.zeros(1, width // 2, device=held.keys.device)
    for start in range(0, count, KEYS_AT_ONCE):
        parts = [x[start : start + KEYS_AT_ONCE] for x in (held.keys, held.keys, held.values)]  # the first: no queries
        qkv = torch.cat(parts, 1).flatten(1).contiguous()
        slots = start + torch.arange(len(qkv), device=qkv.device)
        rope_write(qkv, torch.zeros_like(slots).int(), slots, pages, still)
        arm.store_again(layer, pages, parts[0], slots)
    return pages


def read(pages: LayerPages, q: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """One decode step of S sequences that own the same pages: BF16 [S, H, D]."""
    rows, device = len(q), q.device
    nothing = torch.arange(rows, device=device)
    table = torch.arange(len(pages.key_codes), device=device).int().repeat(rows, 1)
    starts = torch.arange(rows + 1, device=device).int()
    batch = Batch(nothing, lengths - 1, nothing, starts, lengths, table, nothing, True)
    return attend(q, pages, batch, scale).view(q.shape)


def decoded(pages: LayerPages, count: int, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the codes of a layer stand for, FP32 [count, KV, D] each; keys with their offset added again."""
    out = []
    for codes, scale in ((pages.key_codes, pages.key_scale), (pages.value_codes, pages.value_scale)):
        real = codes.float()
        if scale is not None:
            real = real * (scale[:, None, None] if pages.static else scale[..., None])
        out.append(real.transpose(1, 2).reshape(-1, codes.shape[1], codes.shape[3])[:count])
    keys, values = out
    return keys if offset is None else keys + offset, values


# --------------------------------------------------------------------------- exact references


@dataclass(frozen=True)
class Exact:
    """Attention in FP64: out [S, H, D], the weights [S, H, N], and A, the weighted sum of |v| [S, H, D]."""

    out: Tensor
    weights: Tensor
    mass: Tensor


def exact(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Exact:
    """q [S, H, D], keys and values [N, KV, D]; row s sees the first lengths[s] of them."""
    group = q.shape[1] // keys.shape[1]
    scores = torch.cat([torch.einsum("skgd,nkd->skgn", grouped(q, group), k) for k in doubles(keys)], -1) * scale
    beyond = torch.arange(len(keys), device=q.device) >= lengths[:, None]
    weights = scores.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
    out, mass = (summed(weights, part) for part in (values, values.abs()))
    return Exact(out, weights.flatten(1, 2), mass)


def grouped(q: Tensor, group: int) -> Tensor:
    """Queries by key head, FP64 [S, KV, G, D]."""
    return q.double().unflatten(1, (-1, group))


def doubles(x: Tensor) -> Iterator[Tensor]:
    """x [N, ...] in FP64, some keys at a time."""
    yield from (part.double() for part in x.split(KEYS_AT_ONCE))


def summed(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sums [S, H, D] of values [N, KV, D] by weights [S, KV, G, N]."""
    parts = zip(weights.split(KEYS_AT_ONCE, -1), doubles(values), strict=True)
    total = sum(torch.einsum("skgn,nkd->skgd", w, v) for w, v in parts)
    assert isinstance(total, Tensor)
    return total.flatten(1, 2)


def budget(q: Tensor, held: Recorded, codes: tuple[Tensor, Tensor], true: Exact, scale: float) -> Tensor:
    """The expected size of ô - o, [S, H], if errors of elements are independent (see the top)."""
    group = q.shape[1] // held.keys.shape[1]
    square = grouped(q, group).square()
    total = torch.zeros_like(true.out)
    weights = true.weights.unflatten(1, (-1, group)).square().split(KEYS_AT_ONCE, -1)
    out = true.out.unflatten(1, (-1, group))
    sources = (held.keys, codes[0], held.values, codes[1])
    for p, k, k_hat, v, v_hat in zip(weights, *(doubles(x) for x in sources), strict=True):
        p_sigma = p * scale**2 * torch.einsum("skgd,nkd->skgn", square, (k_hat - k).square())
        spread = torch.einsum("skgn,nkd->skgd", p_sigma, v.square())
        spread += p_sigma.sum(-1, keepdim=True) * out.square() - 2 * out * torch.einsum("skgn,nkd->skgd", p_sigma, v)
        total += (spread + torch.einsum("skgn,nkd->skgd", p, (v_hat - v).square())).flatten(1, 2)
    return total.clamp(min=0).sum(-1).sqrt()


# --------------------------------------------------------------------------- one layer, and all


def layer_errors(arm: Cached, layer: int, held: Recorded) -> dict[str, Tensor]:
    """Errors of one layer and kind of cache, FP64 [S, H] each; query s sees all keys but S - 1 - s."""
    scale = 1 / math.sqrt(held.q.shape[2])
    queries, keys = len(held.q), len(held.keys)
    lengths = torch.arange(keys - queries + 1, keys + 1, device=held.q.device).int()
    pages = stored(arm, layer, held)
    codes = decoded(pages, keys, arm.offset(layer))
    true = exact(held.q, held.keys, held.values, lengths, scale)
    hat = exact(held.q, *codes, lengths, scale)
    got = read(pages, held.q, lengths, scale).double()
    plain = 2.0**-8 if pages.format is None else 2.0**-11
    allowed = 2.0**-8 * hat.out.abs() + plain * hat.mass + 2.0**-38 * keys * codes[1].abs().max()
    size = true.out.norm(dim=-1)
    expected = budget(held.q, held, codes, true, scale)
    return {
        "format": (hat.out - true.out).norm(dim=-1) / size, "kernel": (got - hat.out).norm(dim=-1) / size,
        "total": (got - true.out).norm(dim=-1) / size, "bound": ((got - hat.out).abs() / allowed).amax(-1),
        "budget": expected / size,
    }  # fmt: skip


def long_keys(
    model: ServedModel,
    windows: Tensor,
    calibration_texts: Tensor,
    counts: Sequence[int],
    *,
    queries: int = 16,
    kinds: Sequence[str] = LONG_KINDS,
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """All layers, over the last `counts` keys each. windows: tokens [W, T], as `record` wants them."""  # fmt: skip
    calibration = Calibration.of(model, calibration_texts)
    out: dict[str, Any] = {}
    for count in counts:
        recorded = record(model, windows, count, queries)
        for name in kinds:
            arm = Cached(model, KINDS[name], calibration)
            found = [layer_errors(arm, i, held) for i, held in enumerate(recorded)]
            row = {what: torch.stack([each[what] for each in found]) for what in found[0]}
            out.setdefault(str(count), {})[name] = told(row)
            say(f"{count} keys, {name}: total {row['total'].median():.2%}, bound {row['bound'].max():.2f}")
    return {"queries": queries, "layers": len(model.layers), "keys": out}


def told(row: dict[str, Tensor]) -> dict[str, Any]:
    """Medians, 95th percentiles and maxima over layers, queries and heads."""
    out: dict[str, Any] = {}
    for what in ("format", "kernel", "total", "budget"):
        flat = row[what].flatten()
        out[what] = {"median": float(flat.median()), "p95": float(flat.quantile(0.95)), "max": float(flat.max())}
    ratio = (row["format"].square().mean((1, 2)) / row["budget"].square().mean((1, 2)).clamp(min=1e-300)).sqrt()
    out["of_budget"] = {"median": float(ratio.median()), "max": float(ratio.max())}
    out["bound_share"] = float(row["bound"].max())
    return out
