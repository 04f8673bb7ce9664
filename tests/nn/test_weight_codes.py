"""Law 7: the weight codes in use equal the codes of the current parameter, after any update of it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import ConvertError
from fp8.nn import products
from fp8.recipe import Recipe

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
recipes = pytest.mark.parametrize("recipe", RECIPES)
Optimizers = dict[str, Callable[[nn.Module], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    f"{kind.__name__}-{how}": lambda model, kind=kind, how=how: kind(
        model.parameters(), lr=0.1, foreach=how == "foreach", fused=how == "fused"
    )
    for kind in (torch.optim.AdamW, torch.optim.SGD)
    for how in ("plain", "foreach", "fused")
}


def small_model(recipe: str | Recipe) -> nn.Module:
    """A linear layer, a convolution and an attention module: every shape of weight that has codes."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"linear": nn.Linear(24, 40), "conv": nn.Conv2d(3, 5, 3), "attend": nn.MultiheadAttention(8, 2)}
    )
    fp8.convert(model, recipe)
    return model


def backward(model: nn.Module) -> None:
    a, b, c = model["linear"], model["conv"], model["attend"]
    x = torch.randn(5, 2, 8)
    (a(torch.randn(4, 24)).sum() + b(torch.randn(2, 3, 6, 6)).sum() + c(x, x, x)[0].square().sum()).backward()


def parts(model: nn.Module) -> list[tuple[fp8.nn.Fp8Products, Tensor]]:
    found = [pair for m in model.modules() if hasattr(m, "fp8_weights") for pair in m.fp8_weights()]
    assert len(found) >= 1
    return found


def codes_of(part: fp8.nn.Fp8Products, weight: Tensor) -> tuple[fp8.Quantized, fp8.Quantized]:
    """The codes that this layer makes of this weight, by the public door. Under delayed scaling, with the scale in
    force."""
    recipe = part.recipe
    assert recipe is not None
    state = part.delayed
    scale = state.scale[1].view(1, 1) if state is not None and state.warm[1] else None
    return fp8.quantize_both(weight.detach(), recipe.w.format, recipe.w.tile, recipe.scale_rounding, scale=scale)


def stale(model: nn.Module) -> int:
    """How many bytes of held codes, in both orientations, differ from those of the parameters as they are."""
    wrong = 0
    for part, weight in parts(model):
        straight, turned = codes_of(part, weight)
        for held, fresh in ((part.codes, straight.codes), (part.codes_t, turned.codes)):
            if held is not None:
                wrong += int((held.view(torch.uint8) != fresh.view(torch.uint8)).sum())
        if part.scale is not None:
            wrong += int((part.scale != straight.scale).sum())
    return wrong


def hold_codes(model: nn.Module) -> bool:
    return all(part.codes is not None for part, _ in parts(model))


@recipes
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_step_of_any_optimizer(recipe: str, optimizer: str) -> None:
    model = small_model(recipe)
    chosen = OPTIMIZERS[optimizer](model)
    fp8.attach(model, chosen)
    assert hold_codes(model)
    for _ in range(2):
        before = [part.codes.clone() for part, _ in parts(model)]
        places = [part.codes.data_ptr() for part, _ in parts(model)]
        chosen.zero_grad()
        backward(model)
        chosen.step()
        assert stale(model) == 0
        assert [part.codes.data_ptr() for part, _ in parts(model)] == places  # in place: a captured graph stays valid
        moved = [not torch.equal(old.view(torch.uint8), part.codes.view(torch.uint8))
                 for old, (part, _) in zip(before, parts(model), strict=True)]  # fmt: skip
        assert all(moved)


@recipes
def test_after_writing_to_data_and_a_refresh(recipe: str) -> None:
    """`.data` moves no version counter, so only the refresh can know: before it the old codes are in use (which shows
    that held codes are what is multiplied by), after it the new."""
    model = small_model(recipe).eval()
    model["linear"].bias.data.zero_()
    fp8.refresh(model)
    x = torch.randn(3, 24)
    y = model["linear"](x)
    for parameter in model.parameters():
        parameter.data.mul_(-3.0)
    assert stale(model) > 0
    assert torch.equal(model["linear"](x), y)
    fp8.refresh(model)
    assert stale(model) == 0
    assert not torch.equal(model["linear"](x), y)


@recipes
def test_a_change_that_torch_sees_is_noticed_without_a_refresh(recipe: str) -> None:
    """In eager mode the forward after an in-place change quantizes the weight it has: y of minus the weight is minus
    y."""
    torch.manual_seed(0)
    layer = fp8.Linear(24, 8, bias=False, recipe=recipe).eval()
    fp8.refresh(layer)
    x = torch.randn(3, 24)
    y = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer(x), -y)


@recipes
def test_after_loading_moving_casting_and_copying(recipe: str) -> None:
    """Loading, casting and copying drop the codes; the next refresh makes them anew."""
    model, other = small_model(recipe), small_model(recipe)
    fp8.refresh(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.7)
    model.load_state_dict(other.state_dict())
    assert not hold_codes(model)
    fp8.refresh(model)
    assert stale(model) == 0

    twin = copy.deepcopy(model)
    assert not any(part.codes is not None for part, _ in parts(twin))
    assert hold_codes(model)
    fp8.refresh(twin)
    assert stale(twin) == 0
    assert all(
        a.codes.data_ptr() != b.codes.data_ptr() for (a, _), (b, _) in zip(parts(model), parts(twin), strict=True)
    )

    model.to(torch.bfloat16)
    assert not hold_codes(model)
    fp8.refresh(model)
    assert stale(model) == 0
    assert stale(twin) == 0


@recipes
def test_codes_in_buffers_change_no_result(recipe: str) -> None:
    """The same training with codes held, and with every forward quantizing its weight."""

    def train(held: bool) -> list[Tensor]:
        model = small_model(recipe)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if held:
            fp8.attach(model, optimizer)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            if not held:
                fp8.update_scales(model)
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_quantized_weight_is_what_the_forward_multiplies_by() -> None:
    torch.manual_seed(0)
    layer = fp8.Linear(24, 8, bias=False, recipe="rowwise")
    x = torch.randn(3, 24)
    x_q = fp8.quantize(x, tile="row")
    for _ in range(2):  # without codes held, and with
        assert torch.equal(layer(x), fp8.matmul(x_q, layer.quantized_weight(), torch.float32, "fast"))
        fp8.refresh(layer)


def test_weight_codes_are_not_in_the_state_dict() -> None:
    layer = fp8.Linear(4, 4, recipe="tensorwise")
    fp8.refresh(layer)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_under_another_recipe_the_codes_held_are_not_used() -> None:
    """The codes are those of the layer's own recipe; a layer without one holds none."""
    layer = fp8.Linear(4, 4)
    fp8.refresh(layer)
    assert layer.fp8.codes is None
    with pytest.raises(ConvertError, match="has no recipe"):
        layer.quantized_weight()
    with fp8.autocast(recipe="rowwise"):
        assert layer.quantized_weight().scale.shape == (4, 1)


def test_a_refresh_writes_the_transposed_scales_where_they_differ() -> None:
    layer = fp8.Linear(200, 140, recipe="rowwise")
    fp8.refresh(layer)
    part, weight = next(iter(layer.fp8_weights()))
    straight, turned = codes_of(part, weight)
    assert torch.equal(part.scale, straight.scale)
    assert torch.equal(part.scale_t, turned.scale)


def negated_in_place(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.neg_()
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().neg())
    return layer


def replaced_under_data(layer: nn.Module) -> nn.Module:
    layer.weight.data = layer.weight.data.neg()
    return layer


def copied_and_negated(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose codes were stale: its parameter has another version counter, which may fit by chance."""
    return copy.deepcopy(negated_in_place(layer))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv channels_last"])
@pytest.mark.parametrize("change", [negated_in_place, replaced, replaced_under_data, copied_and_negated])
def test_another_weight_in_any_way_that_torch_sees_is_another_result(
    kind: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    """y of minus the weight is minus y, with codes of the weight held, twice in a row."""
    torch.manual_seed(0)
    made = fp8.Conv2d(4, 6, 3, bias=False, recipe="rowwise") if "conv" in kind else None
    layer: nn.Module = copy.deepcopy(made or fp8.Linear(8, 6, bias=False, recipe="rowwise"))  # version counter 0
    if kind == "conv channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    fp8.refresh(layer)
    y = layer(x)
    layer = change(layer)
    assert torch.equal(layer(x), -y)
    assert torch.equal(change(layer)(x), y)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_computed_for_each_call_is_quantized_for_each_call(norm: Callable) -> None:
    """Its codes would be those of the step before."""
    torch.manual_seed(0)
    layer = norm(fp8.Linear(8, 8, bias=False, recipe="tensorwise"))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    fp8.attach(layer, optimizer)
    x = torch.randn(4, 8)
    layer(x).square().sum().backward()
    optimizer.step()
    y = layer.eval()(x)
    expected = fp8.matmul(fp8.quantize(x), fp8.quantize(layer.weight), torch.float32)
    assert torch.equal(y, expected)


def test_codes_are_forgotten_with_their_recipe() -> None:
    layer, x = fp8.Linear(200, 40, bias=False, recipe="tensorwise"), torch.randn(3, 200)
    with torch.no_grad():
        layer.weight[0] *= 1000
    fp8.refresh(layer)
    layer.fp8.set_recipe(Recipe.of("blockwise"))
    plain = fp8.Linear(200, 40, bias=False, recipe="blockwise")
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


def test_codes_are_held_in_inference_mode_too() -> None:
    """Of parameters born there, which have no version counter, as of others."""
    layer = fp8.Linear(8, 8, recipe="rowwise")
    with torch.inference_mode():
        for one in (layer, fp8.Linear(8, 8, recipe="rowwise")):
            y = one(torch.ones(2, 8))
            fp8.refresh(one)
            assert hold_codes(one)
            assert torch.equal(one(torch.ones(2, 8)), y)


def test_a_refresh_in_evaluation_writes_nothing_to_the_delayed_state() -> None:
    layer = fp8.Linear(8, 8, recipe="delayed").eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    fp8.refresh(layer)
    assert all(
        torch.equal(before[key], value) for key, value in layer.state_dict().items() if key != "fp8.delayed.scale"
    )
    assert layer.fp8.delayed.pending.tolist() == [-1.0] * 3


def test_micro_batches_add_up_and_quantize_the_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulating adds gradients; with `attach` the weight's codes are made once a step."""
    torch.manual_seed(0)
    layer = fp8.Linear(8, 8, recipe="tensorwise")
    parts = torch.randn(4, 5, 8)
    each = []
    for part in parts:
        layer.zero_grad()
        layer(part).sum().backward()
        each.append(layer.weight.grad.clone())
    shapes, right = [], products._quantize
    once_a_step = sys.modules["fp8.nn.attach"]  # fp8.nn.attach is the function
    note = lambda casts: shapes.extend(tuple(cast.x.shape) for cast in casts)  # noqa: E731
    monkeypatch.setattr(products, "_quantize", lambda x, *rest: shapes.append(tuple(x.shape)) or right(x, *rest))
    many = once_a_step.run_many
    monkeypatch.setattr(once_a_step, "run_many", lambda casts, *rest: note(casts) or many(casts, *rest))
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    fp8.attach(layer, optimizer)
    layer.zero_grad()
    for part in parts:
        layer(part).sum().backward()
    assert torch.equal(layer.weight.grad, each[0] + each[1] + each[2] + each[3])
    optimizer.step()
    assert shapes == [(8, 8)] + [(5, 8), (5, 8)] * 4 + [(8, 8)]
