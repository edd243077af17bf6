"""A method of a gRPC service over HTTP: JSON in and out, by the same code, for the same callers.

A reply is one JSON object, a stream of them lines of JSON; field names are the proto's, and 64-bit numbers strings, as
protobuf's JSON has them. An error is {"error": {...}} with its code, or the last line where a stream had begun.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from cache_store.errors import InvalidRequest
from protos.status import Failure
from server.calls import Calls
from server.errors import Unauthenticated
from server.http_status import error_body, http_code
from server.identity import Identities, answer_for

JSON, JSON_LINES = "application/json", "application/jsonl"


def line_of(message: Message) -> bytes:
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What an endpoint calls."""

    name: str
    """As metrics and logs have it: Service/Method."""
    request: type[Message]
    behaviour: Callable[[Any, Any], Awaitable[Any]]
    """The servicer's. A stream it writes to its context, which has `write` and nothing else."""
    streams: bool = False
    line: Callable[[Any], bytes] = line_of
    """A message of the stream."""
    read_body: Callable[[str, AsyncIterator[bytes]], Any] | None = None
    """Takes the body as it comes, and what the path names; None: it is a JSON object of the request's fields."""


class Endpoint:
    """An ASGI application for one method. Fields of the request come from the path, the query and the body."""

    def __init__(self, method: Method, calls: Calls, identities: Identities, *, most_bytes: int) -> None:
        self._method = method
        self._calls = calls
        self._identities = identities
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A call is a task of its own, which ends when the client hangs up."""
        call = asyncio.create_task(self._answer(Request(scope, receive), _Answer(send, self._method)))
        try:
            await asyncio.wait([call])
        finally:
            call.cancel()
            await asyncio.wait([call])
        if not call.cancelled():
            call.result()

    async def _answer(self, request: Request, answer: "_Answer") -> None:
        name = self._method.name
        try:
            caller = self._identities.identify(request.headers.items())
        except Unauthenticated as error:
            async with self._calls.accounted(name, answer.fail):
                raise error
            return
        answer_for(caller)
        async with self._calls.accounted(name, answer.fail, tenant=caller.tenant, key=caller.key_id):
            if self._method.read_body is not None:
                with self._calls.stream():
                    pieces = self._method.read_body(request.path_params["bank"], _pieces(request))
                    await answer.reply(await self._method.behaviour(pieces, answer))
                return
            message = await self._message(request)
            task = asyncio.current_task()
            assert task is not None
            gone = asyncio.create_task(_hung_up(request.receive))
            gone.add_done_callback(partial(_cancel, task))
            try:
                if self._method.streams:
                    with self._calls.stream():
                        await self._method.behaviour(message, answer)
                    await answer.end()
                else:
                    await answer.reply(await self._method.behaviour(message, answer))
            finally:
                gone.cancel()

    async def _message(self, request: Request) -> Message:
        body = bytearray()
        async for piece in _pieces(request):
            body += piece
            if len(body) > self._most_bytes:
                raise InvalidRequest("body", f"must have at most {self._most_bytes:,} bytes")
        try:
            fields = json.loads(body) if body.strip() else {}
        except ValueError as error:
            raise InvalidRequest("body", f"is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidRequest("body", "must be a JSON object")
        try:
            given = {**fields, **_query(request), **request.path_params}
            return ParseDict(given, self._method.request())
        except ParseError as error:
            raise InvalidRequest("body", str(error)) from error


class _Answer:
    """What is sent. To a servicer it is the call's context."""

    def __init__(self, send: Send, method: Method) -> None:
        self._send = send
        self._method = method
        self._begun = False

    async def write(self, message: Message) -> None:
        """One more of a stream."""
        await self._begin(200, JSON_LINES)
        await self._body(self._method.line(message), more=True)

    async def end(self) -> None:
        await self._begin(200, JSON_LINES)
        await self._body(b"", more=False)

    async def reply(self, message: Message) -> None:
        await self._begin(200, JSON)
        await self._body(line_of(message), more=False)

    async def fail(self, failed: Failure) -> None:
        body = error_body(failed)
        retry_after_s = body["error"].get("retry_after_s")
        more = [] if retry_after_s is None else [(b"retry-after", str(math.ceil(retry_after_s)).encode())]
        await self._begin(http_code(failed), JSON, *more)
        await self._body(json.dumps(body).encode() + b"\n", more=False)

    async def _begin(self, code: int, media_type: str, *more: tuple[bytes, bytes]) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", media_type.encode()), *more]
            await self._send({"type": "http.response.start", "status": code, "headers": headers})

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _query(request: Request) -> dict[str, Any]:
    words = {"true": True, "false": False}
    return {name: words.get(value, value) for name, value in request.query_params.items()}


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect as error:
        raise InvalidRequest("body", "ended too early") from error


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _cancel(call: "asyncio.Task[Any]", gone: "asyncio.Task[None]") -> None:
    if not gone.cancelled():
        call.cancel()
