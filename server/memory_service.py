"""Banks over gRPC: read the request, ask the keeper, write the reply. No policy lives here."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from protos import rekindle_memory_pb2 as mpb
from protos.rekindle_memory_pb2_grpc import MemoryServicer
from server import memory_messages as messages
from server.banks.keeper import BankKeeper
from server.identity import caller
from server.limits import Limits
from server.validation import check_page_size

_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_K = 8
_DEFAULT_IMPORTANCE = 0.5


class MemoryService(MemoryServicer):
    """Errors are raised; `Calls` says them on the wire. (Method names are the proto's.)"""

    def __init__(self, keeper: BankKeeper, limits: Limits) -> None:
        self._keeper = keeper
        self._limits = limits

    async def CreateBank(self, request: mpb.CreateBankRequest, context: _Context) -> mpb.Bank:
        settings = messages.settings_of(request.settings)
        await self._limits.check_banks(caller().tenant, self._keeper)
        record = await self._keeper.create(
            caller().tenant, request.name, description=request.description, settings=settings
        )
        return messages.bank_message(record)

    async def GetBank(self, request: mpb.GetBankRequest, context: _Context) -> mpb.Bank:
        return messages.bank_message(await self._keeper.get(caller().tenant, request.name))

    async def ListBanks(self, request: mpb.ListBanksRequest, context: _Context) -> mpb.ListBanksResponse:
        page_size = check_page_size(request.page_size)
        page = await self._keeper.page(caller().tenant, page_size=page_size, page_token=request.page_token)
        banks = [messages.bank_message(record) for record in page.records]
        return mpb.ListBanksResponse(banks=banks, next_page_token=page.next_token)

    async def DeleteBank(self, request: mpb.DeleteBankRequest, context: _Context) -> mpb.DeleteBankResponse:
        return mpb.DeleteBankResponse(entries=await self._keeper.delete(caller().tenant, request.name))

    async def Remember(self, request: mpb.RememberRequest, context: _Context) -> mpb.MemoryEntry:
        entry = await self._keeper.remember(
            caller().tenant,
            request.bank,
            text=request.text,
            metadata=request.metadata,
            importance=request.importance if request.HasField("importance") else _DEFAULT_IMPORTANCE,
            supersedes=tuple(request.supersedes),
        )
        return messages.entry_message(entry)

    async def PutDocuments(self, request: mpb.PutDocumentsRequest, context: _Context) -> None:
        documents = [messages.document_of(document) for document in request.documents]
        put = self._keeper.put_documents(caller().tenant, request.bank, documents)
        await _write_all(put, messages.progress_message, context)

    async def Recall(self, request: mpb.RecallRequest, context: _Context) -> mpb.RecallResponse:
        recalled = await self._keeper.recall(
            caller().tenant,
            request.bank,
            request.query,
            k=request.k or _DEFAULT_K,
            where=messages.filter_of(request.filter),
            with_superseded=request.with_superseded,
            peek=request.peek,
        )
        return mpb.RecallResponse(entries=[messages.recalled_message(one) for one in recalled])

    async def Forget(self, request: mpb.ForgetRequest, context: _Context) -> mpb.ForgetResponse:
        entries = await self._keeper.forget(
            caller().tenant,
            request.bank,
            ids=tuple(request.ids),
            where=messages.filter_of(request.filter),
            unused_for_s=request.unused_for_s,
        )
        return mpb.ForgetResponse(entries=entries)

    async def ExportBank(self, request: mpb.ExportBankRequest, context: _Context) -> None:
        lines = self._keeper.export(caller().tenant, request.bank, with_vectors=request.with_vectors)
        await _write_all(lines, lambda piece: mpb.JsonLines(lines=piece), context)

    async def ImportBank(
        self, requests: AsyncIterator[mpb.ImportBankRequest], context: _Context
    ) -> mpb.ImportBankResponse:
        first = await anext(requests, mpb.ImportBankRequest())

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield first.lines
            async for request in requests:
                yield request.lines

        imported = await self._keeper.import_lines(caller().tenant, first.bank, pieces())
        return mpb.ImportBankResponse(entries=imported.entries, new_entries=imported.new_entries)

    async def Reembed(self, request: mpb.ReembedRequest, context: _Context) -> None:
        await _write_all(self._keeper.reembed(caller().tenant, request.bank), messages.reembed_message, context)


async def _write_all(items: AsyncGenerator[Any, None], message_of: Any, context: _Context) -> None:
    """Written, not yielded: a client that hangs up then cancels this very coroutine, and the work stops at once."""
    async with aclosing(items) as each:
        async for item in each:
            await context.write(message_of(item))
