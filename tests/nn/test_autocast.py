"""`fp8.autocast` decides which layers are FP8 and by which recipe; a layer's own recipe comes first."""

from __future__ import annotations

import threading

import pytest
import torch

import fp8
from fp8.errors import RecipeError
from fp8.nn.autocast import active


def products_of(layer: fp8.Linear, *contexts: fp8.autocast) -> dict[str, int]:
    """How often each product ran in one forward and backward inside these contexts, outermost first."""
    with fp8.count_products() as products:
        for context in contexts:
            context.__enter__()
        y = layer(torch.randn(2, 8, requires_grad=True))
        for context in reversed(contexts):
            context.__exit__(None, None, None)
        y.sum().backward()
    return {product: n for (_, product), n in products.counts.items()}


ALL = {"forward": 1, "grad_x": 1, "grad_w": 1}


@pytest.mark.parametrize(
    ("own", "contexts", "expected"),
    [
        (None, [], {}),
        (None, [fp8.autocast()], ALL),
        (None, [fp8.autocast(enabled=False)], {}),
        (None, [fp8.autocast(), fp8.autocast(enabled=False)], {}),
        (None, [fp8.autocast(enabled=False), fp8.autocast()], ALL),
        ("tensorwise", [], ALL),
        ("tensorwise", [fp8.autocast()], ALL),
        ("tensorwise", [fp8.autocast(enabled=False)], {}),
        ("tensorwise", [fp8.autocast(enabled=False), fp8.autocast(recipe="rowwise")], ALL),
    ],
)
def test_when_a_layer_is_fp8(own: str | None, contexts: list[fp8.autocast], expected: dict[str, int]) -> None:
    assert products_of(fp8.Linear(8, 8, recipe=own), *contexts) == expected


def test_the_innermost_recipe_is_used_by_layers_that_have_none() -> None:
    layer, x = fp8.Linear(8, 8), torch.randn(3, 8) * torch.tensor([[1.0], [1e-6], [1e6]])
    results = {}
    for name in ("tensorwise", "rowwise"):
        with fp8.autocast(recipe="blockwise"), fp8.autocast(recipe=name):
            results[name] = layer(x)
    assert not torch.equal(results["tensorwise"], results["rowwise"])
    rowwise = fp8.Linear(8, 8, recipe="rowwise")
    rowwise.load_state_dict(layer.state_dict())
    assert torch.equal(results["rowwise"], rowwise(x))
    with fp8.autocast(recipe="tensorwise"):
        assert torch.equal(rowwise(x), results["rowwise"])


def test_backward_follows_its_forward_wherever_it_runs() -> None:
    """Forward inside, backward outside, inside another autocast, and on another thread."""
    layer = fp8.Linear(8, 8)
    x = torch.randn(4, 8)

    def gradient(run) -> torch.Tensor:  # type: ignore[no-untyped-def]
        layer.zero_grad()
        with fp8.autocast(recipe="rowwise"):
            y = layer(x).square().sum()
        run(y.backward)
        return layer.weight.grad.clone()

    def inside(backward) -> None:  # type: ignore[no-untyped-def]
        with fp8.autocast(enabled=False), fp8.autocast(recipe="blockwise"):
            backward()

    def elsewhere(backward) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()

    first, *others = (gradient(run) for run in (lambda backward: backward(), inside, elsewhere))
    assert all(torch.equal(first, other) for other in others)


def test_a_context_is_left_as_it_was_found_also_after_an_error() -> None:
    before = active()
    with pytest.raises(ZeroDivisionError), fp8.autocast(recipe="rowwise"), fp8.count_products():
        raise ZeroDivisionError
    assert active() is before


def test_one_context_object_can_be_entered_again_and_inside_itself() -> None:
    context, before = fp8.autocast(recipe="rowwise"), active()
    with context:
        with context:
            assert active().recipe is fp8.Recipe.of("rowwise")
        assert active().enabled
    assert active() is before
    with context:
        assert active().enabled


def test_the_recipe_of_a_context_is_checked_when_it_is_made() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'blockwise'"):
        fp8.autocast(recipe="blockwize")


@pytest.mark.parametrize("first", ["rowwise", fp8.Recipe.of("rowwise"), None], ids=str)
def test_a_recipe_in_the_place_of_enabled_is_refused_and_not_taken_for_true(first: object) -> None:
    with pytest.raises(RecipeError, match="first argument is enabled"):
        fp8.autocast(first)
    if first is not None:
        with pytest.raises(RecipeError, match="third argument is bias"):
            fp8.Linear(8, 8, first)


def test_counting_nests() -> None:
    """The inner count has what ran inside it; the outer one what ran around it."""
    layer = fp8.Linear(4, 4, recipe="tensorwise")
    with fp8.count_products() as outer:
        layer(torch.ones(1, 4))
        with fp8.count_products() as inner:
            layer(torch.ones(1, 4))
            layer(torch.ones(1, 4))
    assert sum(inner.counts.values()) == 2
    assert sum(outer.counts.values()) == 1


def test_torch_autocast_and_ours_go_together_in_any_order() -> None:
    layer, x = fp8.Linear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16), fp8.autocast():
        one = layer(x)
    with fp8.autocast(), torch.autocast("cpu", torch.bfloat16):
        other = layer(x)
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, other)
