"""Whatever is done to sessions, in whatever order and by whomever: memory and Redis agree, and no turn is lost."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from redis.asyncio import Redis

from cache_store.attachments import BankAccess, BankAttachment
from cache_store.embedded_redis import RedisServer
from cache_store.errors import ServingError
from cache_store.memory_records import MemoryRecords
from cache_store.record_format import PlainFormat, RecordFormat, SealedFormat
from cache_store.records import RecordStore, SessionRecord, TurnRecord
from cache_store.redis_records import RedisRecords
from cache_store.sealing import Purpose
from tests.keyrings import keyring
from tests.redis_servers import flush

LEASE_S = 600.0
sessions = st.sampled_from(["a", "b"])
holders = st.sampled_from(["one", "two", "three"])
_NOTES, _LOG = BankAttachment("notes", BankAccess.READ), BankAttachment("log", BankAccess.WRITE)
replies = st.lists(st.integers(0, 2**31), min_size=1, max_size=3)


class Calls(RuleBasedStateMachine):
    """Two stores, asked the same; and what must be in them, by the calls that succeeded."""

    server: RedisServer
    record_format: RecordFormat

    def __init__(self) -> None:
        super().__init__()
        flush(self.server)
        self.runner = asyncio.Runner()
        self.clock_s = 1_700_000_000.0
        self.stores: list[RecordStore] = [MemoryRecords(now=lambda: self.clock_s)]
        self.runner.run(self._connect())
        self.seen: dict[tuple[str, str], SessionRecord] = {}
        """By session and holder: the record as it was when the holder last locked it."""
        self.committed: dict[str, tuple[int, ...]] = {}

    async def _connect(self) -> None:
        redis = Redis.from_url(self.server.url)
        self.stores.append(
            RedisRecords(redis, timeout_s=5.0, record_format=self.record_format, now=lambda: self.clock_s)
        )

    def both(self, ask: Callable[[RecordStore], Awaitable[Any]]) -> Any:
        """What both answer; None where both refuse, in the same words' class."""
        self.clock_s += 1.0

        async def answers() -> list[Any]:
            return [await _outcome(ask(store)) for store in self.stores]

        memory, redis = self.runner.run(answers())
        assert memory == redis
        return None if isinstance(memory, type) else memory

    @rule(session_id=sessions, tokens=st.lists(st.integers(0, 9), max_size=3))
    def create(self, session_id: str, tokens: list[int]) -> None:
        turns = (_turn(0, len(tokens)),) if tokens else ()
        record = SessionRecord(
            tenant="t",
            session_id=session_id,
            version=len(turns),
            model="",
            created_ms=int(self.clock_s * 1000),
            last_used_ms=int(self.clock_s * 1000),
            ttl_s=0,
            pinned=False,
            worker_id="",
            turns=turns,
            token_ids=tuple(tokens),
        )
        if self.both(lambda store: _told(store.create(record))):
            assert session_id not in self.committed, "made twice"
            self.committed[session_id] = tuple(tokens)

    @rule(session_id=sessions, holder=holders)
    def begin(self, session_id: str, holder: str) -> None:
        record = self.both(lambda store: store.begin("t", session_id, holder=holder, lease_s=LEASE_S))
        if record is not None:
            self.seen[session_id, holder] = record

    @rule(session_id=sessions, holder=holders)
    def renew(self, session_id: str, holder: str) -> None:
        self.both(lambda store: _told(store.renew("t", session_id, holder=holder, lease_s=LEASE_S)))

    @rule(session_id=sessions, holder=holders, tokens=replies)
    def commit(self, session_id: str, holder: str, tokens: list[int]) -> None:
        before = self.seen.get((session_id, holder))
        if before is None:
            return
        turn = _turn(before.num_tokens, len(tokens))
        done = self.both(
            lambda store: _told(
                store.commit(before, holder=holder, new_tokens=tokens, turn=turn, model="m", worker_id=holder)
            )
        )
        history = self.committed.get(session_id, ())
        if done and before.token_ids == history:  # else it is the same commit again
            self.committed[session_id] = (*history, *tokens)

    @rule(session_id=sessions, holder=holders)
    def release(self, session_id: str, holder: str) -> None:
        self.both(lambda store: _told(store.release("t", session_id, holder=holder)))

    @rule(session_id=sessions, pinned=st.booleans())
    def update(self, session_id: str, pinned: bool) -> None:
        self.both(lambda store: store.update("t", session_id, ttl_s=None, pinned=pinned))

    @rule(session_id=sessions, banks=st.lists(st.sampled_from([_NOTES, _LOG]), unique=True, max_size=2))
    def attach(self, session_id: str, banks: list[BankAttachment]) -> None:
        self.both(lambda store: store.update("t", session_id, ttl_s=None, pinned=None, banks=tuple(banks)))

    @rule(session_id=sessions)
    def delete(self, session_id: str) -> None:
        was = self.both(lambda store: store.delete("t", session_id))
        assert (was is not None) == (session_id in self.committed)
        self.committed.pop(session_id, None)
        self.seen = {key: record for key, record in self.seen.items() if key[0] != session_id}

    @rule()
    def look(self) -> None:
        page = self.both(lambda store: _records(store))
        assert {record.session_id for record in page} == set(self.committed)
        for session_id, tokens in self.committed.items():
            record = self.both(partial(_read, session_id))
            assert record.token_ids == tokens
            assert record.version == len(record.turns)
            assert record.num_tokens == len(tokens)

    def teardown(self) -> None:
        async def close() -> None:
            for store in self.stores:
                await store.aclose()

        try:
            self.look()
        finally:
            self.runner.run(close())
            self.runner.close()


async def _outcome(answer: Awaitable[Any]) -> Any:
    """The answer, or the class of the refusal."""
    try:
        return await answer
    except ServingError as error:
        return type(error)


async def _told(work: Awaitable[None]) -> bool:
    await work
    return True


async def _read(session_id: str, store: RecordStore) -> SessionRecord:
    return await store.get("t", session_id)


async def _records(store: RecordStore) -> list[SessionRecord]:
    return (await store.list("t", page_size=10, page_token="")).records


def _turn(start: int, length: int) -> TurnRecord:
    return TurnRecord(start=start, reply_start=start, end=start + length, finish_reason=1, committed_ms=1)


@pytest.mark.parametrize(
    "record_format",
    [PlainFormat(), SealedFormat(keyring().sealer(Purpose.RECORDS), takes_plain=False)],
    ids=["plain", "sealed"],
)
def test_memory_and_redis_keep_the_same_sessions(redis_server: RedisServer, record_format: RecordFormat) -> None:
    Calls.server, Calls.record_format = redis_server, record_format
    run_state_machine_as_test(Calls, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
