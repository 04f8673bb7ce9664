"""Rounded operands, straight gradients: one layer of quantization-aware training at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp8
from fp8.checkpoint import Scales
from fp8.nn.fake_quantize import MeasuredScale

SCHEMES = ("dynamic", "static", "block", "weight-only")


def pair(scheme: str, **keywords):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 160))
    fp8.prepare_qat(model, scheme, **keywords)
    return model, torch.randn(3, 5, 192, requires_grad=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_straight_through(scheme: str, dtype: torch.dtype) -> None:
    """That of a plain product of the rounded operands, to the bit: rounding itself has the derivative 1."""
    model, x = pair(scheme)
    model, x = model.to(dtype), x.detach().to(dtype).requires_grad_()
    layer = model[0]
    y = model(x)
    g = torch.randn_like(y)
    y.backward(g)
    tile = {"static": "tensor", "block": (1, 128)}.get(scheme, "row")
    inputs = x.detach() if scheme == "weight-only" else fp8.quantize(x, "e4m3", tile).dequantize(dtype)
    weight = layer.quantized_weight().dequantize(dtype).requires_grad_()
    inputs.requires_grad_()
    plain = F.linear(inputs.flatten(0, 1), weight, layer.bias.detach())
    plain.backward(g.flatten(0, 1))
    assert torch.equal(y.flatten(0, 1), plain)
    assert torch.equal(x.grad.flatten(0, 1), inputs.grad.flatten(0, 1))  # type: ignore[union-attr]
    assert torch.equal(layer.weight.grad, weight.grad)
    assert torch.allclose(layer.bias.grad, g.sum((0, 1)), atol=1e-5, rtol=1e-2)


def test_a_saturated_value_keeps_its_gradient() -> None:
    """Under a scale of 2^-10 all that is above 0.4375 is clipped; its gradient is that of any other."""
    model, x = pair("static", scales=Scales({"0": 2.0**-10}))
    y = model(x)
    y.sum().backward()
    weight = model[0].quantized_weight().dequantize()
    assert (x.detach().abs() > 448 * 2.0**-10).float().mean() > 0.5
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-4)  # type: ignore[arg-type]


def test_what_lives_to_the_backward_is_a_byte_an_element() -> None:
    model, x = pair("dynamic")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert sum(t.nbytes for t in kept) == (15 * 192 + 160 * 192) + 4 * (15 + 160)


def test_a_frozen_weight_gets_no_gradient_and_its_input_does() -> None:
    model, x = pair("dynamic")
    model.requires_grad_(False)
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad is not None


def test_layers_that_share_a_scale_are_quantized_as_one() -> None:
    """Per tensor, q, k and v have the scale of the largest of the three, as servers that join them need."""
    model = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model["k_proj"].weight.data *= 40  # type: ignore[union-attr, operator]
    fp8.prepare_qat(model, "static")
    scales = {name: float(layer.quantized_weight().scale) for name, layer in model.items()}  # type: ignore[operator]
    assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"] > scales["o_proj"]


def test_attention_and_convolutions_are_rounded_too_and_serve_codes() -> None:
    """After `finalize` every product is one of codes, and near what training computed."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.Sequential(encoder, nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 3, 3))
    x = torch.randn(2, 6, 32)
    plain = model.eval()(x).detach()
    report = fp8.prepare_qat(model).trace(model, x)
    assert set(report.converted) == {"0.self_attn", "0.linear1", "0.linear2", "2"} and "NOT RUN" not in str(report)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    rounded = model.eval()(x).detach()
    with fp8.count_products() as products, torch.no_grad():
        served = fp8.finalize(model)(x)
    assert products.layers() == {"0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1", "0.linear2", "2"}
    assert 1e-3 < float((rounded - plain).norm() / plain.norm()) < 0.2
    assert float((served - rounded).norm() / plain.norm()) < 0.02
    assert torch.equal(fp8.revert(model)(x), plain)


def test_without_autocast_it_is_a_plain_layer() -> None:
    model, x = pair("dynamic")
    with fp8.autocast(enabled=False):
        assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))


def test_measured_scales_are_of_the_largest_magnitude_and_never_cast() -> None:
    scale = MeasuredScale(2, power_of_two=True)
    assert scale(torch.tensor([448.0, 449.0])).tolist() == [1.0, 2.0]
    assert scale(torch.tensor([1.0, 897.0])).tolist() == [1.0, 4.0]
    assert scale.eval()(torch.tensor([1e9, 1e9])).tolist() == [1.0, 4.0]
    assert scale.to(torch.bfloat16).seen.dtype == torch.float32 and scale.seen[1] == 897.0
    assert MeasuredScale(1, power_of_two=False)(torch.tensor([3.0])).item() == torch.tensor(3.0).div(448).item()
    assert list(scale.state_dict()) == []


def test_nothing_non_finite_is_hidden() -> None:
    """NaN in is NaN out, in its rows only; and it enters no measured scale."""
    model, x = pair("static")
    x = x.detach()
    x[0, 0, 0] = torch.nan
    y = model(x)
    assert y[0, 0].isnan().all() and y.flatten(0, 1)[1:].isfinite().all()
    assert model[0].fp8.inputs.seen.isfinite().all()


def test_a_block_that_is_prepared_runs_in_no_fused_kernel() -> None:
    layer = fp8.TransformerLayer(64, 128, 4, norm="rmsnorm", bias=False, causal=True)
    linears = (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down)
    norms, halves, x = (layer.attention_norm, layer.mlp_norm), (layer.attention, layer.mlp), torch.randn(1, 16, 64)
    why = lambda: fp8.nn.fused.why_not_shape(x, norms, linears, halves, 16)  # noqa: E731
    assert why() is None
    fp8.prepare_qat(layer, kv="token")
    assert "quantization-aware" in str(why()) and "FP8 cache" in str(layer.why_not_fused(x))
