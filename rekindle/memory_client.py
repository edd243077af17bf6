"""Banks of knowledge, as the asynchronous client has them: `client.memory`.

Knows the public protos only. Answers are the messages of `protos.rekindle_memory_pb2`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from protos import rekindle_memory_pb2 as mpb
from protos.rekindle_memory_pb2_grpc import MemoryStub
from rekindle.errors import from_rpc_error

_PIECE_BYTES = 1 << 20

T = TypeVar("T")


class MemoryClient:
    """Every call may raise RekindleError and is bounded by its `timeout_s`, or else by the client's."""

    def __init__(
        self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]], *, timeout_s: float, long_timeout_s: float
    ) -> None:
        """`long_timeout_s` is for calls that stream."""
        self._stub: Any = MemoryStub(channel)  # type: ignore[no-untyped-call]  # generated code
        self._metadata = metadata
        self._timeout_s, self._long_timeout_s = timeout_s, long_timeout_s

    async def create_bank(
        self, /, name: str, *, description: str = "", timeout_s: float | None = None, **settings: Any
    ) -> mpb.Bank:
        """Make a bank. `settings` are the fields of protos' BankSettings. Raises AlreadyExists, and TypeError or
        ValueError for an unknown or impossible setting."""
        request = mpb.CreateBankRequest(name=name, description=description, settings=mpb.BankSettings(**settings))
        return await self._call(self._stub.CreateBank, request, timeout_s)

    async def get_bank(self, name: str, *, timeout_s: float | None = None) -> mpb.Bank:
        return await self._call(self._stub.GetBank, mpb.GetBankRequest(name=name), timeout_s)

    async def list_banks(self, *, page_size: int = 0, timeout_s: float | None = None) -> AsyncIterator[mpb.Bank]:
        """Yield all banks, by name; pages are fetched as they are needed."""
        page_token = ""
        while True:
            request = mpb.ListBanksRequest(page_size=page_size, page_token=page_token)
            page: mpb.ListBanksResponse = await self._call(self._stub.ListBanks, request, timeout_s)
            for bank in page.banks:
                yield bank
            page_token = page.next_page_token
            if not page_token:
                return

    async def delete_bank(self, name: str, *, timeout_s: float | None = None) -> int:
        """Delete a bank with its entries; return how many they were."""
        request = mpb.DeleteBankRequest(name=name)
        deleted: mpb.DeleteBankResponse = await self._call(self._stub.DeleteBank, request, timeout_s)
        return deleted.entries

    async def remember(
        self,
        bank: str,
        text: str,
        *,
        metadata: Mapping[str, str] | None = None,
        importance: float | None = None,
        supersedes: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> mpb.MemoryEntry:
        """Add an entry; one that is there already is returned as it is. `supersedes` are ids of those it corrects."""
        request = mpb.RememberRequest(
            bank=bank, text=text, metadata=metadata, importance=importance, supersedes=supersedes
        )
        return await self._call(self._stub.Remember, request, timeout_s)

    async def put_documents(
        self, bank: str, documents: Iterable[mpb.Document], *, timeout_s: float | None = None
    ) -> AsyncIterator[mpb.PutDocumentsProgress]:
        """Add documents, cut in chunks, and yield after each how far it is. Those that are there are left alone."""
        request = mpb.PutDocumentsRequest(bank=bank, documents=documents)
        async for progress in self._stream(self._stub.PutDocuments, request, timeout_s):
            yield progress

    async def recall(
        self,
        bank: str,
        query: str,
        *,
        k: int = 0,
        where: mpb.EntryFilter | None = None,
        with_superseded: bool = False,
        peek: bool = False,
        timeout_s: float | None = None,
    ) -> Sequence[mpb.RecalledEntry]:
        """The entries that matter most to a query, best first: `k` of them, 0 means 8. With `peek` they are not
        remembered any better for it."""
        request = mpb.RecallRequest(
            bank=bank, query=query, k=k, filter=where, with_superseded=with_superseded, peek=peek
        )
        recalled: mpb.RecallResponse = await self._call(self._stub.Recall, request, timeout_s)
        return recalled.entries

    async def forget(
        self,
        bank: str,
        *,
        ids: Sequence[str] = (),
        where: mpb.EntryFilter | None = None,
        unused_for_s: int = 0,
        timeout_s: float | None = None,
    ) -> int:
        """Delete the entries that any of the three names, for good; return how many they were."""
        request = mpb.ForgetRequest(bank=bank, ids=ids, filter=where, unused_for_s=unused_for_s)
        forgotten: mpb.ForgetResponse = await self._call(self._stub.Forget, request, timeout_s or self._long_timeout_s)
        return forgotten.entries

    async def export_bank(
        self, bank: str, *, with_vectors: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[bytes]:
        """Yield all entries, oldest first, as lines of JSON: each piece is whole lines."""
        request = mpb.ExportBankRequest(bank=bank, with_vectors=with_vectors)
        async for piece in self._stream(self._stub.ExportBank, request, timeout_s):
            yield piece.lines

    async def import_bank(
        self, bank: str, pieces: Iterable[bytes], *, timeout_s: float | None = None
    ) -> mpb.ImportBankResponse:
        """Add entries of lines of JSON, as `export_bank` yields them, or as a file is read: pieces may be any."""
        requests = _import_requests(bank, pieces)
        return await self._call(self._stub.ImportBank, requests, timeout_s or self._long_timeout_s)

    async def reembed(self, bank: str, *, timeout_s: float | None = None) -> AsyncIterator[mpb.ReembedProgress]:
        """Make all vectors of a bank anew, with the workers' embedding model, and yield how far it is."""
        async for progress in self._stream(self._stub.Reembed, mpb.ReembedRequest(bank=bank), timeout_s):
            yield progress

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: Message | Iterator[Message], timeout_s: float | None
    ) -> T:
        try:
            return await method(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _stream(self, method: Any, request: Message, timeout_s: float | None) -> AsyncIterator[Any]:
        call = method(request, timeout=timeout_s or self._long_timeout_s, metadata=self._metadata)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()  # does nothing to a call that has ended


def _import_requests(bank: str, pieces: Iterable[bytes]) -> Iterator[mpb.ImportBankRequest]:
    """Messages of whole lines, of a mebibyte or little more each; the first one names the bank."""
    yield mpb.ImportBankRequest(bank=bank)
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        if len(waiting) >= _PIECE_BYTES and (end := waiting.rfind(b"\n") + 1):
            yield mpb.ImportBankRequest(lines=bytes(waiting[:end]))
            del waiting[:end]
    if waiting:
        yield mpb.ImportBankRequest(lines=bytes(waiting))
