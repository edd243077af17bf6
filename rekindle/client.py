"""The asynchronous client: one method for each call of the API, replies as streams, errors as one tree.

Knows the public protos only. Answers are the messages of `protos.rekindle_pb2`.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from protos import rekindle_pb2 as pb
from protos.rekindle_pb2_grpc import CacheStub, InferenceStub, SessionsStub, TenantsStub
from protos.tls import Tls as Tls  # who opens a client finds it here
from protos.tls import open_channel
from rekindle.errors import Overloaded, RekindleError, Unavailable, from_rpc_error, make_error

_IDEMPOTENT = {
    "rekindle.v1.Sessions": ("GetSession", "ListSessions", "UpdateSession", "ParkSession", "WarmSession"),
    "rekindle.v1.Cache": ("GetCacheStats",),
}
_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, names in _IDEMPOTENT.items() for method in names
            ],
            "retryPolicy": _RETRY,
        }
    ]
}
_MAX_MESSAGE_BYTES = 64 << 20
"""A session's record with its tokens can be larger than gRPC's 4 MiB."""
_TURN_ATTEMPTS = 4
_FIRST_BACKOFF_S = 0.1

T = TypeVar("T")
_StartTurn = Callable[[pb.GenerateRequest, float], Awaitable[Any]]

Input = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text as it is, token ids, or chat messages: mappings with `role` and `content`."""


class Client:
    """A connection to a Rekindle server. Use it as `async with Client("host:port") as client:`.

    Every call may raise RekindleError and is bounded: by its own `timeout_s`, else by the client's (`turn_timeout_s`
    for Generate and for what moves KV between tiers, `timeout_s` for the rest).
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = 30.0,
        turn_timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """`api_key` is an API key or a JWT, sent with every call. Without `tls` all is plain text; `Tls()` believes
        public authorities, and its fields name PEM files. Raises OSError where one can't be read."""
        options = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ]
        self._channel = open_channel(target, tls, options)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._target = target
        self._timeout_s, self._turn_timeout_s, self._connect_timeout_s = timeout_s, turn_timeout_s, connect_timeout_s
        self._inference: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]  # generated code
        self._sessions: Any = SessionsStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache: Any = CacheStub(self._channel)  # type: ignore[no-untyped-call]
        self._tenants: Any = TenantsStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        await self._channel.close(None)

    def generate(
        self,
        input: Input,
        *,
        session_id: str = "",
        audit: bool = False,
        keep_begun: bool = False,
        idempotency_key: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> "Generation":
        """Start one turn. `sampling` are the fields of protos' Sampling (max_new_tokens, temperature, stop, ...).

        With `audit` a turn on restored KV is computed again and compared: the receipt says what came of it. With
        `keep_begun` a reply that no worker is left to go on with stays in the session as far as it came. A turn of a
        session is given an idempotency key where there is none. Raises TypeError or ValueError for an unknown or
        impossible field; all else comes with the iteration.
        """
        request = pb.GenerateRequest(
            session_id=session_id,
            sampling=pb.Sampling(**sampling),
            audit=audit,
            on_failure=pb.ON_FAILURE_COMMIT if keep_begun else pb.ON_FAILURE_DISCARD,
            idempotency_key=idempotency_key or (uuid.uuid4().hex if session_id else ""),
            **_input_field(input),
        )
        return Generation(self._start_turn, request, timeout_s or self._turn_timeout_s)

    async def create_session(
        self,
        session_id: str = "",
        *,
        ttl_s: int = 0,
        pinned: bool = False,
        codec: str = "",
        timeout_s: float | None = None,
    ) -> pb.Session:
        """Make a session; without an id the server makes one up. `ttl_s` 0 keeps it for ever. Raises AlreadyExists.

        `codec` is how its KV is kept below the device: raw, lossless, int8, k8v4, int4 or ladder; empty, the server's.
        """
        request = pb.CreateSessionRequest(session_id=session_id, ttl_s=ttl_s, pinned=pinned, codec=codec)
        return await self._call(self._sessions.CreateSession, request, timeout_s)

    async def get_session(
        self,
        session_id: str,
        *,
        with_token_ids: bool = False,
        with_text: bool = False,
        with_residency: bool = False,
        user_is_typing: bool = False,
        timeout_s: float | None = None,
    ) -> pb.Session:
        """Read a session; its tokens, its text and where its KV lies cost more and come if asked for.

        With `user_is_typing` the server begins to restore it ahead of its next turn, and answers without waiting.
        """
        request = pb.GetSessionRequest(
            session_id=session_id,
            with_token_ids=with_token_ids,
            with_text=with_text,
            with_residency=with_residency,
            user_is_typing=user_is_typing,
        )
        return await self._call(self._sessions.GetSession, request, timeout_s)

    async def list_sessions(self, *, page_size: int = 0, timeout_s: float | None = None) -> AsyncIterator[pb.Session]:
        """Yield all sessions, newest first, without turns; pages are fetched as they are needed."""
        page_token = ""
        while True:
            request = pb.ListSessionsRequest(page_size=page_size, page_token=page_token)
            page = await self._call(self._sessions.ListSessions, request, timeout_s)
            for session in page.sessions:
                yield session
            page_token = page.next_page_token
            if not page_token:
                return

    async def update_session(
        self, session_id: str, *, ttl_s: int | None = None, pinned: bool | None = None, timeout_s: float | None = None
    ) -> pb.Session:
        """Change how long a session is kept; None leaves a value as it is."""
        request = pb.UpdateSessionRequest(session_id=session_id, ttl_s=ttl_s, pinned=pinned)
        return await self._call(self._sessions.UpdateSession, request, timeout_s)

    async def fork_session(
        self, session_id: str, *, at_turn: int | None = None, new_session_id: str = "", timeout_s: float | None = None
    ) -> pb.Session:
        """Copy a session up to and with `at_turn` (None: all of it). The KV is shared, not copied."""
        request = pb.ForkSessionRequest(session_id=session_id, at_turn=at_turn, new_session_id=new_session_id)
        return await self._call(self._sessions.ForkSession, request, timeout_s)

    async def park_session(
        self, session_id: str, *, drop_host: bool = False, timeout_s: float | None = None
    ) -> pb.ParkSessionResponse:
        """Offload a session wholly to Redis, and come back when it is there."""
        request = pb.ParkSessionRequest(session_id=session_id, drop_host=drop_host)
        return await self._call(self._sessions.ParkSession, request, timeout_s or self._turn_timeout_s)

    async def warm_session(self, session_id: str, *, timeout_s: float | None = None) -> pb.WarmSessionResponse:
        """Restore a session onto a worker's device, ahead of its next turn."""
        request = pb.WarmSessionRequest(session_id=session_id)
        return await self._call(self._sessions.WarmSession, request, timeout_s or self._turn_timeout_s)

    async def delete_session(self, session_id: str, *, timeout_s: float | None = None) -> pb.DeleteSessionResponse:
        """Delete a session from every tier; the answer says how much that was."""
        request = pb.DeleteSessionRequest(session_id=session_id)
        return await self._call(self._sessions.DeleteSession, request, timeout_s or self._turn_timeout_s)

    async def stats(self, *, timeout_s: float | None = None) -> pb.CacheStats:
        """Read how the cache does: tokens by source, hit rates, and the tiers of each worker."""
        return await self._call(self._cache.GetCacheStats, pb.GetCacheStatsRequest(), timeout_s)

    async def erase_tenant(self, tenant: str = "", *, timeout_s: float | None = None) -> pb.EraseTenantResponse:
        """Delete all that a tenant has from every tier; without one, the caller's own. Raises Denied.

        Waits for turns in progress, but not for long. Raises Busy where the tenant goes on, or TimedOut: what is erased
        stays so, call again.
        """
        request = pb.EraseTenantRequest(tenant=tenant)
        return await self._call(self._tenants.EraseTenant, request, timeout_s or self._turn_timeout_s)

    async def _call(self, method: Callable[..., Awaitable[T]], request: Message, timeout_s: float | None) -> T:
        try:
            return await method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _start_turn(self, request: pb.GenerateRequest, timeout_s: float) -> Any:
        """Send a turn over a connection that stands; until it does, nothing is sent and waiting for it is safe."""
        try:
            async with asyncio.timeout(min(timeout_s, self._connect_timeout_s)):
                await self._channel.channel_ready()
        except TimeoutError:
            raise make_error(grpc.StatusCode.UNAVAILABLE, f"no connection to {self._target}") from None
        return self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata)


class Generation:
    """One turn as it is generated: iterate over its deltas. What has come so far is in `text` and `token_ids`.

    The turn starts with the first step of the iteration. `cancel()`, leaving `async with` early, and cancelling the
    task that iterates all stop it: the server then stores nothing of it.
    """

    def __init__(self, start: _StartTurn, request: pb.GenerateRequest, timeout_s: float) -> None:
        self._start, self._request, self._timeout_s = start, request, timeout_s
        self._deltas = self._run()
        self._call: Any = None
        self._cancelled = False
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        """One for each token, if asked for."""
        self.finished: pb.Finished | None = None
        """Why the reply ended and what it used; None until it has ended."""

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def receipt(self) -> pb.Receipt | None:
        """What the prompt cost, by source; None until the reply has ended."""
        return self.finished.receipt if self.finished is not None else None

    def __aiter__(self) -> AsyncIterator[pb.Delta]:
        return self._deltas

    async def read(self) -> str:
        """Wait for the end of the reply; return its text."""
        async for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Stop the turn. The iteration ends, without an error; `finished` stays None if the turn had not ended."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    async def _run(self) -> AsyncIterator[pb.Delta]:
        deadline_s = time.monotonic() + self._timeout_s
        for attempt in range(1, _TURN_ATTEMPTS + 1):
            if self._cancelled:
                return
            self._call = await self._start(self._request, deadline_s - time.monotonic())
            try:
                if self._cancelled:  # meanwhile
                    return
                async for delta in self._receive():
                    yield delta
                return
            except RekindleError as error:
                wait_s = self._retry_wait_s(error, attempt)
                if attempt == _TURN_ATTEMPTS or wait_s is None or time.monotonic() + wait_s >= deadline_s:
                    raise
            finally:
                self._call.cancel()  # does nothing to a call that has ended
            await asyncio.sleep(wait_s)

    async def _receive(self) -> AsyncIterator[pb.Delta]:
        """Yield the deltas of one call. Raises RekindleError; ends early if `cancel` was called."""
        try:
            async for response in self._call:
                if response.WhichOneof("event") == "finished":
                    self.finished = response.finished
                    continue
                delta = response.delta
                self._pieces.append(delta.text)
                self.token_ids.extend(delta.token_ids)
                self.logprobs.extend(delta.logprobs)
                yield delta
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            if not self._cancelled:
                raise

    def _retry_wait_s(self, error: RekindleError, attempt: int) -> float | None:
        """How long to wait before another try, in seconds; None where trying again would not help or not be safe."""
        if self.token_ids or self._pieces:
            return None
        if isinstance(error, Overloaded):
            return error.retry_after_s
        # A connection that broke says nothing of the turn: if the session has it already, its key finds it.
        if isinstance(error, Unavailable):
            backoff_s = _FIRST_BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            return backoff_s if error.retry_after_s is None else error.retry_after_s
        return None


def _input_field(input: Input) -> dict[str, Any]:
    """Put the input into the field of GenerateRequest that its kind belongs to."""
    if isinstance(input, str):
        return {"text": input}
    if input and isinstance(input[0], Mapping):
        messages = cast(Sequence[Mapping[str, str]], input)
        return {"chat": pb.ChatInput(messages=[pb.ChatMessage(**message) for message in messages])}
    return {"tokens": pb.TokenInput(token_ids=cast(Sequence[int], input))}
