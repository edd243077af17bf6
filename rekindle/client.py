"""The asynchronous client: one method for each call of the API, replies as streams, errors as one tree.

Knows the public protos only. Answers are the messages of `protos.rekindle_pb2`.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from protos import rekindle_pb2 as pb
from protos.rekindle_pb2_grpc import CacheStub, InferenceStub, SessionsStub, TenantsStub
from protos.tls import Tls as Tls  # who opens a client finds it here
from protos.tls import open_channel
from rekindle.errors import from_rpc_error, make_error
from rekindle.generation import Generation as Generation
from rekindle.generation import Input as Input
from rekindle.generation import input_field
from rekindle.memory_client import MemoryClient

_IDEMPOTENT = {
    "rekindle.v1.Sessions": ("GetSession", "ListSessions", "UpdateSession", "ParkSession", "WarmSession"),
    "rekindle.v1.Cache": ("GetCacheStats",),
    "rekindle.v1.Memory": ("GetBank", "ListBanks", "Remember"),
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

T = TypeVar("T")


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
        self.memory = MemoryClient(self._channel, self._metadata, timeout_s=timeout_s, long_timeout_s=turn_timeout_s)
        """Banks of knowledge."""

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
    ) -> Generation:
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
            **input_field(input),
        )
        return Generation(self._start_turn, request, timeout_s or self._turn_timeout_s)

    async def create_session(
        self,
        session_id: str = "",
        *,
        ttl_s: int = 0,
        pinned: bool = False,
        codec: str = "",
        context_policy: str = "",
        banks: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> pb.Session:
        """Make a session; without an id the server makes one up. `ttl_s` 0 keeps it for ever. Raises AlreadyExists.

        `codec` is how its KV is kept below the device: raw, lossless, int8, k8v4, int4 or ladder; empty, the server's.
        `context_policy` says what becomes of it beyond the model's window: error (which is the default), window or
        recall. `banks` are attached: read, write or read_write by name. Raises NotFound for a bank that is not there,
        ValueError for another policy or access.
        """
        request = pb.CreateSessionRequest(
            session_id=session_id,
            ttl_s=ttl_s,
            pinned=pinned,
            codec=codec,
            context_policy=_enum_value(pb.ContextPolicy, "CONTEXT_POLICY_", context_policy or "unspecified"),
            banks=_attachments(banks or {}),
        )
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
        self,
        session_id: str,
        *,
        ttl_s: int | None = None,
        pinned: bool | None = None,
        banks: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> pb.Session:
        """Change how long a session is kept, or its banks, all of them; None leaves a value as it is."""
        attached = None if banks is None else pb.BankAttachments(banks=_attachments(banks))
        request = pb.UpdateSessionRequest(session_id=session_id, ttl_s=ttl_s, pinned=pinned, banks=attached)
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


def _attachments(banks: Mapping[str, str]) -> list[pb.BankAttachment]:
    return [
        pb.BankAttachment(bank=bank, access=_enum_value(pb.BankAccess, "BANK_ACCESS_", access))
        for bank, access in banks.items()
    ]


def _enum_value(enum: Any, prefix: str, name: str) -> Any:
    """Raises ValueError for a name that there is not."""
    return enum.Value(prefix + name.upper())
