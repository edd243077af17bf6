"""Say an error on the wire: a gRPC status with google.rpc details. Each side has its own table of errors."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

DETAILS_KEY: Final = "grpc-status-details-bin"
_DOMAIN: Final = "rekindle"
_MOST_CHARACTERS: Final = 300
"""Of a message, which may quote what was sent: beyond 8 KiB, encoded, gRPC puts an error of its own in its place."""


class Meaning(NamedTuple):
    """What an error class says to a client."""

    code: grpc.StatusCode
    reason: str
    """For google.rpc.ErrorInfo: UPPER_SNAKE_CASE, stable, for programs to read."""
    retry_after_s: float | None = None
    """For google.rpc.RetryInfo; None where the same request would fail again, or must not be repeated."""


class Failure(NamedTuple):
    """A status to end a call with."""

    code: grpc.StatusCode
    message: str
    details: bytes
    """A serialized google.rpc.Status, or empty."""


def nearest(table: Mapping[type[BaseException], Meaning], error: BaseException) -> Meaning | None:
    """The meaning of the error's class, or of its nearest ancestor in the table."""
    return next((table[kind] for kind in type(error).__mro__ if kind in table), None)


def failure(meaning: Meaning, message: str, *more: Message, retry_after_s: float | None = None) -> Failure:
    """Build the status: ErrorInfo, RetryInfo where a retry makes sense, and what is added."""
    message = _short(message)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=meaning.reason, domain=_DOMAIN), *more]
    delay_s = meaning.retry_after_s if retry_after_s is None else retry_after_s
    if delay_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=meaning.code.value[0], message=message, details=packed)
    return Failure(meaning.code, message, status.SerializeToString())


def reason_of(details: bytes) -> str:
    """The reason that a serialized google.rpc.Status gives; empty where it gives none. Raises DecodeError."""
    info = error_details_pb2.ErrorInfo()
    packed = status_pb2.Status.FromString(details).details
    return next((str(info.reason) for detail in packed if detail.Unpack(info)), "")


def bad_field(field: str, problem: str) -> Message:
    """Name the field that can't be served."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=_short(problem))
    bad: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return bad


def spent_quota(subject: str, description: str) -> Message:
    """Name the limit that is reached."""
    violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
    spent: Message = error_details_pb2.QuotaFailure(violations=[violation])
    return spent


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 4]} ..."


async def abort(context: grpc.aio.ServicerContext[Any, Any], failed: Failure) -> NoReturn:
    """End the call. Raises what grpc.aio raises for that."""
    trailing = ((DETAILS_KEY, failed.details),) if failed.details else ()
    await context.abort(failed.code, failed.message, trailing)
    raise AssertionError("abort returned")
