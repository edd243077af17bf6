"""Say each error in gRPC's words. The front end's only file that knows both vocabularies."""

from typing import Final

import grpc

from cache_store import errors as store
from protos.status import Failure, Meaning, bad_field, failure, nearest, spent_quota
from server import errors

_Code = grpc.StatusCode

MEANINGS: Final[dict[type[BaseException], Meaning]] = {
    store.InvalidRequest: Meaning(_Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    store.SessionNotFound: Meaning(_Code.NOT_FOUND, "SESSION_NOT_FOUND"),
    store.SessionExists: Meaning(_Code.ALREADY_EXISTS, "SESSION_EXISTS"),
    store.SessionBusy: Meaning(_Code.ABORTED, "SESSION_BUSY", retry_after_s=0.5),
    store.LimitReached: Meaning(_Code.RESOURCE_EXHAUSTED, "TENANT_LIMIT"),
    store.BankNotFound: Meaning(_Code.NOT_FOUND, "BANK_NOT_FOUND"),
    store.BankExists: Meaning(_Code.ALREADY_EXISTS, "BANK_EXISTS"),
    store.BankFull: Meaning(_Code.RESOURCE_EXHAUSTED, "BANK_FULL"),
    store.EntriesMissing: Meaning(_Code.NOT_FOUND, "ENTRIES_MISSING"),
    store.EmbedderChanged: Meaning(_Code.FAILED_PRECONDITION, "EMBEDDER_CHANGED"),
    store.StoreUnavailable: Meaning(_Code.UNAVAILABLE, "STORE_UNAVAILABLE", retry_after_s=1.0),
    store.StoreFull: Meaning(_Code.RESOURCE_EXHAUSTED, "STORE_FULL", retry_after_s=10.0),
    store.BlockCorrupt: Meaning(_Code.DATA_LOSS, "BLOCK_CORRUPT"),
    store.BlockForeign: Meaning(_Code.DATA_LOSS, "BLOCK_FOREIGN"),
    store.RecordUnreadable: Meaning(_Code.DATA_LOSS, "RECORD_UNREADABLE"),
    store.StoreError: Meaning(_Code.INTERNAL, "STORE_FAILED"),
    errors.NoWorker: Meaning(_Code.UNAVAILABLE, "NO_WORKER", retry_after_s=1.0),
    errors.NoEmbedder: Meaning(_Code.FAILED_PRECONDITION, "NO_EMBEDDER"),
    errors.WorkerLost: Meaning(_Code.UNAVAILABLE, "WORKER_LOST", retry_after_s=0.5),
    errors.WorkersLost: Meaning(_Code.INTERNAL, "WORKERS_LOST"),
    errors.WorkerFault: Meaning(_Code.INTERNAL, "WORKER_FAULT"),
    errors.Unauthenticated: Meaning(_Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.NotAllowed: Meaning(_Code.PERMISSION_DENIED, "NOT_ALLOWED"),
    errors.TenantActive: Meaning(_Code.ABORTED, "TENANT_ACTIVE", retry_after_s=1.0),
    errors.TooManyStreams: Meaning(_Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", retry_after_s=1.0),
    errors.ShuttingDown: Meaning(_Code.UNAVAILABLE, "SHUTTING_DOWN", retry_after_s=1.0),
}
_TURN_S: Final = 0.5
"""After this, a turn of a tenant that runs as many as it may could have ended."""

_BUG: Final = Meaning(_Code.INTERNAL, "INTERNAL")


def is_expected(error: Exception) -> bool:
    """False for a bug, of ours or of a worker's."""
    if isinstance(error, errors.WorkerRefused):
        return error.code not in (_Code.UNKNOWN, _Code.INTERNAL)
    return nearest(MEANINGS, error) is not None


def failure_of(error: Exception, request_id: str) -> Failure:
    """The status for an error. What nobody foresaw says nothing but the id under which it was logged."""
    if not is_expected(error):
        return failure(_BUG, f"internal error; request {request_id}")
    if isinstance(error, errors.WorkerRefused):
        return Failure(error.code, error.message, error.details)
    meaning = nearest(MEANINGS, error)
    assert meaning is not None
    if isinstance(error, store.InvalidRequest):
        return failure(meaning, str(error), bad_field(error.field, error.problem))
    if isinstance(error, store.LimitReached):
        wait_s = _TURN_S if error.limit == "max_turns" else None  # of sessions and tokens some must be deleted first
        return failure(meaning, str(error), spent_quota(error.limit, str(error)), retry_after_s=wait_s)
    return failure(meaning, str(error))
