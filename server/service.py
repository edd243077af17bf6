"""Inference over gRPC: read the request, run the turn, write what comes. No policy lives here."""

from contextlib import aclosing
from typing import Any

import grpc.aio

from cache_store.records import check_session_id
from protos import rekindle_pb2 as pb
from protos.rekindle_pb2_grpc import InferenceServicer
from server.calls import deadline_of, request_id
from server.identity import caller
from server.limits import Limits
from server.turns import Turns
from server.validation import check_generate


class InferenceService(InferenceServicer):
    """Errors are raised; `Calls` says them on the wire."""

    def __init__(self, turns: Turns, limits: Limits) -> None:
        self._turns = turns
        self._limits = limits

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        check_generate(request)
        if request.session_id:
            check_session_id(request.session_id)
        tenant = caller().tenant
        with self._limits.turn(tenant):
            if request.session_id:
                await self._limits.check_tokens(tenant)
            turn = self._turns.run(tenant, request, request_id=request_id(), deadline_s=deadline_of(context))
            # Written, not yielded: a client that hangs up then cancels this very coroutine, and the turn is closed at
            # once.
            async with aclosing(turn) as responses:
                async for response in responses:
                    await context.write(response)
