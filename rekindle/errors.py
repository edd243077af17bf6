"""What a call can fail with: one tree, in the caller's words. The one file of the client that knows google.rpc.

Codes are gRPC's. What the server said about the cause (google.rpc details) is unpacked: the bad field, when to come
back, and the rest as it is.
"""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_DETAILS_KEY = "grpc-status-details-bin"
_DETAIL_TYPES: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.QuotaFailure,
        error_details_pb2.DebugInfo,
    )
}


class RekindleError(Exception):
    """A call failed. `answered` says that the server itself refused it: nothing was stored then."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        details: Sequence[Message] = (),
    ) -> None:
        super().__init__(code, message, details)
        self.code = code
        self.message = message
        self.details = tuple(details)
        """google.rpc messages: BadRequest, RetryInfo, ErrorInfo and the like."""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"

    @property
    def answered(self) -> bool:
        return bool(self.details)

    @property
    def field(self) -> str:
        """The request's field that was refused; empty if none was named."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
                return str(detail.field_violations[0].field)
        return ""

    @property
    def retry_after_s(self) -> float | None:
        """When the server asks to come back, in seconds; None if it said nothing of it."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToTimedelta().total_seconds())
        return None


class BadInput(RekindleError):
    """A field can't be served: `field` says which. Sending it again will not help."""


class TooLong(RekindleError):
    """Prompt and reply do not fit the model."""


class NotFound(RekindleError):
    """There is no such session, or bank."""


class AlreadyExists(RekindleError):
    """The session's id, or the bank's name, is taken."""


class Busy(RekindleError):
    """Another turn of the session is running, or came first."""


class Overloaded(RekindleError):
    """The server has too much to do: come back in `retry_after_s`."""


class Unavailable(RekindleError):
    """The server, its workers or its Redis can't be reached now."""


class TimedOut(RekindleError):
    """The call's time was over before it was done."""


class Denied(RekindleError):
    """The server doesn't know this caller, or doesn't let it."""


_CLASSES: dict[grpc.StatusCode, type[RekindleError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.OUT_OF_RANGE: TooLong,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Busy,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
}


def make_error(code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> RekindleError:
    """Build the class that belongs to the code (RekindleError itself for codes that ask for nothing special)."""
    return _CLASSES.get(code, RekindleError)(code, message, details)


def from_rpc_error(error: grpc.aio.AioRpcError) -> RekindleError:
    """Translate gRPC's error, details included."""
    metadata: Any = error.trailing_metadata() or ()  # pairs, whatever grpc's stubs say
    packed = next((value for key, value in metadata if key == _DETAILS_KEY), None)
    return make_error(error.code(), error.details() or error.code().name, _unpack(packed))


def _unpack(packed: str | bytes | None) -> list[Message]:
    if not isinstance(packed, bytes):
        return []
    try:
        status = status_pb2.Status.FromString(packed)
    except DecodeError:  # a proxy's, not ours: the code and the message still tell
        return []
    details = []
    for any_message in status.details:
        kind = _DETAIL_TYPES.get(any_message.type_url.rpartition("/")[2])
        if kind is not None:
            details.append(kind.FromString(any_message.value))
    return details
