"""What stands before every handler: who may come in, how much may be brought, and what is written down of it.

In this order: a server that drains answers 503, a wrong key 401, a body that is too large 413, one that does not come
in time 408, one that is not JSON by its own word 415, one that is not UTF-8 400. The body is read whole here,
with its limit, so that a handler has it at once and whatever is received after it can only say that the client has
left. Every response carries `x-request-id` (the client's, if it sent one), is counted, and is one line of the log.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from .door import Door

log = logging.getLogger("fp8.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = {"/health", "/metrics", "/version"}  # need no key, and are answered while the server drains
PATHS = OPEN | {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/openapi.json"}
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
    413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error",
}  # fmt: skip


class Refusal(Exception):  # noqa: N818  it is an answer
    """A response that says no: its status, and OpenAI's words for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {429: {"retry-after": "1"}, 503: {"retry-after": "10", "connection": "close"}}.get(self.status, {})
        headers |= {408: {"x-should-retry": "false"}, 401: {"www-authenticate": "Bearer"}}.get(self.status, {})
        return JSONResponse(self.body(), self.status, headers)


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: Any, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(scope, send)
        busy = scope["path"] not in OPEN
        self.door.open += busy
        try:
            await self._pass(scope, receive, visit)
        except Exception:
            log.exception("a handler failed")
            await visit.refuse(Refusal(500, "an error of the server's; its log says more."))
        finally:
            self.door.open -= busy
            self._note(visit)

    async def _pass(self, scope: dict[str, Any], receive: Receive, visit: Visit) -> None:
        try:
            self._check(scope, visit.headers)
            body = await self._body(visit.headers, receive, scope["method"])
        except Refusal as refusal:
            await visit.refuse(refusal)
            return
        await self.app(scope, replayed(body, receive), visit.send)

    def _check(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> None:
        options, path = self.door.options, scope["path"]
        if path in OPEN:
            return
        if self.door.draining:
            raise Refusal(503, "this server is leaving: it finishes what it has begun and takes nothing new.")
        if options.api_key is not None:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").removeprefix(b"bearer ")
            if not hmac.compare_digest(given, options.api_key.encode()):
                message = "no valid API key: send the one that the server was given as 'Authorization: Bearer KEY'."
                raise Refusal(401, message, code="invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, method: str) -> bytes:
        if method not in ("POST", "PUT", "PATCH"):
            return b""
        most, body = self.door.options.max_body_bytes, bytearray()
        too_large = Refusal(413, f"the body is larger than {most:,} bytes, the most that this server takes.")
        if (length := headers.get(b"content-length", b"0")).isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.door.options.timeout):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refusal(408, "the body did not come in time.", code="timeout") from None
        check_type(bytes(body), headers.get(b"content-type", b"application/json"))
        return bytes(body)

    def _note(self, visit: Visit) -> None:
        """Count a response, and write it down."""
        path = visit.path if visit.path in PATHS else "other"
        self.door.engine.metrics.responses[path, str(visit.status)] += 1
        level = logging.DEBUG if visit.path in OPEN and visit.status < 400 else logging.INFO
        told = {"request_id": visit.id, "method": visit.method, "path": visit.path, "status": visit.status}
        told |= {"seconds": round(time.monotonic() - visit.began, 4), **visit.notes}
        log.log(level, "request", extra={"told": told})


class Visit:
    """One request and what became of it."""

    def __init__(self, scope: dict[str, Any], send: Send) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.method, self.path, self.began, self.status, self._send = (
            scope["method"], scope["path"], time.monotonic(), 499, send,
        )  # fmt: skip
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        fair = given.isascii() and given.isprintable() and 0 < len(given) <= 100
        self.id = given if fair else uuid.uuid4().hex
        self._scope, self._started = scope, False
        self.notes: dict[str, Any] = scope.setdefault("state", {}).setdefault("notes", {})

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, unless an answer has begun."""
        if self._started:
            return

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await refusal.response()(self._scope, nothing, self.send)


def check_type(body: bytes, kind: bytes) -> None:
    """Refuse a body that is not JSON by its own word, or not UTF-8."""
    kind = kind.split(b";")[0].strip().lower()
    if body and kind != b"application/json":
        raise Refusal(415, f"the body's content-type is {kind.decode('latin-1')!r}: send application/json.")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}.") from None


def replayed(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
