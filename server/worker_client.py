"""A worker, reached over gRPC. Closing a stream tells the worker to stop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerStub
from protos.status import DETAILS_KEY
from protos.tls import Tls, open_channel
from server.errors import WorkerLost, WorkerRefused

_QUICK_S = 5.0
"""For calls that move no blocks."""

_MOVE_S = 120.0
"""For calls that may move a whole session between tiers."""


class WorkerClient:
    """Calls raise WorkerLost when the worker can't be reached (any more), WorkerRefused with what it answers else."""

    def __init__(self, address: str, *, max_message_bytes: int, tls: Tls | None = None) -> None:
        """Raises WorkerLost where what `tls` names can't be read."""
        self.address = address
        options = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),  # a worker that is back should be found at once
            ("grpc.use_local_subchannel_pool", 1),  # a new client never inherits another's broken connection
        )
        try:
            self._channel = open_channel(address, tls, options)
        except OSError as error:
            raise WorkerLost(f"worker at {address}: {error}") from error
        self._stub: Any = WorkerStub(self._channel)  # type: ignore[no-untyped-call]
        self._streams: set[Any] = set()
        """Of turns and embeddings that run."""

    async def generate(
        self, request: wpb.WorkerGenerateRequest, *, timeout_s: float | None
    ) -> AsyncGenerator[wpb.WorkerEvent, None]:
        """Started, deltas, Finished. `timeout_s` None waits for ever."""
        stream = self._stub.Generate(request, timeout=timeout_s)
        self._streams.add(stream)
        try:
            async for event in stream:
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        except asyncio.CancelledError:
            raise self._ended() from None
        finally:
            self._streams.discard(stream)
            stream.cancel()  # harmless when it has ended

    async def watch(self) -> AsyncGenerator[wpb.BlockEvents, None]:
        """A snapshot of the blocks that it holds, then events, until it is closed."""
        stream = self._stub.Watch(wpb.WatchRequest())
        try:
            async for event in stream:
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        except asyncio.CancelledError:
            raise self._ended() from None
        finally:
            stream.cancel()

    def abandon(self) -> None:
        """End all streams, each as WorkerLost: whoever they come from does not answer any more."""
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.cancel()

    async def park(self, request: wpb.ParkRequest) -> wpb.ParkReply:
        reply: wpb.ParkReply = await self._ask(self._stub.Park, request, _MOVE_S)
        return reply

    async def warm(self, request: wpb.WarmRequest) -> wpb.WarmReply:
        reply: wpb.WarmReply = await self._ask(self._stub.Warm, request, _MOVE_S)
        return reply

    async def flush(self, history: wpb.History, *, timeout_s: float) -> None:
        await self._ask(self._stub.Flush, wpb.FlushRequest(history=history), timeout_s)

    async def locate(self, history: wpb.History, *, with_redis: bool) -> wpb.LocateReply:
        request = wpb.LocateRequest(history=history, with_redis=with_redis)
        reply: wpb.LocateReply = await self._ask(self._stub.Locate, request, _QUICK_S)
        return reply

    async def drop(self, history: wpb.History, *, with_redis: bool) -> wpb.DropReply:
        request = wpb.DropRequest(history=history, with_redis=with_redis)
        reply: wpb.DropReply = await self._ask(self._stub.Drop, request, _MOVE_S)
        return reply

    async def erase(self, tenant: str, *, with_redis: bool) -> wpb.DropReply:
        request = wpb.EraseRequest(tenant=tenant, with_redis=with_redis)
        reply: wpb.DropReply = await self._ask(self._stub.Erase, request, _MOVE_S)
        return reply

    async def retain(self, history: wpb.History, *, block_ttl_s: int) -> int:
        """Return how many blocks Redis has of the history."""
        request = wpb.RetainRequest(history=history, block_ttl_s=block_ttl_s)
        reply: wpb.RetainReply = await self._ask(self._stub.Retain, request, _MOVE_S)
        return reply.blocks

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        reply: wpb.DetokenizeReply = await self._ask(
            self._stub.Detokenize, wpb.DetokenizeRequest(token_ids=token_ids), _QUICK_S
        )
        return reply.text

    async def quote(self, texts: Sequence[str]) -> Sequence[wpb.QuotedText]:
        reply: wpb.QuoteReply = await self._ask(self._stub.Quote, wpb.QuoteRequest(texts=texts), _QUICK_S)
        return reply.texts

    async def prefill(self, request: wpb.PrefillRequest, *, timeout_s: float) -> wpb.PrefillReply:
        reply: wpb.PrefillReply = await self._ask(self._stub.Prefill, request, timeout_s)
        return reply

    async def drop_prefilled(self, request: wpb.DropPrefilledRequest) -> wpb.DropReply:
        reply: wpb.DropReply = await self._ask(self._stub.DropPrefilled, request, _MOVE_S)
        return reply

    async def embed(self, request: wpb.EmbedRequest, *, timeout_s: float) -> wpb.EmbedReply:
        call = self._stub.Embed(request, timeout=timeout_s)
        self._streams.add(call)  # it takes long enough for the worker to be found frozen
        try:
            reply: wpb.EmbedReply = await call
            return reply
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        except asyncio.CancelledError:
            raise self._ended() from None
        finally:
            self._streams.discard(call)
            call.cancel()

    async def describe(self, *, timeout_s: float) -> wpb.DescribeReply:
        reply: wpb.DescribeReply = await self._ask(self._stub.Describe, wpb.DescribeRequest(), timeout_s)
        return reply

    async def stats(self) -> pb.WorkerCacheStats:
        reply: pb.WorkerCacheStats = await self._ask(self._stub.GetStats, wpb.GetStatsRequest(), _QUICK_S)
        return reply

    async def aclose(self) -> None:
        """What still runs ends as WorkerLost."""
        self.abandon()
        await self._channel.close(grace=None)

    async def _ask(self, method: Any, request: Message, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        except asyncio.CancelledError:
            raise self._ended() from None

    def _ended(self) -> asyncio.CancelledError | WorkerLost:
        """What a cancelled call means: its own task's end, or that of the connection, by `abandon` or `aclose`."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        return WorkerLost(f"worker at {self.address} was let go")

    def _ours(self, error: grpc.aio.AioRpcError) -> WorkerLost | WorkerRefused:
        trailing: Any = error.trailing_metadata() or ()  # pairs; grpc-stubs have it otherwise
        details = next((value for key, value in trailing if key == DETAILS_KEY), b"")
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if lost and not details:  # gRPC speaks, not the worker
            return WorkerLost(f"worker at {self.address}: {error.details()}")
        return WorkerRefused(error.code(), error.details() or "", bytes(details))
