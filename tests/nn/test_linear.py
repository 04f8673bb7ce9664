"""`fp8.Linear`: its three products are the products of the codes that the recipe makes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ShapeError, TensorError
from fp8.formats import format_of
from fp8.matmul.budget import budget, exact_product
from fp8.nn import products
from fp8.quantize.record import spread
from fp8.recipe import PRESETS, Accumulate, Operand, Recipe

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def quantized(x: Tensor, operand: Operand) -> tuple[fp8.Quantized, fp8.Quantized]:
    """The codes of x and of x.T, by the public door."""
    return fp8.quantize_both(x, operand.format, operand.tile)


def run(layer: nn.Module, x: Tensor, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient that is sent back (the same for every layer), and the gradient of x."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.device, y.dtype) * 1e-3
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), grad, x.grad


def way_of_adding(recipe: Recipe, product: str, device: torch.device) -> str:
    return getattr(recipe.accumulate, product) if device.type == "cuda" else "exact"


# --------------------------------------------------------------------------- the three products


@recipes
@dtypes
@pytest.mark.parametrize("shape", [(5, 40, 24), (130, 144, 160)])
def test_the_three_products_are_those_of_the_codes(
    recipe: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> None:
    """y, dx and dw against the float64 products of the same codes: only the roundings of a product may differ."""
    tokens, features, outputs = shape
    torch.manual_seed(0)
    layer = fp8.Linear(features, outputs, recipe=recipe, device=device)
    x = (torch.randn(tokens, features, device=device) * 3).to(dtype)
    y, grad, dx = run(layer, x)
    rule = Recipe.of(recipe)
    (x_q, x_t), (w_q, w_t) = quantized(x, rule.x), quantized(layer.weight, rule.w)
    g_q, g_t = quantized(grad, rule.grad)
    for product, result, a, b, bias in (
        ("forward", y, x_q, w_q, layer.bias),
        ("grad_x", dx, g_q, w_t, None),
        ("grad_w", layer.weight.grad, g_t, x_t, None),
    ):
        bound = budget(a, b, result.dtype, way_of_adding(rule, product, device), bias)
        error = (result.double() - exact_product(a, b, bias)).abs()
        assert bool((error <= bound).all()), product
    assert torch.allclose(layer.bias.grad.double(), grad.double().sum(0), rtol=1e-5)


@pytest.mark.parametrize("product", ["forward", "grad_x", "grad_w"])
def test_each_product_sums_as_the_recipe_says(product: str) -> None:
    """One of the three on the emulated fast accumulator, which drifts on positive numbers, the others exactly."""
    sums = {"forward": "exact", "grad_x": "exact", "grad_w": "exact", product: "hopper_fast"}
    torch.manual_seed(0)
    layer = fp8.Linear(300, 310, bias=False, recipe=Recipe(accumulate=Accumulate(**sums)))
    with torch.no_grad():
        layer.weight.abs_()
    x = torch.rand(320, 300, requires_grad=True)
    grad = torch.rand(320, 310)
    y = layer(x)
    y.backward(grad)
    (x_q, x_t), (w_q, w_t), (g_q, g_t) = (
        fp8.quantize_both(v, f) for v, f in ((x, "e4m3"), (layer.weight, "e4m3"), (grad, "e5m2"))
    )
    for name, result, a, b in (
        ("forward", y, x_q, w_q),
        ("grad_x", x.grad, g_q, w_t),
        ("grad_w", layer.weight.grad, g_t, x_t),
    ):
        exact, fast = (fp8.matmul(a, b, torch.float32, how) for how in ("exact", "hopper_fast"))
        assert not torch.equal(exact, fast)
        assert torch.equal(result, fast if name == product else exact)


@recipes
def test_the_products_are_within_the_budget_of_quantization(recipe: str) -> None:
    """Against the float64 products of the numbers themselves. Each operand is off by at most its half step (E4M3 2^-4,
    E5M2 2^-3 of itself, or half a subnormal), so a product by the sum of |da| |b| + |a| |db| + |da| |db|."""
    torch.manual_seed(0)
    layer = fp8.Linear(192, 160, bias=False, recipe=recipe)
    x = torch.randn(64, 192)
    y, grad, dx = run(layer, x)
    rule, w = Recipe.of(recipe), layer.weight.detach()
    for result, a, b, how_a, how_b in (
        (y, x, w, rule.x, rule.w),
        (dx, grad, w.t(), rule.grad, rule.w),
        (layer.weight.grad, grad.t(), x.t(), rule.grad, rule.x),
    ):
        assert beyond_budget(result, a, b, how_a, how_b) == 0


def beyond_budget(result: Tensor, a: Tensor, b: Tensor, how_a: Operand, how_b: Operand | None) -> int:
    """How many elements of a product of [M, K] and [N, K] are further from float64 than quantizing can explain. `how_b`
    is None where b consists of codes."""
    da, db = half_step(a, how_a), torch.zeros_like(b).double() if how_b is None else half_step(b, how_b)
    a, b = a.double(), b.double()
    bound = da @ b.abs().t() + a.abs() @ db.t() + da @ db.t() + 2.0**-23 * (a.abs() @ b.abs().t())
    return int(((result.double() - a @ b.t()).abs() > bound).sum())


def half_step(x: Tensor, how: Operand) -> Tensor:
    row, q = format_of(how.format), fp8.quantize(x, how.format, how.tile)
    smallest = row.smallest_subnormal / 2 * spread(q.scale, q.tile, *x.shape)
    return torch.maximum(x.abs() * 2.0 ** -(row.mantissa_bits + 1), smallest).double()


def test_the_budget_catches_a_wrong_scale_a_lost_bit_and_a_wrong_format() -> None:
    """Controls. With K = 1 the bound is one half step: right codes pass it, and E5M2 codes, codes without their last
    mantissa bit, and codes under a doubled scale do not."""
    x, one, how = torch.randn(200, 1), torch.ones(1, 1), Operand()
    right, unit = fp8.quantize(x), fp8.quantize(one)
    shorter = (right.codes.view(torch.uint8) & 0xFE).view(right.codes.dtype)
    cases = {
        "right": right,
        "doubled scale": fp8.Quantized(right.codes, right.scale * 2, right.tile, right.format),
        "lost bit": fp8.Quantized(shorter, right.scale, right.tile, right.format),
        "wrong format": fp8.quantize(x, "e5m2"),
    }
    wrong = {name: beyond_budget(fp8.matmul(q, unit, torch.float32), x, one, how, None) for name, q in cases.items()}
    assert wrong.pop("right") == 0
    assert min(wrong.values()) > 20


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("recipe", PRESETS)
def test_leading_dimensions_are_tokens(recipe: str, leading: tuple[int, ...]) -> None:
    layer = fp8.Linear(24, 10, recipe=recipe)
    x = torch.randn(*leading, 24)
    y, _, dx = run(layer, x)
    assert y.shape == (*leading, 10)
    assert dx.shape == x.shape
    if x.numel() and recipe != "delayed_article":
        flat, _, _ = run(fp8_copy(layer), x.reshape(-1, 24))
        assert torch.equal(y.reshape(-1, 10), flat)


def fp8_copy(layer: fp8.Linear) -> fp8.Linear:
    """A new layer with the same weights and no memory."""
    other = fp8.Linear(layer.in_features, layer.out_features, recipe=layer.recipe)
    nn.Linear.load_state_dict(other, {k: v for k, v in layer.state_dict().items() if "." not in k}, strict=False)
    return other


@pytest.mark.parametrize(
    ("needs_x", "needs_w", "products"),
    [
        (True, True, {"forward", "grad_x", "grad_w"}),
        (True, False, {"forward", "grad_x"}),
        (False, True, {"forward", "grad_w"}),
        (False, False, {"forward"}),
    ],
)
def test_only_the_products_that_are_needed_run(needs_x: bool, needs_w: bool, products: set[str]) -> None:
    layer = fp8.Linear(16, 16, recipe="tensorwise")
    layer.weight.requires_grad_(needs_w)
    x = torch.randn(4, 16, requires_grad=needs_x)
    with fp8.count_products() as counted:
        layer(x).sum().backward()
    assert {product for _, product in counted.counts} == products
    assert set(counted.counts.values()) == {1}
    assert (x.grad is not None, layer.weight.grad is not None) == (needs_x, needs_w)
    assert layer.bias.grad is not None


def test_products_are_counted_by_layer_and_role() -> None:
    """Two layers, three micro-batches, one evaluation: 4 forwards each, 3 of each gradient, but none for the input."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fp8.convert(model)
    with fp8.count_products() as products:
        for _ in range(3):
            model(torch.randn(2, 8)).sum().backward()
        with torch.no_grad():
            model(torch.randn(2, 8))
    assert products.counts == {
        ("0", "forward"): 4, ("0", "grad_w"): 3,
        ("2", "forward"): 4, ("2", "grad_w"): 3, ("2", "grad_x"): 3,
    }  # fmt: skip
    assert products.layers() == {"0", "2"}
    assert products.layers("grad_x") == {"2"}


# --------------------------------------------------------------------------- what is kept between forward and backward


@recipes
@dtypes
def test_codes_and_fp32_scales_are_saved_and_nothing_else(recipe: str, dtype: torch.dtype) -> None:
    """x^T and w^T at a byte an element, in one orientation each: 40 * 24 + 24 * 16 bytes of codes."""
    layer, saved = fp8.Linear(24, 16, recipe=recipe), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(40, 24, dtype=dtype, requires_grad=True))
    codes = [t for t in saved if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    scales = [t for t in saved if t.dtype == torch.float32]
    assert len(codes) + len(scales) == len(saved) == 4
    assert {tuple(t.shape) for t in codes} == {(24, 40), (24, 16)}
    assert all(t.numel() <= 40 for t in scales)


def test_a_frozen_weight_saves_only_its_own_codes() -> None:
    layer, saved = fp8.Linear(24, 16, recipe="tensorwise"), []
    layer.weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(40, 24, requires_grad=True))
    assert {tuple(t.shape) for t in saved} == {(24, 16), (1, 1)}


def test_a_second_derivative_is_refused_and_not_silently_zero() -> None:
    layer, x = fp8.Linear(4, 4, recipe="tensorwise"), torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --------------------------------------------------------------------------- types


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_have_the_types_of_what_they_belong_to(x: torch.dtype, weight: torch.dtype) -> None:
    layer = fp8.Linear(8, 8, recipe="tensorwise").to(weight)
    y, _, dx = run(layer, torch.randn(4, 8, dtype=x))
    assert (y.dtype, dx.dtype) == (x, x)
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == weight


@recipes
def test_autocast_rounds_activations_to_bf16_and_quantizes_the_fp32_master(recipe: str) -> None:
    """y is BF16; the weight codes are those of the FP32 parameter, 3 % of which differ from those of a BF16 copy."""
    torch.manual_seed(1)
    layer = fp8.Linear(200, 150, recipe=recipe)
    x = torch.randn(10, 200)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    plain = fp8_copy(layer)
    assert torch.equal(plain(x.detach().bfloat16()), y.detach())
    rule = Recipe.of(recipe)
    master, copied = (
        fp8.quantize(w, rule.w.format, rule.w.tile).codes for w in (layer.weight, layer.weight.bfloat16())
    )
    assert torch.equal(layer.quantized_weight().codes.view(torch.uint8), master.view(torch.uint8))
    assert bool((master.view(torch.uint8) != copied.view(torch.uint8)).any())


def test_float64_and_a_wrong_width_are_refused_by_name() -> None:
    model = nn.ModuleDict({"block": nn.Linear(4, 6)})
    fp8.convert(model)
    with pytest.raises(TensorError, match=r"block takes float32, bfloat16 or float16, not torch\.float64"):
        model["block"](torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"block takes \[\.\.\., 4\]; x has shape \(2, 5\)"):
        model["block"](torch.randn(2, 5))
    with pytest.raises(ShapeError, match=r"x has shape \(\)"):
        model["block"](torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_layer_without_inputs_or_outputs_is_torchs(shape: tuple[int, int]) -> None:
    layer, x = fp8.Linear(*shape, recipe="rowwise"), torch.zeros(3, shape[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert x.grad.shape == x.shape


def test_a_float64_weight_is_refused_and_not_rounded_on_the_way() -> None:
    with pytest.raises(TensorError, match=r"weight to quantize of float32, bfloat16 or float16, not torch\.float64"):
        fp8.Linear(4, 4, recipe="tensorwise", dtype=torch.float64)(torch.ones(1, 4))


# --------------------------------------------------------------------------- the ways in which a layer is used


def test_evaluation_writes_one_orientation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """x^T and w^T are for a backward; under `no_grad` there is none, although the weight requires a gradient."""
    both, right = [], products._quantize
    monkeypatch.setattr(products, "_quantize", lambda *args: both.append(args[4]) or right(*args))
    layer = fp8.Linear(8, 8, recipe="tensorwise")
    with torch.no_grad():
        layer(torch.ones(2, 8))
    assert both == [False, False]


@pytest.mark.parametrize("own", [None, "rowwise"])
@pytest.mark.parametrize("around", [{"recipe": "blockwise"}, {"enabled": False}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_runs_as_the_forward_did(own: str | None, around: dict, reentrant: bool) -> None:
    """Checkpointing calls the layer again in backward, when the autocast around its forward was left long ago."""
    from torch.utils.checkpoint import checkpoint

    def gradients(recompute: bool) -> tuple[Tensor, Tensor, set]:
        torch.manual_seed(0)
        layer, x = fp8.Linear(200, 8, recipe=own), torch.randn(4, 200, requires_grad=True)
        with fp8.count_products() as counted:
            with fp8.autocast(**around):
                y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
            y.square().sum().backward()
        layer(x)  # outside of backward, what surrounds the call decides again
        assert layer.weight.grad is not None and x.grad is not None
        return layer.weight.grad, x.grad, set(counted.counts)

    plain, recomputed = gradients(False), gradients(True)
    assert torch.equal(plain[0], recomputed[0])
    assert torch.equal(plain[1], recomputed[1])
    assert plain[2] == recomputed[2]


@recipes
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_neither_gradients_nor_state(recipe: str, reentrant: bool) -> None:
    """Two steps of two blocks, one of them used twice; the delayed state included."""
    from torch.utils.checkpoint import checkpoint

    def train(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)])
        fp8.convert(model, recipe)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        fp8.attach(model, optimizer)
        for _ in range(2):
            x = torch.randn(6, 16, requires_grad=True)
            for block in (model[0], model[1], model[0]):
                x = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
            optimizer.zero_grad()
            x.square().sum().backward()
            optimizer.step()
        return [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for plain, recomputed in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_layer_without_a_recipe_is_torchs_linear_outside_of_autocast() -> None:
    layer = fp8.Linear(8, 6)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer(x.double().to(torch.float32)).dtype == torch.float32
    assert layer.recipe is None


@pytest.mark.parametrize("how", [{"format": "e5m2", "tile": (1, 32)}, {"format": "e4m3", "tile": "row"}], ids=str)
def test_operands_of_any_format_and_tile_train(how: dict) -> None:
    """E5M2 throughout with 1x32 tiles, or rows under scales that are no powers of two: what a recipe says, a layer
    does."""
    torch.manual_seed(0)
    promoted = {"forward": "promoted", "grad_x": "promoted", "grad_w": "promoted"}
    recipe = Recipe.from_dict({"x": how, "w": how, "grad": how, "accumulate": promoted, "scale_rounding": "none"})
    layer = fp8.Linear(70, 50, recipe=recipe)
    x = torch.randn(33, 70)
    y, grad, dx = run(layer, x)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for got, exact in ((y, x @ weight.t() + bias), (dx, grad @ weight)):
        assert float((got - exact).norm() / exact.norm()) < 0.1
