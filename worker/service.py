"""The worker's gRPC service: text in and out around the engine, which knows only tokens. Knows no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

import grpc.aio
import structlog

from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from protos.status import abort
from protos.tls import PLAIN_TEXT, ServerTls, is_loopback, listen
from worker import translate
from worker.calls import ContextPolicy, Failed, Finished, GenerateCall, Receipt, Token
from worker.chat import ChatMessage
from worker.crossing import Crossing, EventStream
from worker.embedding_service import EmbeddingService
from worker.engine_like import EngineLike
from worker.errors import ContextTooLong, NoEmbedder
from worker.pieces import Encoded
from worker.prefilling import Prefilling
from worker.publisher import Publisher
from worker.reply import Detokenizing, Reply
from worker.status import failure_of, is_expected

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_MAX_MESSAGE_BYTES = 256 << 20
"""Histories travel whole. Only front ends call, and they have bounds of their own."""

_WINDOWS_AT_ONCE = 4

_log = structlog.get_logger(__name__)


class Codec(Protocol):
    """A worker.text.TextCodec."""

    @property
    def longest_token(self) -> int: ...
    def encode(self, text: str, *, is_first: bool) -> tuple[int, ...]: ...
    def encode_input(self, text: str, inserts: Sequence[str], *, is_first: bool) -> Encoded: ...
    def encode_chat(
        self, messages: Sequence[ChatMessage], history: Sequence[int], inserts: Sequence[str]
    ) -> Encoded: ...
    def quote(self, text: str) -> tuple[str, int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizing: ...


class WorkerService(WorkerServicer):
    """Lives on one event loop."""

    def __init__(
        self,
        engine: EngineLike,
        codec: Codec,
        *,
        worker_id: str,
        model: str,
        metrics_address: str = "",
        on_receipt: Callable[[Receipt, int], None] = lambda receipt, completion_tokens: None,
        embedding: EmbeddingService | None = None,
    ) -> None:
        """`on_receipt` is told of each finished turn, with the number of its tokens."""
        self._engine = engine
        self._codec = codec
        self._worker_id = worker_id
        self._model = model
        self._metrics_address = metrics_address
        self._on_receipt = on_receipt
        self._embedding = embedding
        self._crossing = Crossing()
        self._prefilling = Prefilling(engine, self._crossing)
        self._publisher = Publisher(engine)
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._numbers = count(1)
        self.accepting = True

    async def Generate(self, request: wpb.WorkerGenerateRequest, context: Context) -> None:
        async with self._statuses(context, request.request_id):
            encoded = await self._tokenize(request)
            call = translate.call_of(
                request,
                encoded,
                self._engine,
                call_id=f"{request.request_id}#{next(self._numbers)}",  # a retry may overtake what it replaces
                deadline_s=_deadline_s(context),
            )
            reply = await self._reply(request, call)
            stream = EventStream()
            self._engine.submit(call, self._crossing.into(stream))
            try:
                await context.write(translate.started_event(call))
                await self._relay(call, reply, stream, context)
            finally:
                self._engine.cancel(call.request_id)

    async def _reply(self, request: wpb.WorkerGenerateRequest, call: GenerateCall) -> Reply:
        """What of it was said elsewhere is detokenized on a thread: whose worker was lost come all at once."""

        def begin() -> Reply:
            return Reply(
                self._codec.detokenizer(call.input or call.history),
                translate.stops_of(request.sampling),
                begun=call.begun,
                num_sent=request.begun.text_characters,
            )

        return await self._in_thread(begin) if call.begun else begin()

    async def _relay(self, call: GenerateCall, reply: Reply, stream: EventStream, context: Context) -> None:
        """Send what the engine says until it says that it is done."""
        last_token_id = call.begun[-1] if call.begun else None
        is_finishing = False
        while True:
            events = await stream.take()
            ended = events.pop() if not isinstance(events[-1], Token) else None
            if isinstance(ended, Failed):
                raise ended.error
            text, tokens = reply.push([event for event in events if isinstance(event, Token)])
            if reply.stop_string is not None and not is_finishing:
                is_finishing = True
                self._engine.finish(call.request_id, reply.num_tokens)
            if ended is not None:
                text += reply.flush()
            if text or tokens:
                await context.write(translate.delta_event(text, tokens))
                last_token_id = tokens[-1].token_id if tokens else last_token_id
            if isinstance(ended, Finished):
                self._on_receipt(ended.receipt, reply.num_tokens)
                await context.write(
                    translate.finished_event(
                        call,
                        ended,
                        num_tokens=reply.num_tokens,
                        last_token_id=last_token_id,
                        stop_string=reply.stop_string,
                        worker_id=self._worker_id,
                    )
                )
                return

    async def _tokenize(self, request: wpb.WorkerGenerateRequest) -> Encoded:
        """The new input as tokens. Text waits for a thread: a long one takes a while."""
        history, inserts = request.history.token_ids, list(request.inserts)
        match request.WhichOneof("input"):
            case "text":
                self._check_length(len(request.text), request.history)
                return await self._in_thread(
                    lambda: self._codec.encode_input(request.text, inserts, is_first=not history)
                )
            case "chat":
                messages = [
                    ChatMessage(role=message.role, content=message.content) for message in request.chat.messages
                ]
                num_characters = sum(len(message["role"]) + len(message["content"]) for message in messages)
                self._check_length(num_characters, request.history)
                return await self._in_thread(lambda: self._codec.encode_chat(messages, history[-1:], inserts))
            case _:
                return Encoded(tuple(request.tokens.token_ids), tuple(request.tokens_inserted))

    def _check_length(self, num_characters: int, history: wpb.History | None = None) -> None:
        """Refuse what can't fit before it is tokenized: megabytes take minutes, and everybody's text waits in line.

        To a session that goes on beyond the window a few windows at once can be said.
        """
        window = self._engine.max_context_tokens
        if history is not None and translate.context_of(history).policy is not ContextPolicy.ERROR:
            window *= _WINDOWS_AT_ONCE
        if num_characters > window * self._codec.longest_token:
            raise ContextTooLong(f"{num_characters} characters are more than {window} tokens can hold")

    async def Park(self, request: wpb.ParkRequest, context: Context) -> wpb.ParkReply:
        park = partial(self._engine.park, drop_host=request.drop_host, ttl_s=request.block_ttl_s)
        report = await self._ask(context, request, park)
        return wpb.ParkReply(
            redis_tokens=report.redis_tokens,
            device_blocks_dropped=report.device_blocks_dropped,
            host_blocks_dropped=report.host_blocks_dropped,
            bytes_stored=report.bytes_stored,
        )

    async def Warm(self, request: wpb.WarmRequest, context: Context) -> wpb.WarmReply:
        report = await self._ask(context, request, self._engine.warm)
        return wpb.WarmReply(device_tokens=report.device_tokens, restored_tokens=report.restored_tokens)

    async def Flush(self, request: wpb.FlushRequest, context: Context) -> wpb.FlushReply:
        await self._ask(context, request, self._engine.flush)
        return wpb.FlushReply()

    async def Locate(self, request: wpb.LocateRequest, context: Context) -> wpb.LocateReply:
        found = await self._ask(context, request, partial(self._engine.locate, with_redis=request.with_redis))
        return wpb.LocateReply(
            device_tokens=found.device_tokens,
            host_tokens=found.host_tokens,
            disk_tokens=found.disk_tokens,
            redis_tokens=found.redis_tokens,
        )

    async def Drop(self, request: wpb.DropRequest, context: Context) -> wpb.DropReply:
        report = await self._ask(context, request, partial(self._engine.drop, with_redis=request.with_redis))
        return translate.drop_message(report)

    async def Erase(self, request: wpb.EraseRequest, context: Context) -> wpb.DropReply:
        async with self._statuses(context, "Erase"):
            answer = self._engine.erase(request.tenant, with_redis=request.with_redis)
            return translate.drop_message(await asyncio.shield(asyncio.wrap_future(answer)))

    async def Retain(self, request: wpb.RetainRequest, context: Context) -> wpb.RetainReply:
        blocks = await self._ask(context, request, partial(self._engine.retain, ttl_s=request.block_ttl_s))
        return wpb.RetainReply(blocks=blocks)

    async def Detokenize(self, request: wpb.DetokenizeRequest, context: Context) -> wpb.DetokenizeReply:
        async with self._statuses(context, "Detokenize"):
            translate.check_tokens("token_ids", request.token_ids, self._engine.vocab_size)
            text = await self._in_thread(lambda: self._codec.decode(request.token_ids))
        return wpb.DetokenizeReply(text=text)

    async def Quote(self, request: wpb.QuoteRequest, context: Context) -> wpb.QuoteReply:
        async with self._statuses(context, "Quote"):
            most = self._engine.max_context_tokens * self._codec.longest_token
            texts = [text if len(text) <= most else "" for text in request.texts]
            quoted = [await self._in_thread(partial(self._codec.quote, text)) for text in texts]  # others' come between
        return wpb.QuoteReply(texts=[wpb.QuotedText(text=text, tokens=tokens) for text, tokens in quoted])

    async def Prefill(self, request: wpb.PrefillRequest, context: Context) -> wpb.PrefillReply:
        async with self._statuses(context, "Prefill"):
            history = wpb.History(tenant=request.tenant, codec=request.codec)
            how = {
                "codec": translate.codec_of(history),
                "ttl_s": request.block_ttl_s,
                "deadline_s": _deadline_s(context),
            }
            # One at a time: whoever talks comes between.
            kept = [await self._prefill(request.tenant, text, **how) for text in request.texts]
        return wpb.PrefillReply(tokens=kept)

    async def _prefill(self, tenant: str, text: str, **how: Any) -> int:
        """How many tokens it has, if its KV is kept; what fits no window is read by no turn."""
        try:
            self._check_length(len(text))
            token_ids = await self._in_thread(partial(self._quoted_tokens, text))
            is_kept = await self._prefilling.prefill(tenant, token_ids, **how)
        except ContextTooLong:
            return 0
        return len(token_ids) if is_kept else 0

    async def DropPrefilled(self, request: wpb.DropPrefilledRequest, context: Context) -> wpb.DropReply:
        dropped = wpb.DropReply()
        async with self._statuses(context, "DropPrefilled"):
            for text in request.texts:
                token_ids = await self._in_thread(partial(self._quoted_tokens, text))
                for report in await self._prefilling.drop(request.tenant, token_ids, with_redis=request.with_redis):
                    translate.add_drop(dropped, report)
        return dropped

    def _quoted_tokens(self, text: str) -> tuple[int, ...]:
        """Of a text as turns read it."""
        quoted, _ = self._codec.quote(text)
        return self._codec.encode(quoted, is_first=False)

    async def Embed(self, request: wpb.EmbedRequest, context: Context) -> wpb.EmbedReply:
        async with self._statuses(context, "Embed"):
            if self._embedding is None:
                raise NoEmbedder("this worker has no embedding model (its setting embedder is none)")
            return await self._embedding.embed(request)

    async def Watch(self, request: wpb.WatchRequest, context: Context) -> None:
        async with self._statuses(context, "Watch"), aclosing(self._publisher.watch()) as events:
            async for event in events:
                await context.write(event)

    async def Describe(self, request: wpb.DescribeRequest, context: Context) -> wpb.DescribeReply:
        return wpb.DescribeReply(
            worker_id=self._worker_id,
            model=self._model,
            fingerprint=self._engine.fingerprint.hex(),
            max_context_tokens=self._engine.max_context_tokens,
            block_tokens=self._engine.layout.block_tokens,
            accepting=self.accepting and not self._engine.broken.done(),
            metrics_address=self._metrics_address,
            block_bytes=self._engine.layout.block_bytes,
            names_from=self._engine.names_from,
            embedder=self._embedding.name if self._embedding else "",
            embedding_dim=self._embedding.dim if self._embedding else 0,
        )

    async def GetStats(self, request: wpb.GetStatsRequest, context: Context) -> pb.WorkerCacheStats:
        return translate.stats_message(
            self._engine.stats(),
            worker_id=self._worker_id,
            model=self._model,
            block_tokens=self._engine.layout.block_tokens,
        )

    def close(self) -> None:
        self._text_thread.shutdown()
        if self._embedding is not None:
            self._embedding.close()

    async def _ask(self, context: Context, request: Any, question: Callable[..., Future[T]]) -> T:
        """Ask the engine about the request's history."""
        async with self._statuses(context, type(request).__name__):
            history = request.history
            how = {"codec": translate.codec_of(history), "context": translate.context_of(history)}
            answer = question(history.tenant, tuple(history.token_ids), **how)
            # Shielded: a client that goes away must not cancel what the engine is about to answer.
            return await asyncio.shield(asyncio.wrap_future(answer))

    def _in_thread(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._text_thread, work)

    @asynccontextmanager
    async def _statuses(self, context: Context, request_id: str) -> AsyncIterator[None]:
        """End the call with the status of what is raised within. The log has what the client is not told."""
        try:
            yield
        except Exception as error:
            if not is_expected(error):
                _log.exception("request failed", request=request_id, worker=self._worker_id)
            await abort(context, failure_of(error, request_id))


def _deadline_s(context: Any) -> float | None:
    """When the client gives up, of `time.monotonic()`; None for never."""
    remaining_s: float | None = context.time_remaining()  # grpc-stubs don't know of None
    return None if remaining_s is None else time.monotonic() + remaining_s


async def start_server(
    service: WorkerService, host: str, port: int = 0, tls: ServerTls = PLAIN_TEXT
) -> tuple[grpc.aio.Server, str]:
    """Serve on `host`, on a free port if none is given; return the server and its host:port. Raises OSError."""
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error, not half of the calls lost
        )
    )
    add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    bound = listen(server, host, port, tls, setting="worker_tls_cert")
    if not (tls.client_ca or is_loopback(host)):
        _log.warning("anybody may call, for any tenant", address=host, setting="worker_tls_client_ca")
    await server.start()
    return server, f"{host}:{bound}"
