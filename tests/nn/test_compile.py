"""Under `torch.compile` a layer is one graph without a break, and gives what it gives without: outputs, gradients,
state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise", "delayed_article")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(recipe: str | None) -> fp8.TransformerLayer:
    return fp8.TransformerLayer(
        32,
        48,
        4,
        num_kv_heads=2,
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        causal=True,
        rope_theta=1e4,
        recipe=recipe,
    )


def make(kind: str, recipe: str | None) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    return (fp8.Linear(32, 24, recipe=recipe) if kind == "linear" else block(recipe)), 32


def results(module: nn.Module, call, x: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize(
    ("kind", "recipe"), [("linear", recipe) for recipe in RECIPES] + [("layer", recipe) for recipe in RECIPES[:4]]
)
def test_one_graph_gives_the_bits_of_eager(kind: str, recipe: str) -> None:
    """`fullgraph=True` fails at a break. Three steps, so that delayed scaling warms up and its graph changes once."""
    eager, width = make(kind, recipe)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = torch.randn(2, 6, width) * (step + 1)
        for a, b in zip(results(eager, eager, x), results(other, compiled, x), strict=True):
            assert torch.equal(a, b)
        fp8.update_scales(eager)
        fp8.update_scales(other)
    for a, b in zip(eager.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_autocast_inside_or_around_the_graph_is_the_same() -> None:
    layer, width = make("linear", None)
    x = torch.randn(4, width)

    def inside(x: Tensor) -> Tensor:
        with fp8.autocast(recipe="rowwise"):
            return layer(x)

    with fp8.autocast(recipe="rowwise"):
        expected = layer(x)
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)
    around = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plain = around(x)
    with fp8.autocast(recipe="rowwise"):
        assert torch.equal(around(x), expected)  # a guard on the active recipe compiles another graph
    assert torch.equal(around(x), plain)
    assert not torch.equal(plain, expected)


def test_held_weight_codes_are_used_in_the_graph() -> None:
    layer, width = make("linear", "blockwise")
    fp8.refresh(layer)
    eager = layer(torch.ones(3, width))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3, width)), eager)
    with torch.no_grad():
        layer.weight.mul_(2)
    fp8.refresh(layer)
    assert torch.equal(compiled(torch.ones(3, width)), layer(torch.ones(3, width)))


def test_attach_keeps_a_compiled_model_equal_to_eager_over_steps() -> None:
    """AdamW, delayed scaling and held codes: five steps, the same weights."""
    eager, width = make("linear", "delayed")
    other = copy.deepcopy(eager)
    for module, call in ((eager, eager), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        fp8.attach(module, optimizer)
        for step in range(5):
            optimizer.zero_grad()
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(step))
            call(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(eager.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_forward_that_no_backward_followed_gives_the_gradient_no_scale() -> None:
    """Its graph announces a gradient that never came. The next, far below what scale 1 can show, measures itself."""
    eager, width = make("linear", "delayed")
    other = copy.deepcopy(eager)
    x, tiny = torch.randn(4, width), torch.full((4, 24), 1e-9)
    gradients = []
    for module, call in ((eager, eager), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        call(x)
        fp8.update_scales(module)
        assert module.fp8.delayed.filled == [1, 1, 0]  # type: ignore[union-attr]
        call(x).backward(tiny)
        fp8.update_scales(module)
        assert module.fp8.delayed.filled == [2, 2, 1]  # type: ignore[union-attr]
        gradients.append(module.weight.grad)
    assert gradients[0].count_nonzero() > 0.9 * gradients[0].numel()
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("kind", "device"),
    [("linear", "cpu"), *(pytest.param(kind, "cuda", marks=pytest.mark.gpu) for kind in ("linear", "layer"))],
)
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled on the fly:UserWarning")  # torch 2.11's inductor
def test_inductor_compiles_around_the_operators_and_never_into_them(kind: str, device: str) -> None:
    """Its own fusions may round otherwise, so a whole layer is compared loosely; a linear layer, which is operators
    only, is compared in bits."""
    eager, width = make(kind, "tensorwise")
    eager.to(device)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    x = torch.randn(2, 6, width, device=device)
    for a, b in zip(results(eager, eager, x), results(other, compiled, x), strict=True):
        if kind == "linear" and a.dim() > 1:
            assert torch.equal(a, b)
        assert float((a - b).norm() / a.norm()) < 0.02


def test_quantize_and_matmul_compile_on_their_own() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        a, b = fp8.quantize(x, tile=(1, 128)), fp8.quantize_both(w, tile=(128, 128))[0]
        return fp8.matmul(a, b, torch.float32) + fp8.quantize(x, rounding="stochastic", seed=7).dequantize().sum()

    x, w = torch.randn(3, 200), torch.randn(40, 200)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, w), f(x, w))


@pytest.mark.parametrize("tile", ["tensor", "row", "1x128", "128x128", "1x32"])
@pytest.mark.parametrize("shape", [(5, 131), (0, 4)])
def test_the_fake_kernels_tell_the_truth(tile: str, shape: tuple[int, int]) -> None:
    """Shapes, types and strides that the compiler is told are those that come."""
    x = torch.randn(shape)
    for seed in (None, 3):
        arguments = (x, None, "e4m3", tile, True, seed, 0)
        for operator in (torch.ops.fp8.quantize.default, torch.ops.fp8.quantize_both.default):
            torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])


def test_delayed_scaling_without_an_own_recipe_says_why_it_cannot_compile() -> None:
    layer, width = make("linear", None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="give the layer its recipe"), fp8.autocast(recipe="delayed"):
        compiled(torch.randn(2, width))
