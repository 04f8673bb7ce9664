"""`fp8 serve`, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from fp8.serve import Request, SamplingParams
from fp8.serve.http.async_engine import AsyncEngine
from fp8.serve.http.door import ServerOptions
from http_server import Slow, Talkers, idle, metric, serving, toy_door, wait_until
from toy_engine import answer, engine, tokens_of


@pytest.fixture(scope="module")
def door() -> Any:
    return toy_door()


@pytest.fixture(scope="module")
def url(door: Any) -> Iterator[str]:
    with serving(door) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def alone(prompt: list[int], **params: Any) -> list[int]:
    return tokens_of(answer(prompt, SamplingParams(**params), tokenizer=Talkers()))


def letters(tokens: list[int]) -> str:
    return Talkers().decode(tokens)


def test_a_completion_is_what_the_engine_says(client: Any) -> None:
    got = client.completions.create(model="toy", prompt=[1, 2, 3], max_tokens=9, temperature=0)
    want = alone([1, 2, 3], max_tokens=9, temperature=0)
    assert got.choices[0].text == letters(want) and got.choices[0].finish_reason in ("length", "stop")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (3, len(want)) and got.object == "text_completion"


def test_every_form_of_prompt_is_served_in_order(client: Any) -> None:
    many = client.completions.create(model="toy", prompt=["ab", "cd"], n=2, seed=4, max_tokens=4)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.usage.prompt_tokens == 4
    tokens = [Talkers().encode("ab"), Talkers().encode("cd")]
    same = client.completions.create(model="toy", prompt=tokens, n=2, seed=4, max_tokens=4)
    assert [c.text for c in same.choices] == [c.text for c in many.choices]
    assert [c.text for c in many.choices] == [
        letters(alone(prompt, seed=4 + i, max_tokens=4)) for prompt in tokens for i in range(2)
    ]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_a_stream_says_what_the_whole_answer_says(client: Any, echo: bool, logprobs: int | None) -> None:
    ask: dict[str, Any] = {"model": "toy", "prompt": "Ahab", "max_tokens": 7, "temperature": 0, "n": 2, "seed": 1}
    ask |= {"echo": echo} | ({} if logprobs is None else {"logprobs": logprobs})
    whole = client.completions.create(**ask)
    events = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(event.usage is None for event in events[:-1])
    for choice in whole.choices:
        pieces = [c for event in events for c in event.choices if c.index == choice.index]
        assert "".join(c.text for c in pieces) == choice.text and pieces[-1].finish_reason == choice.finish_reason
        assert choice.text.startswith("Ahab") == echo
        if logprobs is not None:
            joined = [t for c in pieces for t in c.logprobs.token_logprobs]
            assert joined == choice.logprobs.token_logprobs and (joined[0] is None) == echo
            assert choice.logprobs.text_offset[0] == 0


def test_scoring_a_prompt_makes_no_token(client: Any) -> None:
    got = client.completions.create(model="toy", prompt=[1, 2, 3], max_tokens=0, echo=True, logprobs=1)
    assert got.choices[0].text == "BCD" and len(got.choices[0].logprobs.token_logprobs) == 3
    assert got.choices[0].finish_reason == "length" and got.usage.completion_tokens == 0


def test_a_chat_streams_and_tells_logprobs(client: Any) -> None:
    ask: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "Call me"}], "temperature": 0}
    ask |= {"max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask)
    want = alone(Talkers().encode("Call meA"), max_tokens=6, temperature=0)
    assert whole.choices[0].message.content == letters(want) and whole.choices[0].message.role == "assistant"
    content = whole.choices[0].logprobs.content
    assert len(content) == len(want) and all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    events = list(client.chat.completions.create(**ask, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events) == whole.choices[0].message.content


def test_parts_of_text_are_a_message(client: Any) -> None:
    parts = [{"type": "text", "text": "Call "}, {"type": "text", "text": "me"}]
    ask: dict[str, Any] = {"model": "toy", "temperature": 0, "max_tokens": 5}
    one, other = (
        client.chat.completions.create(**ask, messages=[{"role": "user", "content": c}]) for c in (parts, "Call me")
    )
    assert one.choices[0].message.content == other.choices[0].message.content


def test_a_stop_text_ends_an_answer_and_is_not_in_it(client: Any) -> None:
    ask: dict[str, Any] = {"model": "toy", "prompt": "Ahab", "max_tokens": 20, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    got = client.completions.create(**ask, stop=[text[2:4]]).choices[0]
    assert got.text == text[: text.index(text[2:4])] and got.finish_reason == "stop"


def test_models_health_version_and_tokens(client: Any, url: str) -> None:
    assert [m.id for m in client.models.list()] == ["toy"]
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
    assert "version" in httpx2.get(f"{url}/version").json()
    got = httpx2.post(f"{url}/tokenize", json={"prompt": "ABC"}).json()
    assert got["count"] == 3 and got["max_model_len"] == 200
    assert httpx2.post(f"{url}/detokenize", json={"tokens": [0, 1, 2]}).json() == {"prompt": "ABC"}
    chat = httpx2.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": "A"}]}).json()
    assert chat["count"] == 2


def test_metrics_count_what_happened(client: Any, url: str) -> None:
    names = ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count", "generation_tokens_total",
             "inter_token_latency_seconds_count", "prompt_tokens_total", "http_requests_total")  # fmt: skip
    before = [metric(url, name) for name in names]
    client.completions.create(model="toy", prompt=[5] * 9, max_tokens=6, temperature=0, extra_body={"ignore_eos": True})
    grown = [metric(url, name) - was for name, was in zip(names, before, strict=True)]
    assert grown[:5] == [1, 1, 6, 5, 9] and grown[5] >= 1
    assert metric(url, "num_requests_running") == metric(url, "num_requests_waiting") == 0
    text = httpx2.get(f"{url}/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in text.text.splitlines():
        assert line.startswith(("# HELP fp8:", "# TYPE fp8:")) or float(line.rsplit(" ", 1)[1]) >= 0


def test_metrics_tell_who_runs_what_is_held_and_what_was_clipped() -> None:
    door = toy_door(Slow(), max_running=1)
    held = door.engine.engine
    with serving(door) as (url, _):
        ask = {"prompt": [[1] * 9, [2]], "max_tokens": 150, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=ask) as response:
            lines = response.iter_lines()
            next(lines)
            assert metric(url, "num_requests_running") == 1 and metric(url, "num_requests_waiting") == 1
            assert 2 / 100 < metric(url, "kv_cache_usage_perc") < 45 / 100, "of 100 pages of 4, two and more"
        wait_until(lambda: idle(held))
        assert metric(url, "kv_cache_usage_perc") == 0
        held.cache.saturated += 7
        httpx2.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 2}).raise_for_status()
        assert metric(url, "kv_cache_saturated_writes_total") == 7


def test_tokens_found_in_the_cache_are_told_in_a_stream_too(client: Any) -> None:
    ask: dict[str, Any] = {"model": "toy", "prompt": [7, 8] * 5, "max_tokens": 2, "n": 2}
    client.completions.create(**ask)
    *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert client.completions.create(**ask).usage.prompt_tokens_details.cached_tokens == 8
    assert last.usage.prompt_tokens_details.cached_tokens == 8, "once a prompt, not once a text"


def test_what_the_authors_recommend_is_the_default_over_http() -> None:
    door = toy_door()
    door.defaults |= {"temperature": 0.0, "max_tokens": 3}
    with serving(door) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model="toy", prompt=[1, 2, 3], max_tokens=9)
        assert whole.choices[0].text == letters(alone([1, 2, 3], max_tokens=9, temperature=0))
        talk = [{"role": "user", "content": "Ahab"}]
        assert client.chat.completions.create(model="toy", messages=talk).usage.completion_tokens == 3
        assert client.chat.completions.create(model="toy", messages=talk, max_tokens=5).usage.completion_tokens == 5


def test_many_clients_get_each_their_own_answer(door: Any, url: str) -> None:
    draw = random.Random(0)
    asked = [([draw.randrange(39) for _ in range(draw.randrange(1, 30))], draw.randrange(1, 12)) for _ in range(48)]

    async def ask(client: Any, prompt: list[int], most: int, stream: bool) -> str:
        got = await client.completions.create(model="toy", prompt=prompt, max_tokens=most, temperature=0, stream=stream)
        return "".join([e.choices[0].text async for e in got]) if stream else got.choices[0].text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *one, stream=i % 2 == 0) for i, one in enumerate(asked)))

    texts = asyncio.run(all_of_them())
    assert texts == [letters(alone(prompt, max_tokens=most, temperature=0)) for prompt, most in asked]
    assert idle(door.engine.engine)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_pages(stream: bool) -> None:
    door = toy_door(Slow())
    ask = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 190, "ignore_eos": True, "stream": stream}
    with serving(door) as (url, _):
        if stream:
            with httpx2.stream("POST", f"{url}/v1/completions", json=ask) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/v1/completions", json=ask, timeout=0.2)
        wait_until(lambda: idle(door.engine.engine))
        assert door.engine.live == 0 and door.engine.engine.stats().generated_tokens < 2 * 190
        assert metric(url, "request_success_total") == 2


def test_more_than_may_wait_are_told_to_come_later() -> None:
    door = toy_door(Slow(), max_running=2, max_waiting=1)
    with serving(door) as (url, _):
        ask = {"prompt": [[1], [2], [3]], "max_tokens": 190, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=ask) as response:
            lines = response.iter_lines()  # kept: one that is dropped closes the connection
            next(lines)
            refused = httpx2.post(f"{url}/v1/completions", json={"prompt": [1]})
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": [[1]] * 4}).status_code == 400
        wait_until(lambda: door.engine.live == 0)
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_a_reason(stream: bool) -> None:
    door = toy_door(Slow(), options=ServerOptions(timeout=0.15))
    with serving(door) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.APIError, match=r"0\.15 seconds"):
            got = client.completions.create(
                model="toy", prompt=[1], max_tokens=190, stream=stream, extra_body={"ignore_eos": True}
            )
            list(got)
        wait_until(lambda: idle(door.engine.engine))


def test_a_key_is_needed_where_one_was_given() -> None:
    with serving(toy_door(options=ServerOptions(api_key="söcret"))) as (url, _):
        wrong = httpx2.get(f"{url}/v1/models", headers={"authorization": "Bearer x"})
        assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        right = httpx2.get(f"{url}/v1/models", headers={"authorization": "Bearer söcret".encode()})
        assert right.status_code == 200 and httpx2.get(f"{url}/health").status_code == 200


def test_an_engine_that_fails_ends_everything_with_the_reason() -> None:
    class Failing(Slow):
        def __call__(self, *arguments: Any) -> Any:
            if len(self.rows) > 8:
                raise RuntimeError("the GPU fell off the bus")
            return super().__call__(*arguments)

    with serving(toy_door(Failing())) as (url, _):
        ask = {"prompt": [[1], [2]], "max_tokens": 100, "ignore_eos": True}
        first = httpx2.post(f"{url}/v1/completions", json=ask)
        assert first.status_code == 503 and "fell off the bus" in first.json()["error"]["message"]
        again = httpx2.post(f"{url}/v1/completions", json=ask)
        assert again.status_code == 503 and again.json()["error"]["code"] == "engine_dead"
        assert httpx2.get(f"{url}/health").status_code == 503 and httpx2.get(f"{url}/metrics").status_code == 200


def test_a_group_is_admitted_whole_or_not_at_all() -> None:
    async def ask() -> None:
        held = AsyncEngine(engine())
        held.start()
        requests = [Request("a", [1], SamplingParams()), Request("b", [999], SamplingParams())]
        with pytest.raises(ValueError, match="vocabulary"):
            await anext(held.generate(requests))
        stats = await held.stats()
        assert (stats.running, stats.waiting, held.live) == (0, 0, 0)
        held.stop()

    asyncio.run(ask())
