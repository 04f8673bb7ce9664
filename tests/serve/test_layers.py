"""The calls of a served layer: what each of them rounds, and that an FP8 layer quantizes what the file says."""

from __future__ import annotations

import pytest
import torch

import fp8
from fp8.checkpoint.quantize import SCHEMES, quantize_weight
from fp8.nn.frozen_linear import FrozenLinear
from fp8.serve.models import layers
from fp8.serve.models.layers import Linear, Norm, gated_linear_add, linear_add, norm_linear, norm_logits
from paged_batches import bits

T, K, N = 21, 128, 48


def frozen(scheme, rows=N, bias=True):
    torch.manual_seed(2)
    scheme, weight = SCHEMES[scheme], torch.randn(rows, K).bfloat16()
    q = quantize_weight(weight, scheme)
    scale = torch.tensor([[0.03125]]) if scheme.inputs == "static" else None
    added = torch.randn(rows).bfloat16() if bias else None
    only = scheme.inputs == "none"
    return FrozenLinear(q, scheme.recipe(q.tile), added, input_scale=scale, weight_only=only)


def given_rows(width=K):
    torch.manual_seed(1)
    return (2 * torch.randn(T, width)).bfloat16(), Norm(torch.rand(K).bfloat16() + 0.5, 1e-5)


def exact(x, weight, bias=None):
    """The product in FP64."""
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def ulps(y, need):
    """The largest distance from `need`, in units of its last place in the type of y."""
    step = torch.finfo(y.dtype).eps * need.abs().clamp(min=1e-3).log2().floor().exp2()
    return float(((y.double() - need).abs() / step).max())


def rms(h, norm):
    x = h.double()
    rstd = 1 / (x.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return x * rstd * norm.weight.double()


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block"])
def test_an_fp8_product_is_that_of_the_layer_on_values_rounded_to_bf16(scheme):
    (h, norm), linear = given_rows(), frozen(scheme)
    rounded = layers.normed(h, norm)
    assert rounded.dtype == torch.bfloat16
    assert ulps(rounded, rms(h, norm)) <= 0.5 + 2**-14
    assert torch.equal(bits(norm_linear(h, norm, linear)[0]), bits(linear(rounded)))
    residual = torch.randn(T, N).bfloat16()
    assert torch.equal(bits(linear_add(h, linear, residual)), bits((residual.float() + linear(h).float()).bfloat16()))


@pytest.mark.parametrize("kind", ["dynamic", "static", "block", "bf16"])
def test_a_sum_that_the_norm_adds_is_the_sum(kind):
    (h, norm), y = given_rows(), torch.randn(T, K).bfloat16()
    linear = Linear(torch.randn(N, K).bfloat16()) if kind == "bf16" else frozen(kind)
    found, need = norm_linear(layers.Sum(h, y), norm, linear), norm_linear(h + y, norm, linear)
    assert all(torch.equal(bits(ours), bits(theirs)) for ours, theirs in zip(found, need, strict=True))
    assert torch.equal(layers.settled(layers.Sum(h, y)), h + y)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "block"])
def test_the_gate_is_rounded_once_and_then_quantized(scheme):
    (both, _), linear = given_rows(2 * K), frozen(scheme, bias=False)
    gate, up = both.double().chunk(2, 1)
    h = layers.gated(both)
    assert ulps(h, gate * gate.sigmoid() * up) <= 0.5 + 2**-10
    residual = torch.randn(T, N).bfloat16()
    need = (residual.float() + linear(h).float()).bfloat16()
    assert torch.equal(bits(gated_linear_add(both, linear, residual)), bits(need))


def test_activations_are_quantized_at_every_number_of_rows():
    (h, _), linear = given_rows(), frozen("dynamic")
    codes = fp8.quantize(h, "e4m3", "row")
    for rows in (1, 2, 7, T):
        y = layers.product(h[:rows], linear)
        part = fp8.Quantized(codes.codes[:rows], codes.scale[:rows], codes.tile, codes.format)
        assert torch.equal(y, fp8.matmul(part, linear.quantized_weight(), bias=linear.bias))


@pytest.mark.parametrize("kind", ["bf16", "weight-only"])
def test_a_product_in_high_precision_sums_in_fp32_and_rounds_once(kind):
    h, _ = given_rows()
    only = frozen("weight-only")
    weight = only.quantized_weight().dequantize(torch.bfloat16)
    linear = only if kind == "weight-only" else Linear(weight, only.bias)
    need = exact(h, weight, only.bias)
    near = K * 2**-24 * (h.double().abs() @ weight.double().abs().t() + 1)  # any order of FP32 sums
    assert ((layers.product(h, linear, torch.float32).double() - need).abs() <= near).all()
    assert ((layers.product(h, linear).double() - need).abs() <= near + 2**-8 * need.abs()).all()


def test_logits_are_not_rounded_to_bf16():
    h, norm = given_rows()
    for linear in (frozen("dynamic"), Linear(torch.randn(N, K).bfloat16())):
        logits = norm_logits(h, norm, linear)
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
        assert torch.equal(logits.bfloat16(), norm_linear(h, norm, linear)[0])


def test_no_rows_are_no_rows():
    h, norm = given_rows()
    for linear in (frozen("dynamic"), Linear(torch.randn(N, K).bfloat16())):
        assert norm_logits(h[:0], norm, linear).shape == (0, N)
