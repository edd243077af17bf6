"""Tenants over gRPC: all that one has is erased, for itself or for an operator: session by session, then
the rest.

The proof is in how it ends: with a look at all sessions, workers and banks, and all of Redis, that found nothing any
more.
"""

import asyncio
import time
from typing import Any

import grpc.aio
import structlog

from cache_store.errors import InvalidRequest, SessionBusy, SessionNotFound
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_pb2_grpc import TenantsServicer
from server.banks.keeper import BankKeeper
from server.errors import NotAllowed, TenantActive
from server.identity import caller
from server.sessions import SessionKeeper
from server.tenants import is_tenant_name

_AT_ONCE = 16
_BANKS_AT_ONCE = 1000
_BUSY_S = 0.2
"""Between looks at sessions whose turns must end first."""
_PATIENCE_S = 15.0
"""A tenant that goes on meanwhile would keep an erase busy for ever."""

_log = structlog.get_logger(__name__)


class TenantsService(TenantsServicer):
    """Errors are raised; `Calls` says them on the wire. (Method names are the proto's.)"""

    def __init__(self, keeper: SessionKeeper, banks: BankKeeper) -> None:
        self._keeper = keeper
        self._banks = banks

    async def EraseTenant(
        self, request: pb.EraseTenantRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EraseTenantResponse:
        who = caller()
        tenant = request.tenant or who.tenant
        if tenant != who.tenant and not who.operator:
            raise NotAllowed("only an operator may erase another tenant")
        if not is_tenant_name(tenant):
            raise InvalidRequest("tenant", "must be 1 to 64 of A-Z a-z 0-9 . _ -")
        erased = await self._erase(tenant)
        counts = {field.name: count for field, count in erased.ListFields()}
        _log.warning("tenant erased", erased=tenant, by=who.tenant, **counts)
        return erased

    async def _erase(self, tenant: str) -> pb.EraseTenantResponse:
        erased, give_up_s = pb.EraseTenantResponse(), time.monotonic() + _PATIENCE_S
        while True:
            for erase in (self._erase_listed, self._erase_blocks, self._erase_banks):
                if await erase(tenant, erased):
                    break
            else:
                return erased
            if time.monotonic() > give_up_s:
                raise TenantActive(f"tenant {tenant} goes on; {erased.sessions} sessions were erased: do it again")
            await asyncio.sleep(_BUSY_S)  # some may have been in use, and others may be new

    async def _erase_listed(self, tenant: str, erased: pb.EraseTenantResponse) -> bool:
        """Erase every session that is listed and not in use, and count it. False where none was listed."""
        page_token, found = "", False
        while True:
            page = await self._keeper.page(tenant, page_size=_AT_ONCE, page_token=page_token)
            found = found or bool(page.records)
            deleted = await asyncio.gather(*(self._delete(tenant, record.session_id) for record in page.records))
            for reply in deleted:
                if reply is not None:
                    erased.sessions += 1
                    erased.tokens += reply.tokens
                    _add(reply, erased)
            page_token = page.next_token
            if not page_token:
                return found

    async def _erase_blocks(self, tenant: str, erased: pb.EraseTenantResponse) -> bool:
        """Erase what no session names, and count it. False where there was nothing."""
        found = [_add(reply, erased) for reply in await self._keeper.erase_blocks(tenant)]
        return any(found)

    async def _erase_banks(self, tenant: str, erased: pb.EraseTenantResponse) -> bool:
        """Erase all banks, and count them and their entries. False where there was none."""
        banks, page_token = 0, ""
        while True:
            page = await self._banks.page(tenant, page_size=_BANKS_AT_ONCE, page_token=page_token)
            banks, page_token = banks + len(page.records), page.next_token
            if not page_token:
                break
        erased.banks += banks
        erased.entries += await self._banks.erase(tenant)  # also where none is listed: one may be half gone
        return bool(banks)

    async def _delete(self, tenant: str, session_id: str) -> pb.DeleteSessionResponse | None:
        """None where it has gone meanwhile, or is in use."""
        try:
            return await self._keeper.delete(tenant, session_id)
        except (SessionNotFound, SessionBusy):
            return None


def _add(dropped: pb.DeleteSessionResponse | wpb.DropReply, erased: pb.EraseTenantResponse) -> bool:
    """Count the blocks that were dropped. False where there were none."""
    erased.device_blocks += dropped.device_blocks
    erased.host_blocks += dropped.host_blocks
    erased.disk_blocks += dropped.disk_blocks
    erased.redis_blocks += dropped.redis_blocks
    return bool(dropped.device_blocks or dropped.host_blocks or dropped.disk_blocks or dropped.redis_blocks)
