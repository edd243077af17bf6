"""A front end that answers by script, over real gRPC: it refuses, stalls and breaks when a test wants it to."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2  # type: ignore[import-untyped]

from protos import rekindle_pb2 as pb
from protos import rekindle_pb2_grpc as pb_grpc

Script = Callable[[Any, Any], AsyncIterator[pb.GenerateResponse]]


@dataclass
class ScriptedFrontEnd:
    """The n-th Generate runs the n-th turn; the n-th Sessions or Cache call first fails with the n-th error, if any."""

    turns: list[Script] = field(default_factory=list)
    errors: list[grpc.StatusCode | None] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    sessions: list[pb.Session] = field(default_factory=list)
    target: str = ""

    async def generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        script = self.turns[len([seen for seen in self.requests if isinstance(seen, pb.GenerateRequest)]) - 1]
        async for response in script(request, context):
            yield response

    async def check(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            await context.abort(error, "by script")


async def refuse(context: Any, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> None:
    """Abort with google.rpc details, as the front end does."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(code, message)


def delta(text: str, *token_ids: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text, token_ids=token_ids))


def finished(**values: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_EOS, **values))


@asynccontextmanager
async def serving(front_end: ScriptedFrontEnd) -> AsyncIterator[ScriptedFrontEnd]:
    """Serve the script on a free loopback port; its `target` says which."""

    class Inference(pb_grpc.InferenceServicer):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
            async for response in front_end.generate(request, context):
                yield response

    class Sessions(pb_grpc.SessionsServicer):
        async def CreateSession(self, request: Any, context: Any) -> pb.Session:
            await front_end.check(request, context)
            return pb.Session(session_id=request.session_id or "made-up")

        async def GetSession(self, request: Any, context: Any) -> pb.Session:
            await front_end.check(request, context)
            return pb.Session(session_id=request.session_id)

        async def ListSessions(self, request: Any, context: Any) -> pb.ListSessionsResponse:
            await front_end.check(request, context)
            start, size = int(request.page_token or 0), request.page_size or 50
            more = str(start + size) if start + size < len(front_end.sessions) else ""
            return pb.ListSessionsResponse(sessions=front_end.sessions[start : start + size], next_page_token=more)

    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(Inference(), server)  # type: ignore[no-untyped-call]
    pb_grpc.add_SessionsServicer_to_server(Sessions(), server)  # type: ignore[no-untyped-call]
    front_end.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield front_end
    finally:
        await server.stop(None)
