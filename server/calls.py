"""Around every call of ours: who calls, an id, the log context, metrics, errors as statuses, a door that closes."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from cache_store.errors import InvalidRequest
from protos.status import Failure, abort
from server.errors import ShuttingDown, TooManyStreams, Unauthenticated
from server.identity import Caller, Identities, answer_for
from server.metrics import FrontMetrics
from server.status import failure_of, is_expected

_OURS = "/rekindle.v1."
_request_id: ContextVar[str] = ContextVar("rekindle_request_id")

_log = structlog.get_logger(__name__)


def request_id() -> str:
    """The id of the call that is being answered: unique, and in each of its log lines."""
    return _request_id.get()


class Calls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the methods of rekindle.v1; health and reflection pass as they are."""

    def __init__(self, metrics: FrontMetrics, identities: Identities, *, max_streams: int) -> None:
        """More than `max_streams` streams at once are refused."""
        self._metrics = metrics
        self._identities = identities
        self._max_streams = max_streams
        self._streams = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not path.startswith(_OURS):
            return handler
        method = path.removeprefix(_OURS)
        try:
            caller = self._identities.identify(handler_call_details.invocation_metadata or ())
        except Unauthenticated as error:
            return self._refused(method, error)
        if handler.request_streaming:
            wrap, behaviour = grpc.stream_unary_rpc_method_handler, self._counted(handler.stream_unary)
            read: Callable[[Any], Any] = _each_parsed(handler.request_deserializer)
        elif handler.response_streaming:
            wrap, behaviour = grpc.unary_stream_rpc_method_handler, self._counted(handler.unary_stream)
            read = _parsed(handler.request_deserializer)
        else:
            wrap, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
            read = _parsed(handler.request_deserializer)
        return wrap(self._around(method, behaviour, caller, read), response_serializer=handler.response_serializer)

    async def drain(self, within_s: float) -> bool:
        """Refuse new calls and wait for the running ones. False if some still run after `within_s`."""
        self._closed = True
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _around(
        self,
        method: str,
        behaviour: Callable[[Any, Any], Awaitable[Any]],
        caller: Caller,
        read: Callable[[Any], Any],
    ) -> Any:
        """`read` makes the behaviour's request of what came."""

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            answer_for(caller)
            async with self.accounted(
                method, partial(abort, context), ends_s=deadline_of(context), tenant=caller.tenant, key=caller.key_id
            ):
                return await behaviour(read(request), context)

        return answer

    def _counted(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self.stream():
                return await behaviour(request, context)

        return answer

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Hold one of the streams that may be open at once. Raises TooManyStreams."""
        if self._streams >= self._max_streams:
            raise TooManyStreams(f"{self._streams} streams are open, {self._max_streams} may be")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def _refused(self, method: str, error: Unauthenticated) -> Any:
        """Answers without having received a message, be it one or many: 64 MiB of a stranger's are not read."""

        async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with self.accounted(method, partial(abort, context)):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

    @asynccontextmanager
    async def accounted(
        self, method: str, fail: Callable[[Failure], Awaitable[None]], *, ends_s: float | None = None, **bound: str
    ) -> AsyncGenerator[None, None]:
        """One call from its beginning to its end, by gRPC or HTTP. An error is said by `fail`. `ends_s` is its
        deadline, of `time.monotonic()`; `bound` goes into its log lines."""
        call_id = uuid.uuid4().hex
        _request_id.set(call_id)  # each call is a task with a context of its own
        structlog.contextvars.bind_contextvars(request=call_id, method=method, **bound)
        self._enter(method)
        code = "OK"
        try:
            if self._closed:
                raise ShuttingDown("this front end is shutting down")
            yield
        except asyncio.CancelledError:
            code = "CANCELLED" if ends_s is None or time.monotonic() < ends_s else "DEADLINE_EXCEEDED"
            raise
        except Exception as error:
            failed = failure_of(error, call_id)
            code = failed.code.name
            if is_expected(error):
                _log.info("call refused", code=code, error=str(error))
            else:
                _log.error("call failed", code=code, exc_info=error)
            await fail(failed)
        finally:
            self._leave(method, code)

    def _enter(self, method: str) -> None:
        self._running += 1
        self._idle.clear()
        self._metrics.call_began(method)

    def _leave(self, method: str, code: str) -> None:
        self._running -= 1
        if self._running == 0:
            self._idle.set()
        self._metrics.call_ended(method, code)


def _parsed(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message]:
    """Here, and not before: gRPC itself would call it INTERNAL, as if it were our bug."""

    def read(request: bytes) -> Message:
        try:
            return parse(request)
        except DecodeError as error:
            raise InvalidRequest("request", "is no message of this method's type") from error

    return read


def _each_parsed(parse: Callable[[bytes], Message]) -> Callable[[AsyncIterator[bytes]], AsyncIterator[Message]]:
    read_one = _parsed(parse)

    async def read(requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for request in requests:
            yield read_one(request)

    return read


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """The call's deadline, of `time.monotonic()`."""
    remaining_s: float | None = context.time_remaining()  # None without a deadline, whatever grpc-stubs say
    return None if remaining_s is None else time.monotonic() + remaining_s
