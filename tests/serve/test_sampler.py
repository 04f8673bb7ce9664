"""Laws of sampling: the right distribution, and a row's token does not depend on the other rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.errors import RequestError
from fp8.serve import Request, SamplingParams
from fp8.serve.params import EngineOptions
from fp8.serve.sampler import Row, Sampler, arrays_of, tell, uniform
from fp8.serve.sequence import Sequence
from toy_engine import answer, tokens_of

CPU = torch.device("cpu")
V = 50


def sample(logits: torch.Tensor, *rows: Row) -> list[int]:
    return Sampler(max(row.seat for row in rows) + 1, logits.shape[1], logits.device)(logits, rows).tolist()


def counts(logits: list[float], draws: int = 4000, **params: Any) -> np.ndarray:
    """How often each token comes, for evenly spaced random numbers: probabilities to within 1 / draws."""
    p = SamplingParams(**params)
    rows = [Row(p, i, (i + 0.5) / draws) for i in range(draws)]
    tokens = sample(torch.tensor([logits]).expand(draws, -1), *rows)
    return np.bincount(tokens, minlength=len(logits)) / draws


def softmax(x: Any) -> np.ndarray:
    e = np.exp(np.array(x, dtype=np.float64) - np.max(x))
    return e / e.sum()


LOGITS = [0.0, 2.0, 1.0, -1.0, 1.5]


def test_greedy_takes_the_first_of_the_largest() -> None:
    greedy = SamplingParams(temperature=0)
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -math.inf, 5.0]])
    assert sample(logits, Row(greedy, 0, 0.9), Row(greedy, 1, 0.9)) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_divides_logits(temperature: float) -> None:
    want = softmax(np.array(LOGITS) / temperature)
    assert counts(LOGITS, temperature=temperature) == pytest.approx(want, abs=4e-4)


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even() -> None:
    assert counts(LOGITS, temperature=1e-30).tolist() == [0, 1, 0, 0, 0]
    assert counts(LOGITS, temperature=1e30) == pytest.approx(np.full(5, 0.2), abs=4e-4)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1, 4]),  # 0.45 + 0.28 of the whole
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.3}, [1, 2, 4]),  # exp(-1) = 0.37, exp(-2) = 0.14
        ({"top_k": 3, "top_p": 0.8}, [1, 4]),  # of the three kept: 0.51, 0.31, 0.19
        ({"logit_bias": {0: 30.0}, "top_k": 1}, [0]),
    ],
)
def test_what_is_kept_keeps_its_proportions(params: dict[str, Any], kept: list[int]) -> None:
    logits = np.array(LOGITS)
    mask = np.full(5, -np.inf)
    mask[kept] = 0
    want = softmax(logits + mask) if "logit_bias" not in params else np.eye(5)[0]
    assert counts(LOGITS, **params) == pytest.approx(want, abs=4e-4)


def test_equals_at_the_border_are_kept_by_their_numbers() -> None:
    assert counts([1.0, 1.0, 1.0, 0.0], top_k=2) == pytest.approx([0.5, 0.5, 0, 0], abs=4e-4)


@st.composite
def rows(draw: Any) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 7])),
        top_p=draw(st.sampled_from([1.0, 0.6])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        presence_penalty=draw(st.sampled_from([0.0, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logit_bias=draw(st.sampled_from([None, {1: 2.5, 3: -4.0}])),
    )


def seated(sampler: Sampler, params: SamplingParams, seat: int) -> None:
    """A sequence with a prompt and an answer in its seat."""
    sequence = Sequence(Request("x", [seat % V, 3], params), 0, 100, frozenset())
    sequence.tokens += [7, 7, 9]
    sequence.seat = seat
    sampler.seat(sequence)


@settings(max_examples=40)
@given(
    params=st.lists(rows(), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from([V, 257, 1003]),
    coarse=st.booleans(),
)
def test_a_row_does_not_depend_on_the_others(
    params: list[SamplingParams], seed: int, vocabulary: int, coarse: bool
) -> None:
    logits = torch.randn(len(params), vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    logits = logits.round() if coarse else logits  # many equals
    asked = [Row(p, seat, uniform(seed, seat), banned=(2,) if seat % 3 == 0 else ()) for seat, p in enumerate(params)]
    together, alone = Sampler(8, vocabulary, CPU), Sampler(8, vocabulary, CPU)
    for row in asked:
        seated(together, row.params, row.seat)
        seated(alone, row.params, row.seat)
    want = [alone(logits[i : i + 1].clone(), [row]).item() for i, row in enumerate(asked)]
    assert together(logits, asked).tolist() == want
    assert torch.equal(together.last, alone.last)


def test_penalties_are_those_of_the_definition() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    sampler = Sampler(1, 6, CPU)
    sequence = Sequence(Request("x", [0, 1], params), 0, 9, frozenset())
    sequence.tokens += [1, 2, 2]
    sequence.seat = 0
    sampler.seat(sequence)
    logits = torch.tensor([[4.0, -1.0, 3.0, 0.9, 0.0, 0.0]])
    sent = {
        name: torch.tensor([getattr(params, name)])
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    }
    changed = sampler._penalized(logits, sent | {"seat": torch.tensor([0])})
    assert changed.tolist() == [[2.0, -2.75, 0.25, pytest.approx(0.9), 0.0, 0.0]]


def test_the_same_token_is_less_likely_each_time_it_came() -> None:
    favoured = {"logit_bias": {5: 9.0}, "temperature": 0, "max_tokens": 12}
    free = tokens_of(answer([1], SamplingParams(**favoured)))
    penalized = tokens_of(answer([1], SamplingParams(**favoured, frequency_penalty=2.0)))
    assert free == [5] * 12 and 1 < penalized.count(5) < 12


def test_a_row_without_a_number_has_no_token() -> None:
    bad = torch.zeros(4, 5)
    bad[0, 3], bad[1, 2], bad[2] = math.nan, math.inf, -math.inf
    p = SamplingParams()
    tokens = sample(bad, *(Row(p, i, 0.5) for i in range(4)))
    assert tokens[:3] == [-1, -1, -1] and tokens[3] >= 0


def test_random_numbers_are_even_and_depend_on_seed_and_position_alone() -> None:
    drawn = np.array([uniform(seed, position) for seed in range(60) for position in range(60)])
    assert drawn.min() >= 0 and drawn.max() < 1 and len(set(drawn)) == 3600
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] / 3600 - 0.1).max() < 0.02
    assert uniform(-5, 3) == uniform(2**64 - 5, 3)


def test_logprobs_do_not_depend_on_company() -> None:
    logits = torch.randn(5, 1003, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1, 2, 3, 4, 5])
    whole = tell(logits, tokens, 4)
    for i in range(5):
        one = tell(logits[i : i + 1].clone(), tokens[i : i + 1], 2)
        assert torch.equal(one.chosen, whole.chosen[i : i + 1]) and torch.equal(one.top[0], whole.top[i, :2])
        assert torch.equal(one.rank, whole.rank[i : i + 1]) and torch.equal(one.ids[0], whole.ids[i, :2])


def test_a_rank_counts_those_that_are_likelier() -> None:
    told = tell(torch.tensor([[1.0, 3.0, 1.0, 2.0]] * 3), torch.tensor([1, 2, 3]), 2)
    assert told.rank.tolist() == [1, 3, 2] and told.ids.tolist() == [[1, 3]] * 3


def test_rows_share_a_distribution_with_torch() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 3
    got = counts(logits[0].tolist(), 20000)
    assert np.abs(got - logits.softmax(-1)[0].numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
        ({"top_k": -2}, "top_k=-2 must be a whole number, at least -1"),
        ({"n": 0}, "n=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"min_tokens": 20}, "min_tokens=20 is more than max_tokens=16"),
        ({"presence_penalty": 3}, "presence_penalty=3 must be between -2 and 2"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0 must be between 0\.01 and 100"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty=1e-30"),
        ({"repetition_penalty": 1e30}, r"repetition_penalty=1e\+30"),
        ({"logit_bias": {1: 1e38}}, "not between -100 and 100"),
        ({"n": 10**9}, "at most 16384 texts"),
        ({"stop": ["a", ""]}, "at least one character"),
        ({"stop_token_ids": ["a"]}, "'a', which is not a token number"),
        ({"logprobs": 21}, "at most 20"),
        ({"logit_bias": {1: math.inf}}, "inf, which is not between"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_impossible_parameters_are_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        SamplingParams(**params)


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), max_tokens=np.int32(5), seed=np.int64(1))
    assert params.temperature == 0.5 and params.max_tokens == 5


def test_a_top_k_beyond_every_vocabulary_keeps_all_tokens() -> None:
    params = SamplingParams(top_k=2**70, temperature=1)
    assert arrays_of([Row(params, 0, 0.5)], 7)["top_k"].tolist() == [7]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="max_running=0"):
        EngineOptions(max_running=0)
    with pytest.raises(ValueError, match=r"memory_fraction=1\.5"):
        EngineOptions(memory_fraction=1.5)
