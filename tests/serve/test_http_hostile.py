"""Requests that nobody should send: each is answered 4xx with a reason, and nothing stays behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8.serve.http.door import ServerOptions
from http_server import idle, serving, toy_door, wait_until

CHAT = {"messages": [{"role": "user", "content": "A"}]}
TEXT = {"prompt": "AB"}
BOTH: list[dict[str, Any]] = [
    {"n": 0}, {"n": -1}, {"n": 129}, {"n": True}, {"n": "1"}, {"n": 10**400}, {"temperature": -0.1}, {"temperature": 3},
    {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.5}, {"presence_penalty": 9}, {"seed": 1.5},
    {"seed": 2**64}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [1]}, {"stop": ["x"] * 17}, {"logit_bias": {"x": 1}},
    {"logit_bias": {"1": 1000}}, {"logit_bias": {"999999": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": [1]},
    {"max_tokens": -1}, {"max_tokens": "9"}, {"max_tokens": 2.5}, {"min_tokens": -1},
    {"min_tokens": 50, "max_tokens": 9},
    {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0}, {"stop_token_ids": [-1]}, {"stop_token_ids": [999]},
    {"stream": "yes"}, {"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"x": 1}},
    {"model": "other"}, {"model": 7}, {"temprature": 0}, {"user": 7}, {"metadata": {"a": 1}},
]  # fmt: skip
OF_TEXT: list[Any] = [
    {}, {"prompt": None}, {"prompt": 7}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "a"]}, {"prompt": [1.5]},
    {"prompt": ""}, {"prompt": [""]}, {"prompt": [-1]}, {"prompt": [40]}, {"prompt": [2**70]}, {"prompt": [True]},
    {"prompt": {"a": 1}}, {"prompt": "A" * 5000}, {"prompt": [1] * 200}, {"prompt": [[1]] * 3000},
    TEXT | {"suffix": "end"}, TEXT | {"best_of": 3}, TEXT | {"logprobs": -1}, TEXT | {"logprobs": 21},
    TEXT | {"logprobs": True}, TEXT | {"max_tokens": 0}, TEXT | {"echo": 1},
    [], "text", 7, None,
]  # fmt: skip
OF_CHAT: list[Any] = [
    {}, {"messages": []}, {"messages": "hi"}, {"messages": [{}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "pope", "content": "A"}]}, {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    CHAT | {"tools": [{"type": "function"}]}, CHAT | {"tool_choice": "required"}, CHAT | {"functions": [{}]},
    CHAT | {"response_format": {"type": "json_object"}}, CHAT | {"modalities": ["audio"]}, CHAT | {"top_logprobs": 2},
    CHAT | {"logprobs": True, "top_logprobs": 21}, CHAT | {"max_completion_tokens": 0}, CHAT | {"max_tokens": 0},
    {"messages": [{"role": "user", "content": "A" * 5000}]},
]  # fmt: skip
RAW = [
    b"", b"{", b"}", b"{'prompt': 'A'}", b'{"prompt": "A"', b'{"prompt": "\xff\xfe"}', b"\x00", b"nul", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": "A", "temperature": NaN}',
    b'{"prompt": "A\x00", "n": 1e999}',
    b'{"prompt": "A", "temperature": Infinity}', b'{"prompt": "A", "seed": ' + b"9" * 5000 + b"}", b"prompt=A",
    b'{"prompt": "A", "logit_bias": {"\\udfff": 1}}', b'{"prompt": "A", "top_p": -Infinity}', b"\xef\xbb\xbf{}",
]  # fmt: skip


@pytest.fixture(scope="module")
def door() -> Any:
    return toy_door(options=ServerOptions(max_body_bytes=1 << 20))


@pytest.fixture(scope="module")
def client(door: Any) -> Iterator[httpx2.Client]:
    with serving(door) as (url, _), httpx2.Client(base_url=url, timeout=20) as made:
        yield made
        wait_until(lambda: idle(door.engine.engine) and door.engine.live == 0)
        assert made.post("/v1/completions", json=TEXT).status_code == 200  # after all of it


def is_refusal(response: httpx2.Response) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 10
    assert len(response.text) < 2000, "what was sent is not sent back"


@pytest.mark.parametrize("body", BOTH, ids=lambda b: json.dumps(b)[:40])
def test_parameters_out_of_range_are_refused(client: httpx2.Client, body: dict[str, Any]) -> None:
    for path, rest in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        response = client.post(path, json=rest | body)
        is_refusal(response)
        assert response.status_code == (404 if body.get("model") == "other" else 400)
        name = list(body)[-1]
        assert name.split("_")[0] in response.json()["error"]["message"], "the message names what is wrong"


def test_bodies_of_another_shape_are_refused(client: httpx2.Client) -> None:
    for body in OF_TEXT:
        is_refusal(client.post("/v1/completions", json=body))
    for body in OF_CHAT:
        is_refusal(client.post("/v1/chat/completions", json=body))
    for body in ({}, {"prompt": "A", **CHAT}, {"prompt": 7}, {"prompt": "A", "model": "other"}):
        is_refusal(client.post("/tokenize", json=body))
    for body in ({}, {"tokens": [-1]}, {"tokens": [40]}, {"tokens": [2**80]}, {"tokens": "A"}):
        is_refusal(client.post("/detokenize", json=body))


def test_a_refusal_names_the_place_and_every_form_that_would_do(client: httpx2.Client) -> None:
    def told(path: str, body: dict[str, Any]) -> tuple[str, str | None]:
        error = client.post(path, json=body).json()["error"]
        return error["message"], error["param"]

    message, param = told("/v1/completions", {"prompt": {"a": 1}})
    assert message == "prompt: Input should be a valid string, or: Input should be a valid list" and param == "prompt"
    assert told("/v1/completions", TEXT | {"temprature": 1}) == ("temprature: there is no such field", "temprature")
    message, param = told("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]})
    assert message.startswith("messages.0.content: Input should be a valid string") and param == "messages"
    assert told("/v1/completions", {})[0] == "prompt: Field required"


def test_what_is_not_json_is_refused(client: httpx2.Client) -> None:
    for raw in RAW:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            is_refusal(client.post(path, content=raw, headers={"content-type": "application/json"}))
    message = client.post("/v1/completions", content=RAW[5], headers={"content-type": "application/json"}).json()
    assert message["error"]["message"] == "the body is not UTF-8: byte 12 is 0xff."
    form = client.post("/v1/completions", data={"prompt": "A"})
    assert form.status_code == 415 and "application/json" in form.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_not_read(client: httpx2.Client) -> None:
    large = b'{"prompt": "' + b"A" * (1 << 20) + b'"}'
    response = client.post("/v1/completions", content=large, headers={"content-type": "application/json"})
    assert response.status_code == 413
    is_refusal(response)
    pieces = (b"A" * 65536 for _ in range(64))  # no content-length
    assert client.post("/v1/completions", content=pieces).status_code == 413


def test_paths_and_methods_that_are_not_there(client: httpx2.Client) -> None:
    for response in (client.get("/nothing"), client.get("/v1/completions"), client.put("/v1/models"),
                     client.post("/v1/embeddings", json={}), client.request("BREW", "/health")):  # fmt: skip
        is_refusal(response)


def test_streams_refuse_before_they_begin(client: httpx2.Client) -> None:
    for body in ({"prompt": [999]}, {"prompt": "A", "n": 0}, {"prompt": [1] * 500}):
        response = client.post("/v1/completions", json=body | {"stream": True})
        is_refusal(response)
        assert response.headers["content-type"] == "application/json"


def test_extreme_numbers_that_are_allowed_are_served(client: httpx2.Client) -> None:
    for extreme in (
        {"temperature": 1e-300}, {"temperature": 2}, {"top_p": 1e-300}, {"min_p": 1}, {"repetition_penalty": 0.01},
        {"repetition_penalty": 100}, {"logit_bias": {str(i): -100 for i in range(40)}}, {"seed": -(2**63)},
        {"seed": 2**64 - 1}, {"top_k": 2**31 - 1}, {"max_tokens": None}, {"presence_penalty": -2}, {"n": 7, "seed": 1},
        {"stop": ["\U0001f433" * 1000]}, {"stop_token_ids": list(range(40))}, {"logprobs": 20, "echo": True},
    ):  # fmt: skip
        response = client.post("/v1/completions", json=TEXT | extreme)
        assert response.status_code == 200, (extreme, response.text)


def test_an_answer_longer_than_there_can_be_is_refused_with_what_there_is(client: httpx2.Client) -> None:
    longest = client.get("/v1/models").json()["data"][0]["max_model_len"]
    body = {"prompt": [1, 2, 3], "max_tokens": longest - 2}
    response = client.post("/v1/completions", json=body)
    is_refusal(response)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert f"ask for at most {longest - 3}" in response.json()["error"]["message"]
    for name in ("max_tokens", "max_completion_tokens"):
        is_refusal(client.post("/v1/chat/completions", json=CHAT | {name: 10**9}))
    assert client.post("/v1/completions", json=body | {"max_tokens": longest - 3}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": [1] * (longest - 5)}).status_code == 200, "16 is no wish"


def test_a_half_sent_request_holds_nothing(client: httpx2.Client, door: Any) -> None:
    url = client.base_url
    for sent in (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"\x16\x03\x01",
        b"GET / HT",
    ):
        with socket.create_connection((url.host, url.port)) as line:
            line.sendall(sent)
    wait_until(lambda: door.open == 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["prompt", "messages", "n", "temperature", "stop", "logit_bias", "stream", "logprobs", "echo", "top_k", "seed",
          "max_tokens", "stream_options", "min_p", "tools", "stop_token_ids", "suffix", "top_logprobs"]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), base=st.sampled_from([TEXT, CHAT, {}]))
def test_any_json_is_served_or_refused(client: httpx2.Client, body: dict[str, Any], base: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in base else "/v1/completions"
    content = json.dumps({"max_tokens": 2} | base | body).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    if response.status_code != 200:
        is_refusal(response)


def test_schemathesis_finds_no_server_error(door: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    with serving(toy_door()) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for operation in schema.get_all_operations():
            served = operation.ok()

            @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=served.as_strategy())
            def visit(case: Any) -> None:
                response = case.call()
                assert response.status_code < 500, response.text

            visit()
