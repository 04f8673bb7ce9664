"""Delayed scaling as a state machine: what goes in is the amaxes of a step, what comes out is the next step's scales.

The numbers: E4M3's max is 448, so an amax of 448 needs the scale 1 and 449 needs 2; E5M2's max is 57344. The three rows
of a state are x (E4M3), w (E4M3) and grad (E5M2).
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8.formats import format_of
from fp8.quantize import run_quantize, run_quantize_both
from fp8.recipe import Delayed, Recipe
from fp8.scaling import ArticleState, DelayedState, reduced, scale_gradients, state_for, update
from fp8.tile import Tile


def state(**settings) -> DelayedState:  # type: ignore[no-untyped-def]
    made = state_for(Recipe(delayed=Delayed(**settings)))
    assert isinstance(made, DelayedState)
    return made


def see(held: DelayedState, *amaxes: float | None) -> None:
    """What the kernels of one use of the layer do: raise `pending`, and, the first time, leave their own scale."""
    for operand, amax in enumerate(amaxes):
        if amax is not None:
            scale = held.before(operand, torch.tensor([[amax]]), True)
            own = torch.tensor([[2.0 ** np.ceil(np.log2(max(amax, 1e-30) / held.formats[operand].max))]])
            held.after(operand, torch.tensor(amax), own if scale is None else scale)


def step(held: DelayedState, *amaxes: float | None, found_inf: Tensor | bool | None = None) -> list[float]:
    """One step, and the scales that the next one will use."""
    see(held, *amaxes)
    update([held], found_inf)
    return held.scale.tolist()


def test_the_first_use_measures_and_the_second_uses_the_history() -> None:
    """Amaxes 448, 224, 57344 give scales 1, 1/2, 1."""
    held = state()
    assert [held.before(i, torch.ones(1), True) for i in range(3)] == [None] * 3
    assert step(held, 448.0, 224.0, 57344.0) == [1.0, 0.5, 1.0]
    assert [float(held.before(i, torch.ones(1), True)) for i in range(3)] == [1.0, 0.5, 1.0]
    assert held.history[:, -2:].tolist() == [[-1, 448], [-1, 224], [-1, 57344]]
    assert held.pending.tolist() == [-1, -1, -1]
    assert held.get_extra_state().tolist() == [1, 1, 1, 1]


def test_pending_is_a_maximum_so_repeating_a_use_changes_nothing() -> None:
    """Micro-batches of 3, 7 and 5, in any order and any number of times, are one step of 7."""
    once, often = state(), state()
    see(once, 7.0, 7.0, 7.0)
    for amax in (3.0, 7.0, 5.0, 7.0, 3.0):
        see(often, amax, amax, amax)
    assert torch.equal(once.pending, often.pending)
    update([once, often])
    assert torch.equal(once.history, often.history)
    assert torch.equal(once.scale, often.scale)


@pytest.mark.parametrize(
    ("reduce", "scales"),
    [
        ("max", [0.25, 4.0, 4.0, 4.0, 2.0]),
        ("most_recent", [0.25, 4.0, 2.0, 0.5, 0.5]),
        ("mean", [0.25, 4.0, 4.0, 4.0, 1.0]),
    ],
)
def test_the_window_becomes_one_amax(reduce: str, scales: list[float]) -> None:
    """Window 3, amaxes 112, 1792, 896, 224, 224, over 448:

    max          112, 1792, 1792, 1792, 896                              -> 1/4, 4, 4, 4, 2
    most_recent  112, 1792, 896, 224, 224                                -> 1/4, 4, 2, 1/2, 1/2
    mean         112, 952, 2800 / 3 = 933.3, 2912 / 3 = 970.7, 1344 / 3 = 448 -> 1/4, 2.125, 2.08, 2.17, 1, rounded up
    """
    held = state(window=3, reduce=reduce)
    assert [step(held, amax, amax, amax)[0] for amax in (112.0, 1792.0, 896.0, 224.0, 224.0)] == scales


def test_the_mean_divides_by_the_filled_slots_and_sums_oldest_first() -> None:
    """2^24, 1, 1: in FP32 (2^24 + 1) + 1 = 2^24, and (1 + 1) + 2^24 = 2^24 + 2. Three slots are filled."""
    window = torch.tensor([[-1.0, 2.0**24, 1.0, 1.0]])
    assert reduced(window, "mean").item() == np.float32(2.0**24) / np.float32(3)
    assert reduced(window.flip(1), "mean").item() == np.float32(2.0**24 + 2) / np.float32(3)


def test_a_margin_leaves_binades_free() -> None:
    """Amax 448 with margin 3: 448 * 8 / 448 = 8."""
    assert step(state(margin=3), 448.0, 448.0, 448.0)[:2] == [8.0, 8.0]


def test_update_every_three_steps_moves_the_scale_every_third_step() -> None:
    """The first scale is due at once. Then amaxes 1 to 8 times 14: steps 3 and 6 are due, the others keep what there
    is."""
    held = state(update_every=3, window=2, reduce="most_recent")
    got = [step(held, 14.0 * n, None, None)[0] for n in (32, 16, 8, 4, 2, 1)]
    assert got == [1.0, 1.0, 0.25, 0.25, 0.25, 2.0**-5]


def test_the_first_scale_covers_every_use_of_the_first_step() -> None:
    """A module called on 448 and then on 1, with an update due in four steps: the scale is 1, not that of the last
    call."""
    held = state(update_every=4)
    see(held, 448.0, 1.0, 1.0)
    see(held, 1.0, 1.0, 1.0)
    update([held])
    assert held.scale[0].item() == 1.0


def test_what_was_not_used_keeps_its_history_and_its_scale() -> None:
    """A frozen layer has no gradient; its third row stays as new, and its first gradient will measure itself."""
    held = state()
    step(held, 448.0, 448.0, None)
    before = copy.deepcopy(held.state_dict())
    assert step(held, None, None, None) == [1.0, 1.0, 1.0]
    assert torch.equal(held.history, before["history"])
    assert held.filled == [1, 1, 0]
    assert held.before(2, torch.ones(1), True) is None
    assert step(held, None, None, 57344.0 * 4)[2] == 4.0


@pytest.mark.parametrize("found_inf", [True, torch.tensor(True), torch.tensor([1.0])])
def test_a_skipped_step_leaves_no_trace(found_inf: Tensor | bool) -> None:
    held = state()
    step(held, 448.0, 448.0, 448.0)
    before = copy.deepcopy(held.state_dict())
    step(held, 1e9, 1e9, 1e9, found_inf=found_inf)
    for name in ("history", "scale", "pending"):
        assert torch.equal(held.state_dict()[name], before[name])
    step(held, 448.0, 448.0, 448.0, found_inf=torch.tensor(0.0))
    assert (held.history[0] >= 0).sum() == 2


def test_saturation_at_least_doubles_the_next_scale() -> None:
    """No update is due for 100 steps: 448 fits under the scale 1, 600 does not and doubles it, 2000 doubles it again. A
    slow mean of 32 amaxes, 34 / 32, asks for 2^-8; a 3 that was clipped at 448 / 256 asks for twice that."""
    lazy = state(update_every=100)
    for _ in range(3):
        assert step(lazy, 448.0, 1.0, 1.0)[0] == 1.0
    assert step(lazy, 600.0, 1.0, 1.0)[0] == 2.0
    assert step(lazy, 2000.0, 1.0, 1.0)[0] == 4.0
    slow = state(reduce="mean", window=32)
    for _ in range(32):
        step(slow, 1.0, 1.0, 1.0)
    assert slow.scale[0].item() == 2.0**-8
    assert step(slow, 3.0, 1.0, 1.0)[0] == 2.0**-7


def test_amax_zero_has_scale_one() -> None:
    assert step(state(), 0.0, 0.0, 0.0) == [1.0, 1.0, 1.0]


def test_a_loss_scale_moves_the_gradients_history_and_nothing_else() -> None:
    """Loss scale times 4: gradient amax 57344 becomes 4 * 57344, scale 1 becomes 4. Times 0.75 (no power of two): the
    history follows, the scale keeps a power of two that is not too small."""
    held = state()
    step(held, 448.0, 448.0, 57344.0)
    scale_gradients([held], 4.0)
    assert held.history[2, -2:].tolist() == [-1, 4 * 57344]
    assert held.scale.tolist() == [1.0, 1.0, 4.0]
    scale_gradients([held], torch.tensor(0.75))
    assert held.history[2, -1].item() == 3 * 57344
    assert held.scale[2].item() == 4.0
    scale_gradients([held], 0.5)
    assert held.scale[2].item() == 2.0
    assert held.history[:2, -1].tolist() == [448, 448]


def test_layers_with_equal_settings_are_updated_together_as_they_are_alone() -> None:
    groups = [state(), state(), state(margin=1), state(reduce="mean")]
    alone = copy.deepcopy(groups)
    for n in range(5):
        for i, (one, other) in enumerate(zip(groups, alone, strict=True)):
            amax = 10.0 * (i + 1) * (n + 1)
            see(one, amax, amax, amax)
            step(other, amax, amax, amax)
        update(groups)
    for one, other in zip(groups, alone, strict=True):
        assert torch.equal(one.history, other.history)
        assert torch.equal(one.scale, other.scale)
        assert one.get_extra_state().tolist() == other.get_extra_state().tolist()


def test_the_state_is_fp32_whatever_the_model_is_cast_to_and_reads_back() -> None:
    held = state()
    step(held, 3.0, 5.0, 7.0)
    cast = copy.deepcopy(held).to(torch.bfloat16).half().double()
    assert {t.dtype for t in cast.buffers()} == {torch.float32}
    other = state()
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.history, held.history)
    assert other.warm == held.warm == [True] * 3
    assert other.steps == 1
    assert all(isinstance(value, Tensor) for value in held.state_dict().values())


def test_a_state_born_on_the_meta_device_can_be_made_real() -> None:
    with torch.device("meta"):
        held = state()
    assert held.to_empty(device="cpu").history.shape == (3, 32)


# --------------------------------------------------------------------------- the article's scaler


def dynamic_scaler(amaxes: list[float], maximum: float) -> tuple[list[float], float]:
    """The scale that the printed `DynamicScaler` uses at each call, in its own arithmetic, and the one it ends with."""
    scale, history, used = 65536.0, [65536.0] * 32, []
    for iteration, amax in enumerate(amaxes):
        if iteration % 4 == 0:
            scale = maximum / (amax + 1e-8)
            history.pop(0)
            history.append(scale)
        used.append(float(np.mean(history)))
        if amax * used[-1] > maximum:
            scale *= 0.99
    return used, scale


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_the_article_rule_is_the_articles_scaler_with_its_maximum_corrected(operand: int) -> None:
    amaxes = [float(v) for v in np.exp(np.random.default_rng(0).normal(0, 1, 150))]
    for seen in (
        amaxes,
        amaxes[:4],
        [0.0],
        [1e-9, 1e9],
    ):  # the second ends with a back-off; EPSILON shows in the others
        held = ArticleState(Recipe.of("delayed_article"))
        expected, last = dynamic_scaler(seen, held.formats[operand].max)
        got = [1.0 / held.before(operand, torch.tensor([[a]]), True).item() for a in seen]
        assert np.allclose(got, expected, rtol=1e-5)
        assert np.isclose(held.scale[operand].item(), last, rtol=1e-5)


def test_the_article_rule_saturates_for_124_steps_and_the_amax_rule_never() -> None:
    """Gradients of amax 1. The mean of 32 scales starts at 65536, and each push of 57344 lowers it by 8192 / 32 = 256:
    after the 32nd push, at call 125, it is 57344. Until then 1 * mean > 57344. A tenfold rise repeats it: 5734.4 would
    fit, and the mean is above it until all 32 slots are new. The amax rule clips in one step."""
    article = state_for(Recipe.of("delayed_article"))
    assert article is not None

    def clipped(amax: float, steps: int) -> int:
        return sum(amax / float(article.before(2, torch.tensor([[amax]]), True)) > 57344 * 1.0001 for _ in range(steps))

    assert clipped(1.0, 200) == 124
    assert clipped(10.0, 200) == 124
    held = state()
    saturated = 0
    for amax in [1.0] * 200 + [10.0] * 200:
        scale = held.before(2, torch.tensor([[amax]]), True)
        saturated += scale is not None and amax > 57344 * float(scale)
        step(held, None, None, amax)
    assert saturated == 1


def test_the_article_rule_ignores_inf_and_writes_nothing_in_evaluation() -> None:
    held = state_for(Recipe.of("delayed_article"))
    assert isinstance(held, ArticleState)
    held.before(2, torch.tensor([[1.0, float("inf"), float("nan")]]), True)
    assert held.history[2, -1].item() == pytest.approx(57344)
    before = copy.deepcopy(held.state_dict())
    held.before(2, torch.tensor([[1e9]]), False)
    assert all(torch.equal(before[key], value) for key, value in held.state_dict().items())


@pytest.mark.parametrize("both", [False, True])
def test_an_amax_that_is_handed_in_is_raised_where_it_lies(both: bool, device: torch.device) -> None:
    """As delayed scaling's `pending`, which starts at -1: any finite amax is above it."""
    x, scale = torch.tensor([[0.0, -3.0, float("inf")]], device=device), torch.ones(1, 1, device=device)
    door = run_quantize_both if both else run_quantize
    for start, want in ((-1.0, 3.0), (2.0, 3.0), (5.0, 5.0)):
        held = torch.tensor([7.0, start, 7.0], device=device)
        *_, amax = door(x, scale, format_of("e4m3"), Tile.of("tensor"), True, amax=held[1])
        assert amax.data_ptr() == held[1].data_ptr()
        assert held.tolist() == [7.0, want, 7.0]
    held = torch.tensor(-1.0, device=device)
    door(torch.zeros(2, 4, device=device), scale, format_of("e4m3"), Tile.of("tensor"), True, amax=held)
    assert held == 0.0
