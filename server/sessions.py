"""What can be done to a session between its turns. Knows records and their locks; neither gRPC's calls nor workers, of
which `session_blocks` asks."""

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import structlog

from cache_store.attachments import BankAttachment
from cache_store.banks import BankRecord
from cache_store.errors import InvalidRequest, RecordUnreadable, ServingError
from cache_store.records import Page, RecordStore, SessionRecord
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.lease import Leases
from server.limits import Limits
from server.metrics import FrontMetrics
from server.prefetch import Prefetcher
from server.session_blocks import SessionBlocks

_log = structlog.get_logger(__name__)


class KnownBanks(Protocol):
    """Part of a BankKeeper."""

    async def get(self, tenant: str, name: str) -> BankRecord:
        """Raises BankNotFound."""
        ...


class SessionKeeper:
    """All calls raise SessionNotFound and StoreUnavailable; those that lock also SessionBusy."""

    def __init__(
        self,
        records: RecordStore,
        leases: Leases,
        blocks: SessionBlocks,
        metrics: FrontMetrics,
        limits: Limits,
        banks: KnownBanks,
        *,
        default_ttl_s: int,
        default_codec: str,
    ) -> None:
        self._records = records
        self._leases = leases
        self._blocks = blocks
        self._limits = limits
        self._banks = banks
        self._prefetcher = Prefetcher(self._restore, metrics)
        self._default_ttl_s = default_ttl_s
        self._default_codec = default_codec

    async def create(
        self,
        tenant: str,
        session_id: str,
        *,
        ttl_s: int,
        pinned: bool,
        codec: str,
        context_policy: str,
        banks: tuple[BankAttachment, ...],
    ) -> SessionRecord:
        """An empty id is made up; an empty codec is the default. Raises SessionExists, BankNotFound, LimitReached."""
        await self._check_banks(tenant, banks)
        now_ms = int(time.time() * 1000)
        record = SessionRecord(
            tenant=tenant,
            session_id=session_id or _new_id(),
            version=0,
            model="",
            created_ms=now_ms,
            last_used_ms=now_ms,
            ttl_s=ttl_s or self._default_ttl_s,
            pinned=pinned,
            worker_id="",
            codec=codec or self._default_codec,
            context_policy=context_policy,
            banks=banks,
        )
        await self._limits.create(record)
        return record

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        return await self._records.get(tenant, session_id)

    def prefetch(self, record: SessionRecord) -> None:
        """Begin to restore a session behind its reader. It is not locked: its turn may come at any moment."""
        self._prefetcher.start(record)

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> Page:
        return await self._records.list(tenant, page_size=page_size, page_token=page_token)

    async def text(self, record: SessionRecord) -> str:
        """The history, detokenized. Raises NoWorker."""
        return await self._blocks.text(record)

    async def residency(self, record: SessionRecord) -> list[pb.Residency]:
        """Where the KV is: tiers that hold nothing are left out."""
        return await self._blocks.residency(record)

    async def update(
        self,
        tenant: str,
        session_id: str,
        *,
        ttl_s: int | None,
        pinned: bool | None,
        banks: tuple[BankAttachment, ...] | None,
    ) -> SessionRecord:
        """The record changes first; its blocks follow as well as they can. Raises BankNotFound, and SessionBusy for
        banks in the midst of a turn."""
        await self._check_banks(tenant, banks or ())
        record = await self._records.update(tenant, session_id, ttl_s=ttl_s, pinned=pinned, banks=banks)
        if record.token_ids and (ttl_s, pinned) != (None, None):
            try:
                await self._blocks.retain(record)
            except ServingError as error:  # each turn sets the blocks' time again
                _log.warning("blocks keep their old time to live", session=session_id, error=str(error))
        return record

    async def fork(self, tenant: str, session_id: str, *, at_turn: int | None, new_id: str) -> SessionRecord:
        """Copy the record up to a turn; the KV is found by content, so it is shared.

        Raises SessionExists and LimitReached.
        """
        parent = await self._records.get(tenant, session_id)
        num_turns = len(parent.turns) if at_turn is None else at_turn
        if num_turns > len(parent.turns):
            raise InvalidRequest("at_turn", f"must be at most {len(parent.turns)}, got {num_turns}")
        now_ms = int(time.time() * 1000)
        num_tokens = parent.turns[num_turns - 1].end if num_turns else 0
        fork = SessionRecord(
            tenant=tenant,
            session_id=new_id or _new_id(),
            version=num_turns,
            model=parent.model if num_turns else "",
            created_ms=now_ms,
            last_used_ms=now_ms,
            ttl_s=parent.ttl_s,
            pinned=False,  # asked for one by one: a pin costs memory for ever
            worker_id=parent.worker_id if num_turns else "",
            codec=parent.codec,  # or it would share no block with its parent
            context_policy=parent.context_policy,
            banks=parent.banks,
            parent_session_id=session_id,
            parent_turn=num_turns,
            turns=tuple(replace(turn, idempotency_key="", memories=()) for turn in parent.turns[:num_turns]),
            token_ids=parent.token_ids[:num_tokens],
            num_tokens=num_tokens,
        )
        await self._limits.create(fork)
        return fork

    async def park(self, tenant: str, session_id: str, *, drop_host: bool) -> pb.ParkSessionResponse:
        """Offload wholly from every worker that holds some. Raises NoWorker, and what the worker raises."""
        async with self._leases.hold(tenant, session_id) as lease, self._prefetcher.held_off(tenant, session_id):
            if not lease.record.token_ids:
                return pb.ParkSessionResponse()
            return await self._blocks.park(lease.record, drop_host=drop_host)

    async def warm(self, tenant: str, session_id: str) -> pb.WarmSessionResponse:
        """Restore onto the worker that the next turn would go to. Raises NoWorker."""
        async with self._leases.hold(tenant, session_id) as lease:
            worker, warmed = await self._blocks.warm(lease.record)
        return pb.WarmSessionResponse(
            worker_id=worker.worker_id, device_tokens=warmed.device_tokens, restored_tokens=warmed.restored_tokens
        )

    async def delete(self, tenant: str, session_id: str) -> pb.DeleteSessionResponse:
        """Blocks first, then the record: what was begun can be repeated. Raises NoWorker where blocks might stay.

        Of a record that can't be read nobody knows the blocks: they stay until their time is over.
        """
        try:
            async with self._leases.hold(tenant, session_id) as lease, self._prefetcher.held_off(tenant, session_id):
                dropped = await self._blocks.drop(lease.record) if lease.record.token_ids else []
                was = await lease.delete()
        except RecordUnreadable:
            with suppress(RecordUnreadable):
                await self._records.delete(tenant, session_id)
            return pb.DeleteSessionResponse()
        return pb.DeleteSessionResponse(
            tokens=was.num_tokens,
            device_blocks=sum(reply.device_blocks for reply in dropped),
            host_blocks=sum(reply.host_blocks for reply in dropped),
            disk_blocks=sum(reply.disk_blocks for reply in dropped),
            redis_blocks=sum(reply.redis_blocks for reply in dropped),
        )

    async def erase_blocks(self, tenant: str) -> list[wpb.DropReply]:
        """Drop all that workers and Redis have of a tenant, whatever session it was of. Raises NoWorker, and what
        workers raise: then some may be left."""
        return await self._blocks.erase(tenant)

    async def aclose(self) -> None:
        """Stop what was begun behind the callers."""
        await self._prefetcher.aclose()

    async def _check_banks(self, tenant: str, banks: tuple[BankAttachment, ...]) -> None:
        await asyncio.gather(*(self._banks.get(tenant, attached.bank) for attached in banks))

    async def _restore(self, record: SessionRecord) -> int:
        _, warmed = await self._blocks.warm(record)
        return warmed.restored_tokens


def _new_id() -> str:
    return uuid.uuid4().hex
