"""`fp8.Conv2d` is the FP8 product of im2col rows and the flattened weight, for every geometry that torch has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fp8
from fp8.errors import ConfigError, ShapeError

GEOMETRIES = [
    {},
    {"stride": 2},
    {"stride": (1, 3), "padding": (2, 1)},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": 1},
    {"kernel_size": (2, 4), "padding": "same"},
    {"dilation": (2, 1), "padding": 2, "stride": 2},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"padding": 1, "padding_mode": "replicate", "bias": False},
    {"padding": "same", "padding_mode": "circular"},
]


def layers(geometry: dict, recipe: str | None = "tensorwise") -> tuple[fp8.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    settings = {"kernel_size": 3, **geometry}
    ours, theirs = fp8.Conv2d(4, 6, recipe=recipe, **settings), nn.Conv2d(4, 6, **settings)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_is_torchs(geometry: dict) -> None:
    """With inputs and weights that are E4M3 codes under the scale 1, quantizing changes nothing: only the order of the
    sum differs from torch. The gradients of x and of the weight likewise, for output gradients that are codes."""
    ours, theirs = layers(geometry)
    with torch.no_grad():
        for parameter in (ours.weight, theirs.weight):
            parameter.copy_((parameter * 100).round().clamp(-8, 8))
    x = torch.randint(-8, 9, (2, 4, 9, 11)).float()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y, z = ours(xs[0]), theirs(xs[1])
    assert y.shape == z.shape
    assert torch.allclose(y, z, rtol=1e-6, atol=1e-5)
    grad = torch.randint(-3, 4, y.shape).float()
    y.backward(grad)
    z.backward(grad)
    assert torch.allclose(xs[0].grad, xs[1].grad, rtol=1e-6, atol=1e-5)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_it_is_the_convolution_of_the_dequantized_operands(recipe: str, geometry: dict) -> None:
    """im2col rows are quantized as rows are, and the weight as [O, I * kh * kw]."""
    ours, _ = layers(geometry, recipe)
    x, rule = torch.randn(2, 4, 9, 11), fp8.Recipe.of(recipe)
    rows = F.unfold(x, ours.kernel_size, ours.dilation, ours.padding, ours.stride).transpose(1, 2)
    a = fp8.quantize(rows.reshape(-1, rows.shape[-1]), tile=rule.x.tile)
    b = fp8.quantize(ours.weight.flatten(1), tile=rule.w.tile)
    expected = fp8.matmul(a, b, torch.float32, bias=ours.bias).view(2, -1, 6).transpose(1, 2)
    assert torch.equal(ours(x), expected.reshape(ours(x).shape))
    quantized = ours.quantized_weight()
    assert torch.equal(quantized.codes.view(torch.uint8), b.codes.view(torch.uint8))


def test_one_image_without_a_batch_is_a_batch_of_one() -> None:
    ours, _ = layers({"padding": 1})
    x = torch.randn(4, 7, 7)
    assert torch.equal(ours(x), ours(x.unsqueeze(0)).squeeze(0))


def test_bf16_under_autocast_and_channels_last() -> None:
    ours, _ = layers({"padding": 1})
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    y = ours(x)
    last = ours.to(memory_format=torch.channels_last)
    assert torch.equal(last(x.to(memory_format=torch.channels_last)), y)
    fp8.refresh(last)
    assert torch.equal(last(x), y)


def test_groups_and_autocast_off_run_torchs_convolution() -> None:
    ours, theirs = layers({}, None)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(ours(x), theirs(x))
    grouped = fp8.Conv2d(4, 6, 3, groups=2)
    with fp8.count_products() as products, fp8.autocast():
        grouped(x)
    assert not products.counts
    with pytest.raises(ConfigError, match="leave out recipe='rowwise'"):
        fp8.Conv2d(4, 6, 3, groups=2, recipe="rowwise")


def test_an_input_of_another_shape_is_refused_by_name() -> None:
    ours, _ = layers({})
    for shape in ((2, 5, 9, 9), (9, 9), (1, 2, 4, 9, 9)):
        with pytest.raises(ShapeError, match=r"takes \[batch, 4, height, width\]"):
            ours(torch.ones(shape))


def test_products_are_counted_and_codes_saved() -> None:
    ours, _ = layers({})
    saved = []
    with (
        fp8.count_products() as products,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = ours(torch.randn(2, 4, 9, 9, requires_grad=True))
    y.sum().backward()
    assert products.counts == {("", product): 1 for product in ("forward", "grad_x", "grad_w")}
    assert {t.dtype for t in saved} == {torch.float8_e4m3fn, torch.float32}
    assert all(t.numel() == 1 for t in saved if t.dtype == torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_pixels_that_lie_as_rows_are_multiplied_as_they_lie(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 x 1 kernel: the same bits for either memory format, forward and backward; channels last copies nothing."""
    torch.manual_seed(0)
    layer = fp8.Conv2d(32, 48, 1, bias=bias, recipe="tensorwise")
    x = torch.randn(2, 32, 8, 8)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        if form is torch.channels_last:
            monkeypatch.setattr(torch.nn.functional, "unfold", None)  # calling it fails
        given = x.clone(memory_format=form).requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad, layer.weight.grad))
        layer.weight.grad = None
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
