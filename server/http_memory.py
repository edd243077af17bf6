"""Banks over HTTP: which path is which method of the Memory service."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from starlette.routing import Route

from protos import rekindle_memory_pb2 as mpb
from server.calls import Calls
from server.http_calls import Endpoint, Method
from server.identity import Identities
from server.memory_service import MemoryService

_BANKS = "/v1/memory/banks"
_BANK = f"{_BANKS}/{{name}}"
_IN_BANK = f"{_BANKS}/{{bank}}"


def memory_routes(service: MemoryService, calls: Calls, identities: Identities, *, most_bytes: int) -> list[Route]:
    """`most_bytes` bounds a body that is one JSON object."""
    return [
        Route(path, Endpoint(method, calls, identities, most_bytes=most_bytes), methods=[verb])
        for verb, path, method in _methods(service)
    ]


def _methods(service: MemoryService) -> Iterator[tuple[str, str, Method]]:
    for verb, path, name, request, behaviour, streams in (
        ("POST", _BANKS, "CreateBank", mpb.CreateBankRequest, service.CreateBank, False),
        ("GET", _BANKS, "ListBanks", mpb.ListBanksRequest, service.ListBanks, False),
        ("GET", _BANK, "GetBank", mpb.GetBankRequest, service.GetBank, False),
        ("DELETE", _BANK, "DeleteBank", mpb.DeleteBankRequest, service.DeleteBank, False),
        ("POST", f"{_IN_BANK}/entries", "Remember", mpb.RememberRequest, service.Remember, False),
        ("POST", f"{_IN_BANK}/recall", "Recall", mpb.RecallRequest, service.Recall, False),
        ("POST", f"{_IN_BANK}/forget", "Forget", mpb.ForgetRequest, service.Forget, False),
        ("POST", f"{_IN_BANK}/documents", "PutDocuments", mpb.PutDocumentsRequest, service.PutDocuments, True),
        ("POST", f"{_IN_BANK}/reembed", "Reembed", mpb.ReembedRequest, service.Reembed, True),
    ):
        yield verb, path, Method(name=f"Memory/{name}", request=request, behaviour=behaviour, streams=streams)
    yield (
        "GET",
        f"{_IN_BANK}/export",
        Method(
            name="Memory/ExportBank",
            request=mpb.ExportBankRequest,
            behaviour=service.ExportBank,
            streams=True,
            line=lambda message: bytes(message.lines),
        ),
    )
    yield (
        "POST",
        f"{_IN_BANK}/import",
        Method(
            name="Memory/ImportBank",
            request=mpb.ImportBankRequest,
            behaviour=service.ImportBank,
            read_body=_import_requests,
        ),
    )


async def _import_requests(bank: str, pieces: AsyncIterator[bytes]) -> AsyncGenerator[mpb.ImportBankRequest, None]:
    """A body of JSON lines, as it comes."""
    yield mpb.ImportBankRequest(bank=bank)
    async for piece in pieces:
        yield mpb.ImportBankRequest(lines=piece)
