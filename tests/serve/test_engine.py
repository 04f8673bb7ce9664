"""Laws of the engine, over a model that shows every wrong page: what a request gets does not depend on its company."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.errors import ConfigError, RequestError
from fp8.serve import Engine, EngineOptions, Request, SamplingParams
from fp8.serve.graphs import Captured, DecodeGraphs
from fp8.serve.inputs import batch_of, empty, pack, unpack
from toy_engine import VOCABULARY, Letters, Toy, all_free, answer, engine, finish, hashed, tokens_of, watch

GREEDY = SamplingParams(temperature=0, max_tokens=10)


def greedy(prompt: list[int], count: int) -> list[int]:
    """The definition."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(hashed(tokens))))
    return tokens[len(prompt) :]


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    return tokens_of(answer(list(prompt), params, max_step_tokens=10_000, prefix_caching=False))


@st.composite
def requests(draw: Any) -> tuple[int, list[int], SamplingParams, int | None]:
    """(step of arrival, prompt, parameters, steps until it is aborted)."""
    beginning = draw(st.sampled_from([[], [1] * 9, [1, 2] * 9, [3] * 17]))
    prompt = beginning + draw(st.lists(st.integers(0, 3), min_size=0 if beginning else 1, max_size=12))
    penalty = draw(st.sampled_from([0.0, 0.0, 0.0, 1.5]))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.7])),
        seed=draw(st.integers(0, 3)),
        presence_penalty=penalty,
        max_tokens=draw(st.integers(1, 14)),
        stop_token_ids=draw(st.sampled_from([(), (), (5, 6, 7)])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
    )
    return draw(st.integers(0, 12)), prompt, params, draw(st.sampled_from([None, None, None, 0, 3]))


@settings(max_examples=60)
@given(
    traffic=st.lists(requests(), min_size=1, max_size=9),
    pages=st.integers(11, 30),
    max_running=st.integers(1, 6),
    budget=st.sampled_from([1, 3, 8, 64]),
    caching=st.booleans(),
    deterministic=st.booleans(),
)
def test_a_request_gets_the_same_tokens_in_any_traffic(
    traffic: list[Any], pages: int, max_running: int, budget: int, caching: bool, deterministic: bool
) -> None:
    e = engine(
        pages=pages,
        max_running=max_running,
        max_step_tokens=budget,
        prefix_caching=caching,
        deterministic=deterministic,
    )
    watch(e)
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    step = 0
    while step <= 16 or e.has_work():
        for i, (arrival, prompt, params, patience) in enumerate(traffic):
            if step == arrival:
                e.add(Request(str(i), prompt, params))
            if patience is not None and step == arrival + patience:
                e.abort(str(i))
        for output in e.step():
            assert output.id not in ended, "an output after the last"
            got.setdefault(output.id, []).extend(output.new_tokens)
            ended |= {} if output.finished is None else {output.id: output.finished}
        step += 1
        assert step < 3000, "nobody waits for ever"
    for i, (_, prompt, params, patience) in enumerate(traffic):
        want = alone(tuple(prompt), params)
        have = got[str(i)]
        assert have == want[: len(have)] and (ended[str(i)] == "abort" or len(have) == len(want))
        assert ended[str(i)] != "abort" or patience is not None
    assert all_free(e)


def test_greedy_tokens_are_those_of_the_definition() -> None:
    assert tokens_of(answer([1, 2, 3], GREEDY)) == greedy([1, 2, 3], 10)


def test_the_next_step_is_launched_before_tokens_are_read() -> None:
    e = engine()
    e.add(Request("a", [1], GREEDY))
    assert e.step() == [] and len(e.model.rows) == 1
    assert len(e.step()) == 1 and len(e.model.rows) == 2


def test_an_end_by_length_costs_no_row_and_a_stop_costs_one() -> None:
    e = engine()
    e.add(Request("a", [1], GREEDY))
    assert len(tokens_of(finish(e)["a"])) == sum(e.model.rows) == 10
    third = greedy([1], 3)[2]
    e = engine()
    e.add(Request("a", [1], SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[third])))
    (*_, last) = finish(e)["a"]
    assert (last.finished, last.stop_reason, sum(e.model.rows)) == ("stop", third, 4)


def test_texts_of_one_prompt_compute_it_once() -> None:
    e = engine()
    for name in "ab":
        e.add(Request(name, [1, 2] * 10, GREEDY))
    outputs = finish(e)
    assert e.model.rows[0] == 20 + 4  # at least one token is computed: here the last page of 4
    assert outputs["b"][0].cached_tokens == 16 and outputs["a"][0].cached_tokens == 0
    assert tokens_of(outputs["a"]) == tokens_of(outputs["b"])
    assert e.stats().prefix_hit_tokens == 16


def test_pages_that_nobody_holds_are_found_again_until_they_are_needed() -> None:
    e = engine(pages=8)
    prompt = list(range(17))
    e.add(Request("a", prompt, GREEDY))
    finish(e)
    e.add(Request("b", prompt, GREEDY))
    assert finish(e)["b"][0].cached_tokens == 16
    e.add(Request("c", [9] * 30, SamplingParams(max_tokens=1)))
    finish(e)
    e.add(Request("d", prompt, GREEDY))
    assert finish(e)["d"][0].cached_tokens == 0


def test_the_youngest_is_preempted_and_goes_on_as_if_nothing_had_been() -> None:
    e = engine(pages=6, prefix_caching=False)
    for name in "ab":
        e.add(Request(name, [ord(name) % 7] * 8, SamplingParams(temperature=0, max_tokens=14)))
    outputs = finish(e)
    assert e.stats().preemptions > 0
    for name in "ab":
        assert tokens_of(outputs[name]) == greedy([ord(name) % 7] * 8, 14)
    assert all_free(e)


def test_a_long_prompt_does_not_keep_others_waiting() -> None:
    e = engine(max_step_tokens=8)
    e.add(Request("short", [1], GREEDY))
    e.step()
    e.add(Request("long", [2] * 60, GREEDY))
    assert [len(e.step()) for _ in range(8)] == [1] * 8
    assert max(e.model.rows) == 8


def test_a_request_with_logits_that_are_not_finite_ends_alone() -> None:
    bad = greedy([1, 2], 3)[2]
    e = engine(Toy(broken=bad), Letters())
    e.add(Request("bad", [1, 2], GREEDY))
    e.add(Request("good", [4], SamplingParams(temperature=0, max_tokens=6, logit_bias={bad: -100.0})))
    outputs = finish(e)
    assert [o.finished for o in outputs["bad"]] == [None, None, None, "error"]
    assert "request 'bad' are not finite" in str(outputs["bad"][-1].error)
    assert outputs["good"][-1].finished == "length" and all_free(e)


def test_pages_behind_logits_that_are_not_finite_are_not_found_again() -> None:
    e = engine(Toy(broken=7))
    for name in ("first", "second"):
        e.add(Request(name, [1, 2, 3, 4, 5, 6, 5, 6, 5, 7], GREEDY))
        (last,) = finish(e)[name]
        assert last.finished == "error" and last.cached_tokens == 0
    e.add(Request("whole", [1, 2, 3, 4, 5, 6, 5, 6, 5], SamplingParams(temperature=0, max_tokens=1)))
    e.add(Request("again", [1, 2, 3, 4, 5, 6, 5, 6, 5], SamplingParams(temperature=0, max_tokens=1)))
    found = finish(e)
    assert [found[name][0].cached_tokens for name in ("whole", "again")] == [0, 8]


def test_an_end_may_come_right_behind_min_tokens() -> None:
    tokens = greedy([1], 6)
    fifth = tokens[4]
    assert fifth not in tokens[:4]
    for least, count in ((4, 5), (5, 10)):
        params = SamplingParams(temperature=0, max_tokens=10, min_tokens=least, stop_token_ids=[fifth])
        outputs = answer([1], params)
        assert (len(tokens_of(outputs)), outputs[-1].finished) == (count, "stop" if count == 5 else "length")


def test_marks_and_stop_texts_are_shown_only_if_asked_for() -> None:
    forced = {"temperature": 0, "logit_bias": {39: 100.0}, "ignore_eos": True}
    texts = [
        "".join(o.new_text for o in answer([1], SamplingParams(**forced, **more), tokenizer=Letters()))
        for more in ({"max_tokens": 3}, {"max_tokens": 3, "skip_special_tokens": False})
    ]
    assert texts == ["", 3 * chr(65 + 39)]
    text = Letters().decode(greedy([1], 10))
    kept = SamplingParams(temperature=0, max_tokens=10, stop=text[4:6], include_stop_str_in_output=True)
    outputs = answer([1], kept, tokenizer=Letters())
    assert "".join(o.new_text for o in outputs) == text[: text.index(text[4:6]) + 2]


def test_ends_are_held_back_until_min_tokens() -> None:
    class Ending(Letters):
        ends = frozenset({greedy([1], 1)[0]})

    soon = answer([1], GREEDY, tokenizer=Ending())
    assert (len(tokens_of(soon)), soon[-1].finished, soon[-1].stop_reason) == (1, "stop", None)
    params = SamplingParams(temperature=0, max_tokens=10, min_tokens=4)
    late = tokens_of(answer([1], params, tokenizer=Ending()))
    assert len(late) >= 4 and not Ending.ends & set(late[:4])
    never = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert tokens_of(answer([1], never, tokenizer=Ending())) == greedy([1], 10)


def test_a_stop_text_that_spans_tokens_ends_an_answer_before_it() -> None:
    text = Letters().decode(greedy([1], 10))
    stop = text[4:6]
    outputs = answer([1], SamplingParams(temperature=0, max_tokens=10, stop=stop), tokenizer=Letters())
    shown = "".join(o.new_text for o in outputs)
    assert shown == text[: text.index(stop)] and outputs[-1].finished == "stop" and outputs[-1].stop_reason == stop


def test_logprobs_are_of_the_models_distribution() -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, logit_bias={5: 100.0})
    outputs = answer([1, 2, 3], params)
    assert tokens_of(outputs) == [5, 5, 5]
    logits = hashed([1, 2, 3]).astype(np.float64)
    logprob = logits - np.log(np.exp(logits).sum())
    (first,) = outputs[0].logprobs or []
    assert first[5].logprob == pytest.approx(logprob[5], abs=1e-5) and first[5].rank == (logprob > logprob[5]).sum() + 1
    assert first[int(logits.argmax())].rank == 1 and len(first) == 3
    nothing, *prompt = outputs[0].prompt_logprobs or []
    assert nothing is None and [next(iter(entry or {})) for entry in prompt] == [2, 3]
    assert outputs[1].prompt_logprobs is None


@pytest.mark.parametrize("budget", [1, 3, 64])
def test_prompt_logprobs_do_not_depend_on_chunks(budget: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    whole = answer(prompt, params)[0].prompt_logprobs
    assert answer(prompt, params, max_step_tokens=budget)[0].prompt_logprobs == whole and len(whole) == 7


def test_every_step_of_a_deterministic_engine_has_the_same_rows() -> None:
    e = engine(deterministic=True, max_running=16)
    for i in range(5):
        e.add(Request(str(i), [i] * (7 * i + 1), GREEDY))
    outputs = finish(e)
    assert set(e.model.rows) == {16}
    assert all(tokens_of(outputs[str(i)]) == greedy([i] * (7 * i + 1), 10) for i in range(5))


class Interrupted(Toy):
    """Raises every third time, half-way: some of the step's tokens are stored, wrongly."""

    def __call__(self, batch: Any, cache: Any) -> Any:
        self.rows.append(0)
        if len(self.rows) % 3 == 0:
            cache.tokens[batch.slots[batch.slots >= 0]] = 17
            raise KeyboardInterrupt
        return super().__call__(batch, cache)


@pytest.mark.parametrize("budget", [5, 64])
def test_an_interrupted_step_is_computed_anew(budget: int) -> None:
    e = engine(Interrupted(), max_step_tokens=budget)
    params = SamplingParams(temperature=0, max_tokens=10, presence_penalty=1.0)
    for i in range(4):
        e.add(Request(str(i), [1, 2] * 5, params))
    got: dict[str, list[int]] = {}
    while e.has_work():
        try:
            outputs = e.step()
        except KeyboardInterrupt:
            continue
        for output in outputs:
            got.setdefault(output.id, []).extend(output.new_tokens)
    want = tokens_of(answer([1, 2] * 5, params))
    assert all(tokens == want for tokens in got.values()) and len(got) == 4 and all_free(e)


class Replayed:
    """What `DecodeGraphs` does, without a graph: the static buffer of each size, filled and looked at."""

    size_for, __call__ = DecodeGraphs.size_for, DecodeGraphs.__call__

    def __init__(self, e: Engine, sizes: list[int]) -> None:
        self.sizes, self.width = sizes, e.scheduler.pages_for(e.max_model_len)
        self._captured = {size: self.capture(e, size) for size in sizes}
        self.replays = 0

    def capture(self, e: Engine, rows: int) -> Captured:
        buffer, layout = pack(empty(rows, self.width), pin=False)
        logits = torch.zeros(rows, VOCABULARY)

        def replay() -> None:
            self.replays += 1
            logits.copy_(e.model(batch_of(unpack(buffer, layout), e.sampler.last), e.cache))

        return Captured(SimpleNamespace(replay=replay), buffer, logits)


def test_filled_batches_of_fixed_sizes_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8.serve.graphs.pack", lambda arrays, pin: pack(arrays, False))
    e = engine(max_running=7)
    watch(e)
    e.forward.graphs = Replayed(e, [1, 3, 4])
    for i in range(6):
        e.add(Request(str(i), [i] * (5 * i + 1), SamplingParams(temperature=0, max_tokens=4 + 3 * i)))
    outputs = finish(e)
    assert all(tokens_of(outputs[str(i)]) == greedy([i] * (5 * i + 1), 4 + 3 * i) for i in range(6))
    assert e.forward.graphs.replays >= 9


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request("x", []), "is empty"),
        (Request("x", [1] * 60), "cut the prompt, or give the engine more pages"),
        (Request("x", [1, 40]), "token 40, which is not in the vocabulary of 40"),
        (Request("x", [1, -1]), "token -1"),
        (Request("x", [1.5]), r"token 1\.5"),
        (Request("x", [1], SamplingParams(logit_bias={77: 1.0})), "logit_bias of request 'x' holds token 77"),
        (Request("x", [1], SamplingParams(stop="a")), "no tokenizer"),
        (Request("here", [1]), "there is a request 'here' already"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(request_: Request, told: str) -> None:
    e = engine(pages=12)
    e.add(Request("here", [1], GREEDY))
    with pytest.raises(RequestError, match=told):
        e.add(request_)
    assert tokens_of(finish(e)["here"]) == greedy([1], 10)


def test_an_engine_holds_no_more_than_its_pages() -> None:
    assert engine(pages=3).max_model_len == 13
    with pytest.raises(ConfigError, match="does not fit into a cache of 3 pages of 4: at most 13"):
        engine(pages=3, max_model_len=14)
    with pytest.raises(ConfigError, match="more than the 200 positions"):
        engine(max_model_len=201)
    full = answer([1] * 12, SamplingParams(max_tokens=None, temperature=0), pages=3)
    assert len(tokens_of(full)) == 1 and full[-1].finished == "length"


def test_to_abort_is_harmless_and_tells() -> None:
    e = engine()
    e.abort("nobody")
    e.add(Request("a", [1] * 9, GREEDY))
    e.step()
    e.abort("a")
    e.abort("a")
    assert [o.finished for o in finish(e)["a"]] == ["abort"] and all_free(e)


def test_an_unknown_cache_size_is_reckoned() -> None:
    reckoned = Engine(Toy(), None, EngineOptions(max_running=2))
    assert reckoned.stats().pages_total == 2 * -(-200 // 64)
