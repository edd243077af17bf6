"""Every error has its status, on both sides of the wire."""

import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

import cache_store.errors
import cache_store.redis_errors
import server.errors
import server.status
import worker.errors
import worker.status
from cache_store.errors import (
    BankExists,
    BankFull,
    BankNotFound,
    EmbedderChanged,
    EntriesMissing,
    InvalidRequest,
    LimitReached,
    ServingError,
    SessionBusy,
    SessionExists,
    SessionNotFound,
)
from protos.status import Failure, nearest
from server.errors import WorkerRefused
from worker.errors import Overloaded

_ARGUMENTS: dict[type[ServingError], tuple[Any, ...]] = {
    InvalidRequest: ("text", "must not be empty"),
    LimitReached: ("max_sessions", 7),
    BankFull: ("bank_max_entries", 7),
    EntriesMissing: (("e-1", "e-2"),),
    EmbedderChanged: ("notes", "fa4e", "beef"),
    Overloaded: ("256 wait", 1.5),
    WorkerRefused: (StatusCode.OUT_OF_RANGE, "too long", b"details"),
}


def every_subclass(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from every_subclass(subclass)


ALL = sorted(set(every_subclass(ServingError)), key=lambda kind: f"{kind.__module__}.{kind.__name__}")
COLD = [kind for kind in ALL if kind.__module__.startswith("cache_store.")]
THE_FRONT_ENDS = {
    *(SessionNotFound, SessionExists, SessionBusy, LimitReached),
    *(BankNotFound, BankExists, BankFull, EntriesMissing, EmbedderChanged),
}
"""Of these no worker hears."""


def details(failed: Failure) -> list[Any]:
    found = []
    for packed in status_pb2.Status.FromString(failed.details).details:
        found.append(getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[1])())
        packed.Unpack(found[-1])
    return found


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.__module__.split(".")[0] in ("cache_store", "server")])
def test_the_front_end_has_a_status_for_each_of_its_errors(kind: type[ServingError]) -> None:
    assert kind is WorkerRefused or nearest(server.status.MEANINGS, kind(*_ARGUMENTS.get(kind, ("gone",))))


@pytest.mark.parametrize(
    "kind",
    [kind for kind in ALL if kind.__module__ == "worker.errors" or (kind in COLD and kind not in THE_FRONT_ENDS)],
)
def test_the_worker_has_a_status_for_each_of_its_errors(kind: type[ServingError]) -> None:
    assert nearest(worker.status.MEANINGS, kind(*_ARGUMENTS.get(kind, ("gone",))))


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickle(kind: type[ServingError]) -> None:
    error = kind(*_ARGUMENTS.get(kind, ("s-1 is gone",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_nearest_ancestor_says_what_a_new_error_means() -> None:
    class RedisOnFire(cache_store.errors.StoreUnavailable):
        pass

    assert server.status.failure_of(RedisOnFire("hot"), "r").code == StatusCode.UNAVAILABLE


def test_a_bad_field_is_named() -> None:
    failed = server.status.failure_of(InvalidRequest("chat.messages[0].role", "must not be empty"), "r")
    info, bad = details(failed)
    assert failed.code == StatusCode.INVALID_ARGUMENT
    assert (info.reason, info.domain) == ("INVALID_FIELD", "rekindle")
    assert [(violation.field, violation.description) for violation in bad.field_violations] == [
        ("chat.messages[0].role", "must not be empty")
    ]


def test_a_full_queue_says_when_to_come_back() -> None:
    failed = worker.status.failure_of(Overloaded("256 wait", 1.5), "r")
    info, retry = details(failed)
    assert (failed.code, info.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_a_workers_words_pass_unchanged() -> None:
    said = worker.status.failure_of(worker.errors.ContextTooLong("5000 of 4096"), "r")
    passed = server.status.failure_of(WorkerRefused(said.code, said.message, said.details), "other")
    assert passed == said


@pytest.mark.parametrize("module", [server.status, worker.status])
@pytest.mark.parametrize("bug", [KeyError("secret"), ZeroDivisionError(), ServingError("unmapped")])
def test_a_bug_tells_nothing_but_the_request_id(module: Any, bug: Exception) -> None:
    failed = module.failure_of(bug, "r-17")
    assert not module.is_expected(bug)
    assert (failed.code, failed.message) == (StatusCode.INTERNAL, "internal error; request r-17")
    assert b"secret" not in failed.details


@pytest.mark.parametrize("code", [StatusCode.UNKNOWN, StatusCode.INTERNAL])
def test_a_workers_bug_is_not_passed_on(code: grpc.StatusCode) -> None:
    failed = server.status.failure_of(WorkerRefused(code, "Unexpected KeyError: secret"), "r-17")
    assert failed.message == "internal error; request r-17"
