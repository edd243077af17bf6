"""Say each error in gRPC's words. The worker's only file that knows both vocabularies."""

from typing import Final

import grpc

from cache_store import errors as store
from protos.status import Failure, Meaning, bad_field, failure, nearest
from worker import errors

_Code = grpc.StatusCode

MEANINGS: Final[dict[type[BaseException], Meaning]] = {
    store.InvalidRequest: Meaning(_Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    store.StoreUnavailable: Meaning(_Code.UNAVAILABLE, "STORE_UNAVAILABLE", retry_after_s=1.0),
    store.StoreFull: Meaning(_Code.RESOURCE_EXHAUSTED, "STORE_FULL", retry_after_s=10.0),
    store.StoreError: Meaning(_Code.INTERNAL, "STORE_FAILED"),
    errors.ModelRefused: Meaning(_Code.FAILED_PRECONDITION, "MODEL_REFUSED"),
    errors.NoEmbedder: Meaning(_Code.UNIMPLEMENTED, "NO_EMBEDDER"),
    errors.ContextTooLong: Meaning(_Code.OUT_OF_RANGE, "CONTEXT_TOO_LONG"),
    errors.Overloaded: Meaning(_Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.Draining: Meaning(_Code.UNAVAILABLE, "DRAINING", retry_after_s=1.0),
    errors.TenantErased: Meaning(_Code.ABORTED, "TENANT_ERASED"),
    errors.DeadlinePassed: Meaning(_Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    errors.DeadlineUnmeetable: Meaning(_Code.DEADLINE_EXCEEDED, "DEADLINE_UNMEETABLE"),
}
_BUG: Final = Meaning(_Code.INTERNAL, "INTERNAL")


def is_expected(error: Exception) -> bool:
    """False for a bug."""
    return nearest(MEANINGS, error) is not None


def failure_of(error: Exception, request_id: str) -> Failure:
    """The status for an error. What nobody foresaw says nothing but the id under which it was logged."""
    meaning = nearest(MEANINGS, error)
    if meaning is None:
        return failure(_BUG, f"internal error; request {request_id}")
    if isinstance(error, store.InvalidRequest):
        return failure(meaning, str(error), bad_field(error.field, error.problem))
    if isinstance(error, errors.Overloaded):
        return failure(meaning, str(error), retry_after_s=error.retry_after_s)
    return failure(meaning, str(error))
