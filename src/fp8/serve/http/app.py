"""The routes: each reads a body, asks the engine, and shapes what comes back.

A stream's status is sent with its first token, not before: so a request that is refused after all has the status of a
refusal, in a stream too. What goes wrong later is an event with an `error`, which OpenAI's client raises. While an
answer is awaited, so is the client's leaving; whoever leaves ends his requests (`AsyncEngine.generate`).
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ... import __version__
from ...errors import Fp8Error, RequestError
from ..llm import requests_of
from ..params import SamplingParams
from ..request import Output
from .answers import DONE, Answer, Choice, event
from .async_engine import BusyError, EngineDeadError, StoppedError
from .door import Door
from .guard import Guard, Refusal
from .metrics import CONTENT_TYPE
from .schema import ChatBody, CompletionBody, DetokenizeBody, Sampled, TokenizeBody

STATUS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (BusyError, 429, "too_many_requests"),
    (StoppedError, 408, "timeout"),
    (EngineDeadError, 503, "engine_dead"),
    (Fp8Error, 400, None),
)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in {
        400: "The request cannot be served, and why", 401: "No valid API key", 404: "There is no such model",
        408: "It took too long", 413: "The body is too large", 415: "The body is not JSON",
        429: "Too many requests wait already", 503: "The server is leaving, or its engine failed",
    }.items()
}  # fmt: skip
TYPE_NAME = re.compile(r"[\[(]|^(str|int|float|bool|constrained.*|Part)$")  # pydantic's, of a union's branches


class Leaving(Exception):  # noqa: N818  nothing is wrong
    """The client has gone."""


def build_app(door: Door) -> Guard:
    """The ASGI application of a server; its lifespan starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        door.engine.start()
        yield
        door.engine.stop()

    app = FastAPI(title="fp8", version=__version__, lifespan=lifespan, responses=REFUSALS, strict_content_type=False)
    routes = Routes(door)
    for method, path in (
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/version"), ("GET", "/metrics"),
    ):  # fmt: skip
        handler = getattr(routes, path.removeprefix("/v1").strip("/").replace("/", "_"))
        app.add_api_route(path, handler, methods=[method], response_model=None)
    for kind in (RequestValidationError, HTTPException, Refusal, Leaving, *(row[0] for row in STATUS)):
        app.add_exception_handler(kind, refused)
    return Guard(app, door)


class Routes:
    """One method a path."""

    def __init__(self, door: Door) -> None:
        self.door, self.engine, self.words = door, door.engine, door.tokenizer

    async def completions(self, body: CompletionBody, request: HttpRequest) -> Response:
        params = body.params(self.door.defaults)
        self._room(len(body.prompts) * params.n)
        prompts = [await self._encoded(prompt) for prompt in body.prompts]
        self._fits(body, prompts)
        texts = [await self._echo(prompt) for prompt in body.prompts] if body.echo else [None] * len(prompts)
        return await self._answer(body, request, prompts, params, texts, silent=body.max_tokens == 0)

    async def chat_completions(self, body: ChatBody, request: HttpRequest) -> Response:
        params = body.params(self.door.defaults)
        self._room(params.n)
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(self._tokenizer().chat, messages)
        self._fits(body, [prompt])
        return await self._answer(body, request, [prompt], params, [None])

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give a prompt or messages, one of both.")
        messages = [message.plain() for message in body.messages or ()]
        words = self._tokenizer()
        tokens = await (asyncio.to_thread(words.chat, messages) if messages else self._encoded(body.prompt or ""))
        return {"count": len(tokens), "max_model_len": self.engine.engine.max_model_len, "tokens": tokens}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        self._model(body.model)
        vocabulary = self.engine.engine.model.config.vocab_size
        if wrong := [token for token in body.tokens if token >= vocabulary]:
            raise RequestError(f"token {wrong[0]} is not in the vocabulary of {vocabulary}.")
        return {"prompt": await asyncio.to_thread(self._tokenizer().decode, body.tokens, False)}

    async def models(self) -> dict[str, Any]:
        card = {"id": self.door.model, "object": "model", "created": 0, "owned_by": "fp8"}
        return {"object": "list", "data": [card | {"max_model_len": self.engine.engine.max_model_len}]}

    async def health(self) -> JSONResponse:
        """200 while new requests are served."""
        if self.engine.failure is not None:
            return JSONResponse({"status": "failed", "reason": self.engine.failure}, 503)
        return JSONResponse({"status": "draining" if self.door.draining else "ok"}, 503 if self.door.draining else 200)

    async def version(self) -> dict[str, str]:
        return {"version": __version__}

    async def metrics(self) -> PlainTextResponse:
        stats = None if self.engine.failure is not None else await self.engine.stats()
        text = self.engine.metrics.text(stats, self.door.model)
        return PlainTextResponse(text, headers={"content-type": CONTENT_TYPE})

    # ------------------------------------------------------------------ from a body to requests

    def _model(self, name: str | None) -> None:
        if name not in (None, self.door.model):
            message = f"there is no model {name!r} here: this server has {self.door.model!r}."
            raise Refusal(404, message, "model", "model_not_found")

    def _room(self, texts: int) -> None:
        if texts > self.engine.capacity:
            raise RequestError(f"{texts} texts in one request: this server holds {self.engine.capacity} at most.")

    def _fits(self, body: Sampled, prompts: Sequence[list[int]]) -> None:
        """Refuse an answer longer than there can be, where its length was asked for."""
        longest, most = self.engine.engine.max_model_len, body.most_asked
        for prompt in prompts:
            if most is not None and len(prompt) < longest < len(prompt) + most:
                message = f"a prompt of {len(prompt)} tokens and {most} of an answer are more than the {longest} that "
                message += f"this server holds: ask for at most {longest - len(prompt)}, or cut the prompt."
                raise Refusal(400, message, "max_tokens", "context_length_exceeded")

    def _tokenizer(self) -> Any:
        if self.words is None:
            raise RequestError("this model has no tokenizer: give prompts as tokens.")
        return self.words

    async def _encoded(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return await asyncio.to_thread(self._tokenizer().encode, prompt)

    async def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return await asyncio.to_thread(self._tokenizer().decode, prompt)

    # ------------------------------------------------------------------ from outputs to a response

    async def _answer(
        self,
        body: Sampled,
        request: HttpRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        echoes: Sequence[str | None],
        silent: bool = False,
    ) -> Response:
        self._model(body.model)
        chat, arrival = isinstance(body, ChatBody), time.monotonic()
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        answer, requests = Answer(name, self.door.model, chat, {}, sum(map(len, prompts))), []
        for p, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True)):
            for one in requests_of(f"{name}-{p}", prompt, params, arrival):
                choice = Choice(len(requests), chat, self.words, prompt, echo, params.logprobs or 0, silent)
                answer.choices[one.id] = choice
                requests.append(one)
        outputs = self.engine.generate(requests, self.door.options.timeout)
        notes = request.scope["state"]["notes"]
        notes |= {"id": name, "prompt_tokens": answer.prompt_tokens}
        if body.stream:
            first = await unless_gone(request, anext(outputs))
            return Stream(self._events(answer, first, outputs, body.usage_wanted, notes), outputs)
        return JSONResponse(await unless_gone(request, self._whole(answer, outputs, notes)))

    async def _whole(self, answer: Answer, outputs: AsyncGenerator[Output], notes: dict[str, Any]) -> dict[str, Any]:
        held: dict[str, list[Output]] = {name: [] for name in answer.choices}
        async for output in outputs:
            check(output)
            held[output.id].append(output)
        answer.cached = sum(each[-1].cached_tokens for each in first_of_each_prompt(held))
        body = answer.whole([choice.whole(held[name]) for name, choice in answer.choices.items()])
        notes["completion_tokens"] = body["usage"]["completion_tokens"]
        return body

    async def _events(
        self, answer: Answer, first: Output, outputs: AsyncGenerator[Output], wanted: bool, notes: dict[str, Any]
    ) -> AsyncGenerator[bytes]:
        none = {"usage": None} if wanted else {}
        if answer.chat:
            for choice in answer.choices.values():
                yield answer.piece([choice.opening()], none)
        try:
            async for output in chained(first, outputs):
                check(output)
                choice = answer.choices[output.id]
                piece = choice.piece(output)
                if output.finished and output.id.endswith("-0"):
                    answer.cached += output.cached_tokens
                yield answer.piece([piece], none)
        except Exception as error:  # noqa: BLE001  the status is sent: what is left is to say so
            yield event(refusal_of(error).body())
        else:
            if wanted:
                yield answer.piece([], {"usage": answer.usage()})
        notes["completion_tokens"] = answer.usage()["completion_tokens"]
        yield DONE


class Stream(StreamingResponse):
    """Server-sent events, whose source is closed when nobody takes them any more, whether or not they were begun."""

    def __init__(self, events: AsyncGenerator[bytes], source: AsyncGenerator[Output]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events, self._source = events, source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.aclose()


def first_of_each_prompt(held: dict[str, list[Output]]) -> list[list[Output]]:
    """Of several texts of a prompt, the first computes it: the others always find it in the cache."""
    return [outputs for name, outputs in held.items() if name.endswith("-0")]


async def chained(first: Output, rest: AsyncGenerator[Output]) -> AsyncGenerator[Output]:
    yield first
    async for output in rest:
        yield output


def check(output: Output) -> None:
    """Raise what went wrong with a sequence."""
    if output.finished == "error":
        raise Refusal(500, output.error or "the engine failed.")
    if output.finished == "abort":
        raise StoppedError("the server ended the request.")


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Any] | Any) -> Any:
    """What some work gives; it is cancelled, and `Leaving` raised, if the client goes first."""

    async def result() -> Any:
        return await work

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(result()), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Leaving
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def refused(_: HttpRequest, error: Exception) -> Response:
    """An exception as a response."""
    return Response(status_code=499) if isinstance(error, Leaving) else refusal_of(error).response()


def refusal_of(error: Any) -> Refusal:
    """An exception in OpenAI's words."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error)
    if isinstance(error, HTTPException):
        detail = {404: "there is no such path here.", 405: "this path takes another method."}
        return Refusal(error.status_code, detail.get(error.status_code, f"the body cannot be read: {error.detail}"))
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            return Refusal(status, str(error), code=code)
    return Refusal(500, f"an error of the server's: {type(error).__name__}")


def invalid(error: RequestValidationError) -> Refusal:
    """The first few things that are wrong with a body, each with its place; what was sent is not repeated."""
    told: dict[str, list[str]] = {}
    for one in error.errors():
        place, what = placed(one)
        if what not in told.setdefault(place, []):
            told[place].append(what)
    parts = [f"{place}: {', or: '.join(whats)}" for place, whats in told.items()]
    more = f" (and {len(parts) - 4} more)" if len(parts) > 4 else ""
    text = ("; ".join(parts[:4]) + more).encode(errors="replace").decode()
    param = next(iter(told)).split(".")[0]
    return Refusal(400, text[:1000], None if param == "the body" else param.encode(errors="replace").decode()[:100])


def placed(one: dict[str, Any]) -> tuple[str, str]:
    """Where pydantic found something, without the names of its types, and what."""
    if one["type"] == "json_invalid":
        return "the body", f"not JSON at character {one['loc'][-1]}: {one['ctx']['error']}"
    place = ".".join(str(part) for part in one["loc"][1:] if not TYPE_NAME.search(str(part)))
    what = "there is no such field" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, ")
    return place or "the body", what
