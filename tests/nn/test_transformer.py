"""`fp8.TransformerLayer` against the same block written out with torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fp8
from fp8.errors import ConfigError, Fp8Error, ShapeError
from fp8.fused import Heads
from fp8.fused.rope.reference import rotate

SETTINGS = {
    "as the articles call it": {},
    "llama": {
        "num_kv_heads": 2,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "causal": True,
        "rope_theta": 1e4,
    },
    "one key head": {"num_kv_heads": 1, "activation": "relu"},
    "geglu": {"activation": "geglu", "rope_theta": 100.0},
}
HIDDEN, FFN, HEADS, D = 32, 48, 4, 8


def layer(name: str, recipe: str | None = None) -> fp8.TransformerLayer:
    torch.manual_seed(0)
    return fp8.TransformerLayer(HIDDEN, FFN, HEADS, recipe=recipe, **SETTINGS[name])


def written_out(module: fp8.TransformerLayer, x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """x + out(attention(norm(x))), then + down(act(up(norm(x)))): one head at a time, float64."""
    module = module.double()
    x = x.double()
    qkv = module.attention.qkv
    h = F.linear(module.attention_norm(x), qkv.weight, qkv.bias)
    kv = module.attention.kv_heads
    q, k, v = h.split([HEADS * D, kv * D, kv * D], -1)
    heads = []
    for i in range(HEADS):
        j = i // (HEADS // kv)
        a, b, c = q[..., i * D : (i + 1) * D], k[..., j * D : (j + 1) * D], v[..., j * D : (j + 1) * D]
        if module.attention.rope_theta:
            a, b = turned(a, module.attention.rope_theta), turned(b, module.attention.rope_theta)
        scores = a @ b.transpose(-1, -2) / math.sqrt(D)
        if module.attention.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        heads.append(scores.softmax(-1) @ c)
    out, up, down = module.attention.out, module.mlp.up, module.mlp.down
    x = x + F.linear(torch.cat(heads, -1), out.weight, out.bias)
    h = F.linear(module.mlp_norm(x), up.weight, up.bias)
    act = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu, "geglu": F.gelu}[module.mlp.activation]
    if module.mlp.activation.endswith("glu"):
        gate, other = h[..., :FFN], h[..., FFN:]
        h = act(gate) * other
    else:
        h = act(h)
    return x + F.linear(h, down.weight, down.bias)


def turned(x: Tensor, theta: float) -> Tensor:
    """Channels (i, i + D/2) as a complex number, times e^(i angle)."""
    angle = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(D // 2).double() * 2 / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_high_precision_it_is_the_block_written_out(name: str) -> None:
    module, x = layer(name), torch.randn(2, 6, HIDDEN)
    y = module(x)
    assert torch.allclose(y.double(), written_out(module, x), atol=1e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise"])
@pytest.mark.parametrize("name", SETTINGS)
def test_in_fp8_it_is_near_and_runs_twelve_products(name: str, recipe: str) -> None:
    """Four linear layers, three products each; the branch that they add is off by some 6 % in norm."""
    module, x = layer(name, recipe), torch.randn(2, 6, HIDDEN, requires_grad=True)
    with fp8.count_products() as products:
        y = module(x)
    y.square().sum().backward()
    assert sum(products.counts.values()) == 12
    exact = written_out(module.float(), x.detach())
    branch = exact - x.detach().double()
    assert float((y.detach().double() - exact).detach().norm() / branch.detach().norm()) < 0.12
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("kind", ["bool", "ones and zeros", "additive", "4-D"])
def test_a_mask_hides_keys(kind: str) -> None:
    """The last two of six keys of the second sequence: outputs of the others are those of the shorter sequence."""
    module, x = layer("as the articles call it"), torch.randn(2, 6, HIDDEN)
    allowed = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    mask = {
        "bool": allowed,
        "ones and zeros": allowed.long(),
        "additive": torch.zeros(2, 6).masked_fill(~allowed, -math.inf),
        "4-D": allowed[:, None, None, :],
    }[kind]
    y = module(x, attention_mask=mask)
    assert torch.allclose(y[1, :4], module(x[1:, :4])[0], atol=1e-5)
    assert torch.allclose(y[0], module(x[:1])[0], atol=1e-5)


def test_a_causal_layer_never_looks_ahead() -> None:
    module, x = layer("llama"), torch.randn(1, 6, HIDDEN)
    later = x.clone()
    later[:, 4:] += 100
    assert torch.allclose(module(x)[:, :4], module(later)[:, :4], atol=1e-5)


def test_rope_turns_pairs_by_position_in_fp32() -> None:
    """Position 0 is left alone; position p turns channel pair i by p * theta^(-2i/D); lengths are kept; from a later
    start the tables go on."""
    x = torch.randn(1, 1, 6, D)
    cos, sin = Heads(1, 1, D, 1e4).tables(6, x.device)
    y = rotate(x, cos, sin)
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    assert torch.allclose(y.double(), turned(x[0].double(), 1e4)[None], atol=1e-6)
    late = Heads(1, 1, D, 1e4, 4).tables(2, x.device)
    assert torch.equal(late[0], cos[4:])
    assert torch.equal(late[1], sin[4:])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_autocast_trains(recompute: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    module, x = layer("llama", "blockwise"), torch.randn(2, 6, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ConfigError, "Did you mean 'rmsnorm'", lambda: fp8.TransformerLayer(8, 8, 2, norm="rmsnrm")),
        (ConfigError, "Did you mean 'swiglu'", lambda: fp8.TransformerLayer(8, 8, 2, activation="swigl")),
        (ConfigError, "multiple of num_attention_heads=3", lambda: fp8.TransformerLayer(8, 8, 3)),
        (ConfigError, "num_kv_heads=3", lambda: fp8.TransformerLayer(8, 8, 4, num_kv_heads=3)),
        (ConfigError, "a head of 3 channels is odd", lambda: fp8.TransformerLayer(6, 8, 2, rope_theta=1e4)),
        (ShapeError, r"takes \[batch, tokens, hidden\]", lambda: fp8.TransformerLayer(8, 8, 2)(torch.randn(3, 8))),
    ],
)
def test_what_does_not_fit_is_refused(error: type[Fp8Error], words: str, make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(("heads", "kv_heads"), [(0, None), (4, 0), (-2, None), (3, None)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int | None) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of num_attention_heads"):
        fp8.TransformerLayer(8, 16, heads, num_kv_heads=kv_heads)
