"""Fused kernels on a Hopper GPU: the bytes of the reference where the values are exact (norm, rope, across), and
everywhere the bytes of quantizing what the same kernels store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8.fused import (
    Codes,
    Heads,
    Target,
    across,
    activation,
    activation_backward,
    norm,
    norm_across,
    norm_backward,
    rope,
    rope_backward,
)
from fp8.fused.activation import reference as activations
from fp8.fused.norm import reference as norms
from fp8.fused.rope import reference as ropes
from fp8.fused.target import quantized
from fused_cases import TARGETS, differing, hard, target

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def cuda(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cuda()


def on_gpu(into: Target) -> Target:
    return into.with_scale(cuda(into.scale))


def again(into: Target, scale: Tensor) -> Target:
    return into.with_scale(scale if str(into.tile) == "tensor" else None)


@pytest.mark.parametrize("which", TARGETS)
@pytest.mark.parametrize(("rows", "cols", "dtype"), [(256, 512, BF16), (304, 1024, torch.float32), (48, 4096, BF16)])
def test_norm_equals_the_reference_in_bytes(which: tuple, rows: int, cols: int, dtype: torch.dtype) -> None:
    into = target(*which)
    x, branch, weight = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).bfloat16(), torch.randn(cols)
    for add in (None, branch):
        h, rstd, want = norms.norm(x, add, weight, 1e-5, BF16, into)
        h_gpu, rstd_gpu, got = norm(x.cuda(), cuda(add), weight.cuda(), 1e-5, BF16, on_gpu(into))
        assert torch.equal(h, h_gpu.cpu())
        assert torch.equal(rstd, rstd_gpu.cpu())
        assert isinstance(want, Codes)
        assert isinstance(got, Codes)
        assert differing(want, got) == {}
        turned = norms.norm_across(h, rstd, weight, BF16, again(into, want.scale), want.keys_t)
        made = norm_across(h_gpu, rstd_gpu, weight.cuda(), BF16, again(on_gpu(into), got.scale), got.keys_t)
        assert differing(turned, made, ("codes_t", "scale_t")) == {}


def test_gradients_of_a_norm_are_those_of_the_reference_but_for_the_order_of_sums() -> None:
    dy, x, past, weight = (torch.randn(s).bfloat16() for s in ((304, 1024), (304, 1024), (304, 1024), (1024,)))
    _, rstd, _ = norms.norm(x, None, weight, 1e-5, BF16, None)
    for residual in (None, past):
        want = norms.norm_backward(dy.float(), x.float(), rstd, weight.float(), residual)
        got = norm_backward(dy.cuda(), x.cuda(), rstd.cuda(), weight.cuda(), cuda(residual))
        for a, b in zip(want, got, strict=True):
            assert float((a.float() - b.cpu().float()).norm() / a.float().norm()) < 2.0**-8


@pytest.mark.parametrize("which", TARGETS)
@pytest.mark.parametrize(("batch", "tokens", "heads"), [
    (2, 64, Heads(4, 2, 32, 1e4)), (1, 256, Heads(4, 1, 128, 5e5)), (16, 10, Heads(2, 2, 64, 1e4, 7)),
    (2, 64, Heads(2, 1, 128, None)),
])  # fmt: skip
def test_rope_and_its_backward_equal_the_reference_in_bytes(
    which: tuple, batch: int, tokens: int, heads: Heads
) -> None:
    into = target(*which)
    qkv = torch.randn(batch * tokens, heads.total * heads.dim).bfloat16()
    assert torch.equal(ropes.rope(qkv, tokens, heads), rope(qkv.cuda(), tokens, heads).cpu())
    if str(into.tile) == "1x128" and heads.dim != 128:
        pytest.skip("tiles of 128 want heads of 128 channels")
    dq = hard((batch, tokens, heads.queries, heads.dim)).transpose(1, 2)  # as cuDNN gives it
    dk, dv = (hard((batch, heads.keys, tokens, heads.dim), seed) for seed in (1, 2))
    want = ropes.rope_backward(dq, dk, dv, heads, into)
    got = rope_backward(dq.cuda(), dk.cuda(), dv.cuda(), heads, on_gpu(into))
    assert isinstance(want, Codes)
    assert isinstance(got, Codes)
    assert differing(want, got) == {}


@pytest.mark.parametrize(("function", "gated"), [("silu", True), ("gelu", True), ("gelu", False), ("relu", False)])
def test_activations_are_within_a_unit_in_the_last_place_of_float64(function: str, gated: bool) -> None:
    """Of BF16, and where gelu cancels, within 2^-24 of its input's size."""
    x, dh = (torch.randn(128, 512 if gated else 256) * 3).bfloat16(), torch.randn(128, 256).bfloat16()
    exact = activations.FUNCTIONS[function]
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, 1) if gated else (wide, torch.ones((), dtype=torch.float64))
    want = exact(gate) * up
    want.backward(dh.double())
    got = activation(x.cuda(), function, gated, None).double().cpu()  # type: ignore[union-attr]
    assert off(got, want.detach(), (gate * up).abs().detach()) <= 1
    slope = activation_backward(dh.cuda(), x.cuda(), function, gated, None)[0].double().cpu()  # type: ignore[union-attr]
    size = (dh.double() * (up.abs() + gate.abs() * up.abs() + gate.abs())).detach().abs()
    assert off(slope, wide.grad, torch.cat([size, size], 1) if gated else size) <= 1  # type: ignore[arg-type]


def off(got: Tensor, want: Tensor, size: Tensor) -> float:
    """The largest error in units in the last place of BF16, of which 2^-22 of `size` is allowed beyond."""
    unit = torch.ldexp(torch.ones_like(want), torch.frexp(want.abs().clamp(min=2.0**-126)).exponent - 8)
    return float(((got - want).abs() / (unit + size.abs() * 2.0**-22)).max())


@pytest.mark.parametrize("which", TARGETS)
@pytest.mark.parametrize(("rows", "width", "function", "gated"), [
    (256, 256, "silu", True), (304, 160, "gelu", True), (128, 384, "relu", False), (64, 128, "gelu", False),
])  # fmt: skip
def test_codes_of_an_activation_are_those_of_what_it_stores(
    which: tuple, rows: int, width: int, function: str, gated: bool
) -> None:
    into = target(*which)
    if str(into.tile) == "1x128" and width % 128:
        pytest.skip("tiles of 128 want a width of 128s")
    x, dh = hard((rows, 2 * width if gated else width)).cuda(), hard((rows, width), 1).cuda()
    h = activation(x, function, gated, None)
    dx, _ = activation_backward(dh, x, function, gated, None)
    assert isinstance(h, Tensor)
    assert isinstance(dx, Tensor)
    forward = activation(x, function, gated, on_gpu(into))
    assert isinstance(forward, Codes)
    assert differing(quantized(h.cpu(), into, across=False), forward) == {}
    used = again(on_gpu(into), forward.scale)
    grad, turned = activation_backward(dh, x, function, gated, on_gpu(into), used, forward.keys_t)
    assert isinstance(grad, Codes)
    assert turned is not None
    assert differing(quantized(dx.cpu(), into), grad) == {}
    scale = None if used.scale is None else used.scale.cpu()
    assert differing(quantized(h.cpu(), into.with_scale(scale), down=False), turned, ("codes_t", "scale_t")) == {}


@pytest.mark.parametrize(
    ("tile", "other"), [("tensor", "row"), ("row", "tensor"), ("1x128", "tensor"), ("row", "1x128")]
)
def test_the_products_around_an_activation_may_have_other_tiles(tile: str, other: str) -> None:
    """As with an override of `*.mlp.down`."""
    x, dh = hard((256, 512)).cuda(), hard((256, 256), 1).cuda()
    into, h_into = (target("e4m3", name, True, None, "cuda") for name in (tile, other))
    h = activation(x, "silu", True, h_into)
    assert isinstance(h, Codes)
    used = again(h_into, h.scale)
    grad, turned = activation_backward(dh, x, "silu", True, into, used, h.keys_t)
    same, _ = activation_backward(dh, x, "silu", True, into, again(into, torch.ones(1, 1, device="cuda")))
    values = activation(x, "silu", True, None).cpu()  # type: ignore[union-attr]
    assert differing(same, grad) == {}  # type: ignore[arg-type]
    scale = None if used.scale is None else used.scale.cpu()
    want = quantized(values, h_into.with_scale(scale), down=False)
    assert differing(want, turned, ("codes_t", "scale_t")) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(256, 384), (48, 176), (16, 16)])
def test_across_equals_the_reference_in_bytes(format: str, shape: tuple[int, int]) -> None:
    into, x = target(format, "tensor", True, 0.5), hard(shape)
    assert differing(quantized(x, into, down=False), across(x.cuda(), on_gpu(into)), ("codes_t",)) == {}


def test_captured_kernels_give_the_same_bytes_at_every_replay() -> None:
    into, x = target("e5m2", "tensor", True, None, "cuda"), hard((256, 512)).cuda()
    dh = hard((256, 256), 1).cuda()
    run = lambda: activation_backward(dh, x, "silu", True, into, target("e4m3", "tensor", True, 0.5, "cuda"))  # noqa: E731
    want, want_h = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, got_h = run()
    for _ in range(3):
        graph.replay()
        assert differing(want, got) == {}  # type: ignore[arg-type]
        assert differing(want_h, got_h, ("codes_t",)) == {}  # type: ignore[arg-type]


def test_views_that_begin_anywhere_are_read_as_what_they_are() -> None:
    """Weights and gradients may be views into one flat buffer, or every second column of something."""
    into, x = target("e4m3", "tensor", True, 0.5, "cuda"), hard((64, 256)).cuda()
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    wide = torch.stack([x, x], -1)[..., 0]
    weight, rstd = torch.randn(256, device="cuda"), torch.rand(64, device="cuda")
    for view in (odd, wide):
        assert differing(across(x, into), across(view, into), ("codes_t",)) == {}
        a, b = (activation(t, "silu", True, into) for t in (x, view))
        assert differing(a, b) == {}  # type: ignore[arg-type]
        a, b = (norm_across(t, rstd, weight, BF16, into) for t in (x, view))
        assert differing(a, b, ("codes_t",)) == {}
        dx, want = (norm_backward(x, t, rstd, weight, None)[0] for t in (view, x))
        assert torch.equal(dx.isnan(), want.isnan())
        assert torch.equal(dx.nan_to_num(), want.nan_to_num())
    q = torch.randn(1, 1, 64, 64, device="cuda").bfloat16()
    odd_q = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    heads = Heads(1, 1, 64, 1e4)
    assert torch.equal(rope_backward(q, q, q, heads, None), rope_backward(odd_q, odd_q, odd_q, heads, None))  # type: ignore[arg-type]
