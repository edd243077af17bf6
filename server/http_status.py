"""Say each error in HTTP's words: the one place that knows them. Codes are those of google.rpc.Code."""

from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from protos.status import Failure

_Code = grpc.StatusCode

_HTTP: Final = {
    _Code.INVALID_ARGUMENT: 400,
    _Code.OUT_OF_RANGE: 400,
    _Code.FAILED_PRECONDITION: 400,
    _Code.UNAUTHENTICATED: 401,
    _Code.PERMISSION_DENIED: 403,
    _Code.NOT_FOUND: 404,
    _Code.ABORTED: 409,
    _Code.ALREADY_EXISTS: 409,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.CANCELLED: 499,
    _Code.UNIMPLEMENTED: 501,
    _Code.UNAVAILABLE: 503,
    _Code.DEADLINE_EXCEEDED: 504,
}
"""All others are 500."""


def http_code(failed: Failure) -> int:
    return _HTTP.get(failed.code, 500)


def error_body(failed: Failure) -> dict[str, Any]:
    """gRPC's status, message and, where they are known, reason, field and retry_after_s."""
    error: dict[str, Any] = {"status": failed.code.name, "message": failed.message}
    for packed in status_pb2.Status.FromString(failed.details).details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            error["reason"] = error_details_pb2.ErrorInfo.FromString(packed.value).reason
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            error["field"] = error_details_pb2.BadRequest.FromString(packed.value).field_violations[0].field
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(packed.value).retry_delay
            error["retry_after_s"] = delay.ToNanoseconds() / 1e9
    return {"error": error}
