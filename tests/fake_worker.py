"""Workers without a model, over real gRPC: replies follow from the prompt by arithmetic, and a test can break them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from protos import rekindle_pb2 as pb
from protos import rekindle_pb2_grpc as pb_grpc
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from protos.status import DETAILS_KEY, abort
from protos.tls import PLAIN_TEXT, ServerTls, listen
from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses
from tests.fake_embedding import DIM, EMBEDDER, embedded
from worker.status import failure_of

VOCABULARY = 1000
Tokens = tuple[int, ...]


def reply_to(prompt: Sequence[int], count: int) -> list[int]:
    """The n-th token follows from the whole prompt: a history that was changed or lost shows in the reply."""
    return [(sum((place + 1) * token for place, token in enumerate(prompt)) + n) % VOCABULARY for n in range(count)]


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def detokenize(token_ids: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in token_ids)


class FakeWorker(WorkerServicer):
    """Holds whole histories in `device`, `host` and the shared `redis`: a prompt has of each its longest prefix."""

    def __init__(self, worker_id: str, redis: set[Tokens] | None = None) -> None:
        self.worker_id = worker_id
        self.device: set[Tokens] = set()
        self.host: set[Tokens] = set()
        self.redis: set[Tokens] = redis if redis is not None else set()
        self.left_over = wpb.DropReply()
        """What the next erase finds."""
        self.accepting = True
        self.waiting = 0
        self.embedder = EMBEDDER
        """Empty: it has none."""
        self.embedded: list[wpb.EmbedRequest] = []
        self.fingerprint = "f00d"
        self.refuse_with: Exception | None = None
        """Raised by every call that works on KV."""
        self.pause_s = 0.0
        """Before each delta."""
        self.hold_flush_s = 0.0
        self.may_warm = asyncio.Event()
        self.may_warm.set()
        self.may_embed = asyncio.Event()
        self.may_embed.set()
        self.stop_after: int | None = None
        """End the stream, as a worker with a bug would, after this many deltas."""
        self.fail_after: int | None = None
        """End the stream with `failure` after this many deltas."""
        self.failure: Exception = RuntimeError("CUDA error: misaligned address")
        self.miscount = 0
        self.says = ""
        """To who asks without a session, instead of what follows by arithmetic."""
        self.may_say = asyncio.Event()
        self.may_say.set()
        self.prefilled: list[str] = []
        """Texts, as they are asked for."""
        self.may_prefill = asyncio.Event()
        self.may_prefill.set()
        self.generated: list[wpb.WorkerGenerateRequest] = []
        self.calls: list[str] = []
        self.codecs: list[str] = []
        """That came with each call about a history."""
        self.retained: list[int] = []
        self.cancelled = 0
        self.deltas_sent = 0
        self.address = ""
        self.tls = PLAIN_TEXT
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Listen, on the old port if there was one."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_WorkerServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        port = listen(self._server, "127.0.0.1", int(self.address.rpartition(":")[2] or 0), self.tls, setting="tls")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self.address

    async def kill(self) -> None:
        """Go away in the middle of whatever runs, with all that is in memory."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None
        self.device.clear()
        self.host.clear()

    async def Generate(self, request: wpb.WorkerGenerateRequest, context: Any) -> AsyncIterator[wpb.WorkerEvent]:
        self.generated.append(request)
        await self._asked("generate", request.history, context)
        new = _input_ids(request)
        if self.says and not request.session_id:
            for event in await self._told(new):
                yield event
            return
        prompt = (*request.history.token_ids, *new)
        receipt = self._receipt(prompt, len(new))
        count = request.sampling.max_new_tokens if request.sampling.HasField("max_new_tokens") else 8
        reply = reply_to(prompt, count)
        begun = list(request.begun.token_ids)
        assert reply[: len(begun)] == begun, "asked to go on with what nobody has said"
        unsent = detokenize(begun)[request.begun.text_characters :]
        try:
            yield wpb.WorkerEvent(started=wpb.Started(input_token_ids=new))
            if unsent:
                yield wpb.WorkerEvent(delta=pb.Delta(text=unsent))
            for number, token in enumerate(reply[len(begun) :]):
                if self.stop_after is not None and number >= self.stop_after:
                    return
                if self.fail_after is not None and number >= self.fail_after:
                    await abort(context, failure_of(self.failure, "fake"))
                await asyncio.sleep(self.pause_s)
                yield wpb.WorkerEvent(delta=pb.Delta(text=f"<{token}>", token_ids=[token]))
                self.deltas_sent += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        self.device.add((*prompt, *reply))
        usage = pb.Usage(prompt_tokens=len(prompt), completion_tokens=count + self.miscount, input_tokens=len(new))
        yield wpb.WorkerEvent(
            finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage, receipt=receipt, seed=7)
        )

    async def _told(self, new: Sequence[int]) -> list[wpb.WorkerEvent]:
        await self.may_say.wait()
        tokens = tokenize(self.says)
        usage = pb.Usage(prompt_tokens=len(new), completion_tokens=len(tokens), input_tokens=len(new))
        return [
            wpb.WorkerEvent(started=wpb.Started(input_token_ids=new)),
            wpb.WorkerEvent(delta=pb.Delta(text=self.says, token_ids=tokens)),
            wpb.WorkerEvent(finished=pb.Finished(reason=pb.FINISH_REASON_EOS, usage=usage)),
        ]

    async def Park(self, request: wpb.ParkRequest, context: Any) -> wpb.ParkReply:
        await self._asked("park", request.history, context)
        history = tuple(request.history.token_ids)
        dropped = int(history in self.device)
        self.device.discard(history)
        self.redis.add(history)
        host = int(request.drop_host and history in self.host)
        if host:
            self.host.discard(history)
        return wpb.ParkReply(
            redis_tokens=len(history),
            device_blocks_dropped=dropped,
            host_blocks_dropped=host,
            bytes_stored=len(history),
        )

    async def Warm(self, request: wpb.WarmRequest, context: Any) -> wpb.WarmReply:
        await self._asked("warm", request.history, context)
        await self.may_warm.wait()
        history = tuple(request.history.token_ids)
        restored = len(history) - _held(self.device, history)
        self.device.add(history)
        return wpb.WarmReply(device_tokens=len(history), restored_tokens=restored)

    async def Flush(self, request: wpb.FlushRequest, context: Any) -> wpb.FlushReply:
        await self._asked("flush", request.history, context)
        await asyncio.sleep(self.hold_flush_s)
        self.redis.add(tuple(request.history.token_ids))
        return wpb.FlushReply()

    async def Locate(self, request: wpb.LocateRequest, context: Any) -> wpb.LocateReply:
        await self._asked("locate+redis" if request.with_redis else "locate", request.history, context)
        history = tuple(request.history.token_ids)
        return wpb.LocateReply(
            device_tokens=_held(self.device, history),
            host_tokens=_held(self.host, history),
            redis_tokens=_held(self.redis, history) if request.with_redis else 0,
        )

    async def Drop(self, request: wpb.DropRequest, context: Any) -> wpb.DropReply:
        await self._asked("drop+redis" if request.with_redis else "drop", request.history, context)
        history = tuple(request.history.token_ids)
        tiers = [self.device, self.host, *([self.redis] if request.with_redis else [])]
        counts = [int(history in tier) for tier in tiers]
        for tier in tiers:
            tier.discard(history)
        return wpb.DropReply(device_blocks=counts[0], host_blocks=counts[1], redis_blocks=sum(counts[2:]))

    async def Erase(self, request: wpb.EraseRequest, context: Any) -> wpb.DropReply:
        await self._maybe_refuse("erase+redis" if request.with_redis else "erase", context)
        left, self.left_over = self.left_over, wpb.DropReply()
        return left

    async def Retain(self, request: wpb.RetainRequest, context: Any) -> wpb.RetainReply:
        await self._asked("retain", request.history, context)
        self.retained.append(request.block_ttl_s)
        return wpb.RetainReply(blocks=1)

    async def Detokenize(self, request: wpb.DetokenizeRequest, context: Any) -> wpb.DetokenizeReply:
        return wpb.DetokenizeReply(text=detokenize(request.token_ids))

    async def Quote(self, request: wpb.QuoteRequest, context: Any) -> wpb.QuoteReply:
        await self._maybe_refuse("quote", context)
        texts = [text.replace("<|", "< |") for text in request.texts]
        return wpb.QuoteReply(texts=[wpb.QuotedText(text=text, tokens=len(tokenize(text))) for text in texts])

    async def Prefill(self, request: wpb.PrefillRequest, context: Any) -> wpb.PrefillReply:
        await self._maybe_refuse("prefill", context)
        self.prefilled += request.texts
        await self.may_prefill.wait()
        return wpb.PrefillReply(tokens=[len(tokenize(text)) for text in request.texts])

    async def DropPrefilled(self, request: wpb.DropPrefilledRequest, context: Any) -> wpb.DropReply:
        await self._maybe_refuse("drop prefilled+redis" if request.with_redis else "drop prefilled", context)
        return wpb.DropReply()

    async def Describe(self, request: wpb.DescribeRequest, context: Any) -> wpb.DescribeReply:
        return wpb.DescribeReply(
            worker_id=self.worker_id,
            model="fake",
            fingerprint=self.fingerprint,
            max_context_tokens=4096,
            block_tokens=16,
            accepting=self.accepting,
            embedder=self.embedder,
            embedding_dim=DIM if self.embedder else 0,
        )

    async def Embed(self, request: wpb.EmbedRequest, context: Any) -> wpb.EmbedReply:
        self.embedded.append(request)
        await self._maybe_refuse("embed", context)
        if not self.embedder:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no embedding model")
        try:
            await self.may_embed.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return wpb.EmbedReply(embedder=self.embedder, texts=[embedded(text, request) for text in request.texts])

    async def GetStats(self, request: wpb.GetStatsRequest, context: Any) -> pb.WorkerCacheStats:
        await self._maybe_refuse("stats", context)
        return pb.WorkerCacheStats(
            worker_id=self.worker_id,
            prompt_tokens=pb.TokensBySource(device=10, host=20, redis=30, computed=40),
            device=pb.TierStats(blocks=len(self.device)),
            waiting=self.waiting,
        )

    async def _asked(self, call: str, history: wpb.History, context: Any) -> None:
        self.codecs.append(history.codec)
        await self._maybe_refuse(call, context)

    async def _maybe_refuse(self, call: str, context: Any) -> None:
        self.calls.append(call)
        if self.refuse_with is not None:
            await abort(context, failure_of(self.refuse_with, "fake"))

    def _receipt(self, prompt: Tokens, num_new: int) -> pb.Receipt:
        device = _held(self.device, prompt)
        host = max(0, _held(self.host, prompt) - device)
        redis = max(0, _held(self.redis, prompt) - device - host)
        computed = len(prompt) - device - host - redis
        misses = [pb.Miss(reason=pb.MISS_REASON_NEW, tokens=num_new)]
        if computed > num_new:
            misses.append(pb.Miss(reason=pb.MISS_REASON_ABSENT, tokens=computed - num_new))
        return pb.Receipt(
            device_tokens=device,
            host_tokens=host,
            redis_tokens=redis,
            computed_tokens=computed,
            misses=misses,
            worker_id=self.worker_id,
        )


def _input_ids(request: wpb.WorkerGenerateRequest) -> list[int]:
    given = request.WhichOneof("input")
    if given == "tokens":
        return list(request.tokens.token_ids)
    if given == "text":
        return tokenize(request.text)
    return tokenize("".join(f"[{message.role}]{message.content}" for message in request.chat.messages))


def _held(tier: set[Tokens], prompt: Tokens) -> int:
    """Length of the longest held history that the prompt begins with."""
    return max((len(held) for held in tier if prompt[: len(held)] == held), default=0)


class FrontEnd:
    """A running front end over fake workers, and stubs to call it with."""

    def __init__(self, app: Application, workers: Mapping[str, FakeWorker], channel: grpc.aio.Channel) -> None:
        self.app = app
        self.workers = workers
        self.channel = channel
        self.inference: Any = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.sessions: Any = pb_grpc.SessionsStub(channel)  # type: ignore[no-untyped-call]
        self.cache: Any = pb_grpc.CacheStub(channel)  # type: ignore[no-untyped-call]

    async def turn(self, text: str = "hi", session_id: str = "", **sampling: Any) -> "Reply":
        """Run a turn to its end. Raises AioRpcError."""
        request = pb.GenerateRequest(session_id=session_id, text=text, sampling=pb.Sampling(**sampling))
        return Reply([response async for response in self.inference.Generate(request, timeout=20)])

    async def new_session(self, session_id: str = "s", **settings: Any) -> pb.Session:
        session: pb.Session = await self.sessions.CreateSession(
            pb.CreateSessionRequest(session_id=session_id, **settings)
        )
        return session

    async def session(self, session_id: str = "s", **wanted: bool) -> pb.Session:
        session: pb.Session = await self.sessions.GetSession(pb.GetSessionRequest(session_id=session_id, **wanted))
        return session

    async def kill(self, worker_id: str) -> None:
        await self.workers[worker_id].kill()


class Reply:
    def __init__(self, responses: Sequence[pb.GenerateResponse]) -> None:
        *deltas, last = responses
        assert all(response.WhichOneof("event") == "delta" for response in deltas)
        assert last.WhichOneof("event") == "finished"
        self.finished = last.finished
        self.text = "".join(response.delta.text for response in deltas)
        self.token_ids = [token for response in deltas for token in response.delta.token_ids]


@asynccontextmanager
async def front_end(
    num_workers: int = 2, *, workers_tls: ServerTls = PLAIN_TEXT, **settings: Any
) -> AsyncIterator[FrontEnd]:
    """A front end on free ports; sessions in memory unless `redis_url` says otherwise."""
    redis: set[Tokens] = set()
    workers = {str(number): FakeWorker(str(number), redis) for number in range(num_workers)}
    defaults = ServerConfig(port=0, metrics_port=0, redis_url="memory://", worker_poll_s=0.1, drain_s=5.0)
    async with AsyncExitStack() as stack:
        for worker in workers.values():
            worker.tls = workers_tls
            await worker.start()
            stack.push_async_callback(worker.kill)
        addresses = StaticAddresses({worker_id: worker.address for worker_id, worker in workers.items()})
        app = Application.build(replace(defaults, **settings), addresses)
        stack.push_async_callback(app.aclose)
        await app.start()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(app.address))
        yield FrontEnd(app, workers, channel)


def details_of(error: grpc.aio.AioRpcError) -> Iterator[Any]:
    """The google.rpc details of an error, unpacked."""
    trailing: Any = error.trailing_metadata()
    for key, value in trailing:
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                kind = getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[1])
                detail = kind()
                packed.Unpack(detail)
                yield detail


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that a BadRequest names."""
    (bad,) = (detail for detail in details_of(error) if isinstance(detail, error_details_pb2.BadRequest))
    return str(bad.field_violations[0].field)
