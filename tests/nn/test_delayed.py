"""Delayed scaling inside layers and training loops: what writes to the state, what does not, and what a step leaves
behind.

(The arithmetic of the state itself is in tests/test_scaling.py.)
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fp8
from fp8.errors import CheckpointError, ConfigError
from fp8.recipe import Delayed, Recipe

X, W, GRAD = 0, 1, 2


def layer(**settings) -> fp8.Linear:  # type: ignore[no-untyped-def]
    """4 -> 4, identity weight, no bias: what goes in comes out."""
    made = fp8.Linear(4, 4, bias=False, recipe=Recipe("delayed", delayed=Delayed(**settings)))
    with torch.no_grad():
        made.weight.copy_(torch.eye(4))
    return made


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if "delayed" in key}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = snapshot(module)
    return after.keys() == before.keys() and all(torch.equal(before[key], after[key]) for key in before)


def slots(module: nn.Module) -> list[int]:
    """How many steps are remembered of x, w and the gradient."""
    return (module.state_dict()["fp8.delayed.history"] >= 0).sum(1).tolist()


def use(module: nn.Module, size: float = 1.0, gradient: float = 1.0) -> None:
    x = torch.full((2, 4), size, requires_grad=True)
    module(x).backward(torch.full((2, 4), gradient))


def test_a_step_remembers_the_amax_of_each_operand() -> None:
    """x of 448, w of 1, gradients of 57344: scales 1, 2^-8 (1 / 448 = 0.0022, rounded up to 2^-8), 1."""
    held = layer()
    use(held, 448.0, 57344.0)
    fp8.update_scales(held)
    assert held.fp8.delayed.history[:, -1].tolist() == [448.0, 1.0, 57344.0]
    assert held.fp8.delayed.scale.tolist() == [1.0, 2.0**-8, 1.0]
    assert held.fp8.delayed.filled == [1, 1, 1]


def test_the_next_step_uses_that_scale_and_clips_what_grew() -> None:
    """After 448, an input of 1000 becomes 448; the step after that has at least twice the scale and 1000 / 2 = 500 is
    clipped to 448 * 2 = 896 no more: the window's amax 1000 asks for 4."""
    held = layer()
    use(held, 448.0)
    fp8.update_scales(held)
    y = held(torch.full((1, 4), 1000.0))
    assert y.tolist() == [[448.0] * 4]
    fp8.update_scales(held)
    assert held.fp8.delayed.scale[X].item() == 4.0
    assert held(torch.full((1, 4), 1000.0)).tolist() == [[1024.0] * 4]  # nearest code: 250 -> 256, times 4


@pytest.mark.parametrize("recipe", ["delayed", "delayed_article"])
def test_evaluation_writes_nothing(recipe: str) -> None:
    """Neither `eval()` nor `no_grad` touches the state, before the first step and after it."""
    held = fp8.Linear(4, 4, recipe=recipe)
    for _ in range(2):
        before = snapshot(held)
        with torch.no_grad():
            held(torch.full((2, 4), 1e6))
        held.eval()
        held(torch.full((2, 4), 1e6)).sum().backward()
        held.train()
        assert unchanged(held, before)
        use(held)
        fp8.update_scales(held)


def test_evaluation_uses_the_scales_of_training() -> None:
    held = layer()
    use(held, 448.0)
    fp8.update_scales(held)
    held.eval()
    assert held(torch.full((1, 4), 1000.0)).tolist() == [[448.0] * 4]


def test_a_layer_called_twice_sees_the_larger_of_both() -> None:
    held = layer()
    x = torch.full((2, 4), 3.0, requires_grad=True)
    (held(x) + held(5 * x)).sum().backward()
    fp8.update_scales(held)
    assert held.fp8.delayed.history[X, -1].item() == 15.0
    assert held.fp8.delayed.filled == [1, 1, 1]


def test_tied_layers_share_one_state() -> None:
    """The same module in two places is one layer: one state, one entry in the window a step."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fp8.convert(model, "delayed")
    model(torch.ones(2, 4)).sum().backward()
    fp8.update_scales(model)
    assert slots(shared) == [1, 1, 1]


def test_a_frozen_layer_has_no_gradient_history_and_a_thawed_one_measures_its_first() -> None:
    """Two frozen steps; then gradients of 1e-6, which under a scale of 1 would all be flushed (E5M2's smallest is
    2^-16)."""
    held = layer()
    held.weight.requires_grad_(False)
    for _ in range(2):
        held(torch.ones(2, 4))
        fp8.update_scales(held)
    assert held.fp8.delayed.filled == [2, 2, 0]
    held.weight.requires_grad_(True)
    use(held, 1.0, 1e-6)
    assert bool((held.weight.grad != 0).all())
    fp8.update_scales(held)
    assert held.fp8.delayed.filled == [3, 3, 1]


def test_a_forward_without_a_backward_is_no_gradient_step() -> None:
    """As in a validation loss computed without `no_grad`, or a branch that the loss does not use."""
    held = layer()
    held(torch.ones(2, 4))
    fp8.update_scales(held)
    assert held.fp8.delayed.filled == [1, 1, 0]
    use(held, 1.0, 1e-6)
    assert bool((held.weight.grad != 0).all())


def test_a_skipped_layer_keeps_what_it_has() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fp8.convert(model, "delayed")
    use(model)
    fp8.update_scales(model)
    before = snapshot(model[1])
    use(model[0])
    fp8.update_scales(model)
    after = snapshot(model[1])
    assert torch.equal(before["fp8.delayed.history"], after["fp8.delayed.history"])
    assert torch.equal(before["fp8.delayed.scale"], after["fp8.delayed.scale"])
    assert model[0].fp8.delayed.filled == [2, 2, 2]
    assert model[1].fp8.delayed.filled == [1, 1, 1]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nan_never_enter_the_window(bad: float) -> None:
    """An input with one bad element: the amax is that of the others, and the output shows it (nothing is hidden)."""
    held = layer()
    x = torch.full((2, 4), 3.0)
    x[0, 0] = bad
    y = held(x.requires_grad_())
    assert bool(y[0].isnan().any())
    y.backward(torch.tensor([[bad, 1.0, 1.0, 1.0]] * 2))
    fp8.update_scales(held)
    assert held.fp8.delayed.history[:, -1].tolist() == [3.0, 1.0, 1.0]
    assert bool(held.fp8.delayed.scale.isfinite().all())


# --------------------------------------------------------------------------- loops


def train(held: nn.Module, scaler: torch.amp.GradScaler | None, losses: list[float], fused: bool = False) -> None:
    optimizer = torch.optim.SGD(held.parameters(), 0.0, fused=fused)
    fp8.attach(held, optimizer, scaler)
    for factor in losses:
        optimizer.zero_grad()
        loss = held(torch.ones(2, 4)).sum() * factor
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def test_attach_updates_once_a_step() -> None:
    held = layer()
    train(held, None, [1.0] * 3)
    assert held.fp8.delayed.steps == 3
    assert slots(held) == [3, 3, 3]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_discarded_and_the_loss_scale_followed(fused: bool) -> None:
    """Loss scale 1024, one good step (gradients of 1024), one infinite: the loss scale halves, and with it the gradient
    history (512) and scale (1024 / 57344 -> 2^-5, halved 2^-6). x and w: the bad step is not in the window."""
    held, scaler = layer(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(held, scaler, [1.0, float("inf")], fused)
    state = held.fp8.delayed
    assert scaler.get_scale() == 512.0
    assert state.history[:, -2:].tolist() == [[-1, 1], [-1, 1], [-1, 512]]
    assert state.scale[GRAD].item() == 2.0**-6


def test_a_first_step_that_is_skipped_leaves_the_same_state_with_a_fused_optimizer_and_without() -> None:
    """The usual start under loss scaling: every gradient is infinite, which says nothing about their size. The next one
    must measure itself, or a gradient of 1e-6 under a scale of 1 is flushed to zero."""
    states = []
    for fused in (False, True):
        held, scaler = layer(update_every=4), torch.amp.GradScaler("cpu", init_scale=1024.0)
        train(held, scaler, [float("inf"), 1e-9, 1e-9], fused)
        assert held.weight.grad.abs().max() > 0
        states.append(held.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert states[0]["fp8.delayed._extra_state"].tolist() == [2, 2, 2, 3]


def test_a_growing_loss_scale_is_followed_before_it_can_saturate() -> None:
    """Growth after every good step: gradients of 1, 2, 4, 8 under scales that fit each exactly, none clipped."""
    held, scaler = layer(), torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1)
    train(held, scaler, [1.0] * 4)
    assert scaler.get_scale() == 16.0
    assert held.fp8.delayed.history[GRAD, -4:].tolist() == [16.0] * 4
    assert held.fp8.delayed.scale[GRAD].item() == 2.0**-11  # 16 / 57344 = 2^-11.8


def test_a_loss_scale_is_followed_once_whoever_attaches() -> None:
    """Two optimizers of one model (one for matrices, one for the rest): a second handle on the same scaler would move
    the gradient history by the square. One model each is what several optimizers of several models have."""
    held, other, scaler = layer(), layer(), torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1)
    optimizer = torch.optim.SGD(held.parameters(), 0.0)
    fp8.attach(held, optimizer, scaler)
    fp8.attach(other, torch.optim.SGD(other.parameters(), 0.0), scaler)
    with pytest.raises(ConfigError, match="already follows this GradScaler"):
        fp8.attach(held, torch.optim.SGD(held.parameters(), 0.0), scaler)
    scaler.scale(held(torch.ones(2, 4)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert held.fp8.delayed.history[GRAD, -1].item() == 2.0
    with pytest.raises(ConfigError, match="a model and its optimizer, in this order; got SGD and Linear"):
        fp8.attach(optimizer, held)


def test_removing_the_handle_puts_everything_back() -> None:
    held, scaler = layer(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(held.parameters(), 0.1)
    handle = fp8.attach(held, optimizer, scaler)
    handle.remove()
    use(held)
    optimizer.step()
    assert held.fp8.delayed.steps == 0
    assert scaler.update.__func__ is torch.amp.GradScaler.update


def test_a_loop_of_ones_own_equals_attach() -> None:
    """`update_scales` and `refresh` after the step are what `attach` does."""
    torch.manual_seed(0)
    one = fp8.Linear(8, 8, recipe="delayed")
    other = copy.deepcopy(one)
    for held in (one, other):
        optimizer = torch.optim.SGD(held.parameters(), 0.1)
        fp8.attach(held, optimizer) if held is one else fp8.refresh(held)
        for step in range(3):
            optimizer.zero_grad()
            held(torch.full((2, 8), step + 1.0)).square().sum().backward()
            optimizer.step()
            if held is other:
                fp8.update_scales(held)
                fp8.refresh(held)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# --------------------------------------------------------------------------- the state dict


def test_a_resumed_run_is_the_run_that_was_not_interrupted() -> None:
    """Four steps, or two, a state dict, a new model, and two more: the same weights, histories and scales, bit for
    bit."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        fp8.convert(model, Recipe("d", delayed=Delayed(update_every=3, reduce="mean")))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        fp8.attach(model, optimizer)
        return model, optimizer

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for n in numbers:
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(n)) * (n + 1)
            model(x).square().mean().backward()
            optimizer.step()

    whole, optimizer = build()
    steps(whole, optimizer, range(4))
    first, optimizer = build()
    steps(first, optimizer, range(2))
    state = {key: value.clone() for key, value in first.state_dict().items()}
    second, optimizer = build()
    second.load_state_dict(state)
    fp8.refresh(second)
    steps(second, optimizer, range(2, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_the_state_dict_holds_tensors_under_these_names() -> None:
    held = fp8.Linear(4, 4, recipe="delayed")
    parts = ("history", "scale", "pending", "_extra_state")
    assert set(held.state_dict()) == {"weight", "bias", *(f"fp8.delayed.{part}" for part in parts)}
    assert all(isinstance(value, Tensor) for value in held.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_scales_in_fp32(dtype: torch.dtype) -> None:
    held = layer()
    use(held, 3.0)
    fp8.update_scales(held)
    before = snapshot(held)
    held.to(dtype)
    assert held.weight.dtype == dtype
    assert unchanged(held, before)
    assert held.fp8.delayed.scale.dtype == torch.float32


def test_autocast_with_another_rule_starts_a_new_state() -> None:
    """A layer without a recipe that meets `delayed` and then the article's scaler must not mix them."""
    held = fp8.Linear(4, 4)
    kinds = []
    for recipe in ("delayed", "delayed", "delayed_article"):
        with fp8.autocast(recipe=recipe):
            held(torch.ones(2, 4)).sum().backward()
        kinds.append(held.fp8.delayed)
    assert kinds[0] is kinds[1]
    assert type(kinds[2]).__name__ == "ArticleState"


@pytest.mark.parametrize("recipe", ["delayed", "delayed_article"])
def test_state_made_under_an_autocast_loads_into_a_fresh_layer(recipe: str) -> None:
    """The state does not say of which recipe it is, so it waits until the layer meets one, in an autocast or for good;
    saved before that, it is still there."""
    trained = nn.Sequential(fp8.Linear(4, 4))
    with fp8.autocast(recipe=recipe):
        use(trained, 3.0)
    fp8.update_scales(trained)
    kept = snapshot(trained)
    fresh = [nn.Sequential(fp8.Linear(4, 4)) for _ in range(2)]
    for module in fresh:
        module.load_state_dict(trained.state_dict())
        assert unchanged(module, kept)
    fp8.convert(fresh[1], recipe)
    for module in fresh:
        with fp8.autocast(recipe=recipe), torch.no_grad():
            assert torch.equal(module(torch.full((2, 4), 7.0)), trained(torch.full((2, 4), 7.0)))
        assert unchanged(module, kept)


def test_state_of_another_rule_is_named_when_the_layer_meets_its_recipe() -> None:
    trained, fresh = nn.Sequential(layer(window=8)), nn.Sequential(fp8.Linear(4, 4, bias=False))
    fresh.load_state_dict(trained.state_dict())
    with pytest.raises(CheckpointError, match=r"history \[3, 8\].*meets delayed"), fp8.autocast(recipe="delayed"):
        fresh(torch.ones(2, 4))
    with pytest.raises(CheckpointError, match="Use the recipe that it was trained with"):
        fp8.convert(fresh, "delayed")
    fp8.convert(fresh, Recipe("delayed", delayed=Delayed(window=8)))
    assert unchanged(fresh, snapshot(trained))


def test_changing_the_recipe_forgets_what_another_one_remembered() -> None:
    held = layer()
    use(held)
    fp8.update_scales(held)
    held.fp8.set_recipe(Recipe.of("tensorwise"))
    assert not any("delayed" in key for key in held.state_dict())
