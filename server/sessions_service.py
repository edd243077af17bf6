"""Sessions over gRPC: read the request, ask the keeper, write the reply. No policy lives here."""

from typing import Any

import grpc.aio

from cache_store.records import SessionRecord, check_session_id
from protos import rekindle_pb2 as pb
from protos.rekindle_pb2_grpc import SessionsServicer
from server.identity import caller
from server.sessions import SessionKeeper
from server.validation import (
    BANK_ACCESSES,
    CONTEXT_POLICY_OF,
    check_banks,
    check_codec,
    check_context_policy,
    check_page_size,
    check_ttl,
)

_Context = grpc.aio.ServicerContext[Any, Any]
_ACCESSES = {kept: access for access, kept in BANK_ACCESSES.items()}


class SessionsService(SessionsServicer):
    """Errors are raised; `Calls` says them on the wire. (Method names are the proto's.)"""

    def __init__(self, keeper: SessionKeeper) -> None:
        self._keeper = keeper

    async def CreateSession(self, request: pb.CreateSessionRequest, context: _Context) -> pb.Session:
        if request.session_id:
            check_session_id(request.session_id)
        record = await self._keeper.create(
            caller().tenant,
            request.session_id,
            ttl_s=check_ttl(request.ttl_s),
            pinned=request.pinned,
            codec=check_codec(request.codec),
            context_policy=check_context_policy(request.context_policy),
            banks=check_banks(request.banks),
        )
        return session_of(record)

    async def GetSession(self, request: pb.GetSessionRequest, context: _Context) -> pb.Session:
        record = await self._keeper.get(caller().tenant, check_session_id(request.session_id))
        if request.user_is_typing:
            self._keeper.prefetch(record)
        session = session_of(record)
        if request.with_token_ids:
            session.token_ids.extend(record.token_ids)
        if request.with_text:
            session.text = await self._keeper.text(record)
        if request.with_residency:
            session.residency.extend(await self._keeper.residency(record))
        return session

    async def ListSessions(self, request: pb.ListSessionsRequest, context: _Context) -> pb.ListSessionsResponse:
        page_size = check_page_size(request.page_size)
        page = await self._keeper.page(caller().tenant, page_size=page_size, page_token=request.page_token)
        sessions = [session_of(record) for record in page.records]
        return pb.ListSessionsResponse(sessions=sessions, next_page_token=page.next_token)

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: _Context) -> pb.Session:
        record = await self._keeper.update(
            caller().tenant,
            check_session_id(request.session_id),
            ttl_s=check_ttl(request.ttl_s) if request.HasField("ttl_s") else None,
            pinned=request.pinned if request.HasField("pinned") else None,
            banks=check_banks(request.banks.banks) if request.HasField("banks") else None,
        )
        return session_of(record)

    async def ForkSession(self, request: pb.ForkSessionRequest, context: _Context) -> pb.Session:
        session_id = check_session_id(request.session_id)
        if request.new_session_id:
            check_session_id(request.new_session_id, "new_session_id")
        at_turn = request.at_turn if request.HasField("at_turn") else None
        fork = await self._keeper.fork(caller().tenant, session_id, at_turn=at_turn, new_id=request.new_session_id)
        return session_of(fork)

    async def ParkSession(self, request: pb.ParkSessionRequest, context: _Context) -> pb.ParkSessionResponse:
        session_id = check_session_id(request.session_id)
        return await self._keeper.park(caller().tenant, session_id, drop_host=request.drop_host)

    async def WarmSession(self, request: pb.WarmSessionRequest, context: _Context) -> pb.WarmSessionResponse:
        return await self._keeper.warm(caller().tenant, check_session_id(request.session_id))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: _Context) -> pb.DeleteSessionResponse:
        return await self._keeper.delete(caller().tenant, check_session_id(request.session_id))


def session_of(record: SessionRecord) -> pb.Session:
    """The record without its tokens."""
    return pb.Session(
        session_id=record.session_id,
        model=record.model,
        num_tokens=record.num_tokens,
        turns=[
            pb.Turn(
                number=number,
                start=turn.start,
                reply_start=turn.reply_start,
                end=turn.end,
                reason=turn.finish_reason,  # type: ignore[arg-type]
                committed_ms=turn.committed_ms,
                idempotency_key=turn.idempotency_key,
            )
            for number, turn in enumerate(record.turns, start=1)
        ],
        created_ms=record.created_ms,
        last_used_ms=record.last_used_ms,
        ttl_s=record.ttl_s,
        pinned=record.pinned,
        codec=record.codec,
        version=record.version,
        parent_session_id=record.parent_session_id,
        parent_turn=record.parent_turn,
        context_policy=CONTEXT_POLICY_OF[record.context_policy],
        banks=[pb.BankAttachment(bank=bank, access=_ACCESSES[access]) for bank, access in record.banks],
    )
