"""Laws of the intervals and of the verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fp8.evaluate import intervals
from fp8.evaluate.intervals import Estimate
from fp8.evaluate.measures import figures
from fp8.evaluate.verdict import beats_chance, verdict

bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def loss(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 0.1, 100, 100)


@pytest.mark.parametrize(
    ("low", "high", "informative", "told"),
    [
        (-0.2, 0.4, True, "within"),
        (-0.2, 0.5, True, "within"),  # at the limit is within it
        (-3.0, -1.0, True, "within"),  # better is not worse
        (-0.2, 0.6, True, "inconclusive"),
        (0.5, 0.9, True, "inconclusive"),
        (0.6, 0.9, True, "worse"),
        (-math.inf, math.inf, True, "inconclusive"),
        (-0.2, 0.4, False, "uninformative"),
        (0.6, 0.9, False, "uninformative"),
    ],
)
def test_the_verdict_is_its_truth_table(low: float, high: float, informative: bool, told: str) -> None:
    assert verdict(loss(low, high), informative) == told


def test_chance_is_beaten_by_five_standard_errors_and_not_by_four() -> None:
    assert beats_chance(0.05, 0.01)
    assert not beats_chance(0.0499, 0.01)
    assert not beats_chance(0.0, 0.0)
    assert not beats_chance(0.5, math.inf)


def test_t_is_students() -> None:
    for freedom in (*range(1, 60), 500):
        assert intervals.t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)


def test_a_mean_of_independent_windows_has_the_textbook_interval() -> None:
    x = np.random.default_rng(0).normal(2.0, 1.0, 30)
    told = intervals.ratio_mean(x.tolist(), [1] * 30, in_order=False)
    assert told.standard_error == pytest.approx(stats.sem(x))
    assert (told.low, told.high) == pytest.approx(stats.t.interval(0.95, 29, x.mean(), stats.sem(x)), abs=1e-3)
    assert told.effective == 30


def test_windows_that_repeat_their_neighbour_are_worth_fewer() -> None:
    x = np.random.default_rng(0).normal(size=50)
    alone = intervals.ratio_mean(x.tolist(), [1] * 50)
    twice = intervals.ratio_mean(np.repeat(x, 2).tolist(), [1] * 100)
    assert twice.effective < 70
    assert twice.standard_error > 0.8 * alone.standard_error


def test_nine_of_ten_intervals_of_a_drifting_text_hold_its_mean() -> None:
    """Coverage of the interval on windows with correlation 0.5; naive intervals reach about 75 %."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(300):
        noise = generator.normal(size=90)
        x = np.zeros(90)
        for i in range(1, 90):
            x[i] = 0.5 * x[i - 1] + noise[i]
        told = intervals.ratio_mean(x[10:].tolist(), [1] * 80)
        held += told.low <= 0 <= told.high
    assert held / 300 > 0.88


def test_one_window_tells_no_interval() -> None:
    told = intervals.ratio_mean([6.0], [3])
    assert told.value == 2.0
    assert told.to_dict()["low"] is None


@given(bits)
def test_a_difference_lies_in_its_interval_and_turns_with_the_models(pairs: list[tuple[int, int]]) -> None:
    base, model = ([p[i] for p in pairs] for i in (0, 1))
    one, other = intervals.paired_difference(base, model), intervals.paired_difference(model, base)
    assert one.low <= one.value <= one.high
    assert one.value == pytest.approx(sum(model) / len(model) - sum(base) / len(base))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_equal_answers_of_two_models_do_not_prove_them_equal() -> None:
    told = intervals.paired_difference([1, 0] * 50, [1, 0] * 50)
    assert told.value == 0
    assert told.low < -0.01 < 0.01 < told.high


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(won, lost + won, 0.5).pvalue if lost + won else 1.0
    assert intervals.mcnemar(lost, won) == pytest.approx(expected)


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_proportions_interval_is_wilsons(right: int, wrong: int) -> None:
    if right + wrong:
        told = intervals.proportion([1] * right + [0] * wrong)
        expected = stats.binomtest(right, right + wrong).proportion_ci(0.95, method="wilson")
        assert (told.low, told.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array([p[i] for p in pairs], dtype=float) for i in (0, 1))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert intervals.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_model_held_against_itself_loses_exactly_nothing() -> None:
    kinds = {
        "perplexity": [{"id": i, "nll": 1.0 + i % 3, "tokens": 3} for i in range(9)],
        "accuracy": [{"id": i, "correct": i % 2, "log_likelihoods": [0.1, 0.2]} for i in range(9)],
        "spearman": [{"id": i, "cosine": i / 9, "score": (i * 4) % 7} for i in range(9)],
    }
    for measure, records in kinds.items():
        (told,) = figures([measure], records, list(reversed(records)), math.log(257), 0.5)
        assert told.loss is not None
        assert (told.loss.value, told.loss.low, told.loss.high) == (0.0, 0.0, 0.0), measure


def test_a_base_at_chance_tells_nothing() -> None:
    base = [{"id": i, "correct": int(i % 4 == 0), "chance": 0.25, "chosen": 0} for i in range(200)]
    model = [record | {"correct": 0} for record in base]
    (told,) = figures(["accuracy"], model, base, math.inf, 0.5)
    assert told.verdict == "uninformative"
    better = [record | {"correct": int(i % 4 != 0)} for i, record in enumerate(base)]
    (told,) = figures(["accuracy"], model, better, math.inf, 0.5)
    assert told.verdict == "worse"
    assert told.loss.value == 75.0
