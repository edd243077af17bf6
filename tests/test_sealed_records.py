"""Sealed session records: who lacks the key reads nothing of what was said; any change is an error, never tokens."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.attachments import BankAccess, BankAttachment
from cache_store.errors import RecordUnreadable
from cache_store.open_records import open_records
from cache_store.record_format import Kept, SealedFormat, Written, meta_fields
from cache_store.records import RecordStore, SessionRecord, TurnMemory
from cache_store.sealing import Keyring, MasterKey, Purpose
from tests.keyrings import keyring
from tests.test_records import new_record, take_turn, turn

SAID = [[1_000_001, 1_000_002, 1_000_003], [1_000_004, 1_000_005], [1_000_006, 1_000_007, 1_000_008]]
ALL_SAID = tuple(token for tokens in SAID for token in tokens)


@asynccontextmanager
async def records_at(url: str, ring: Keyring | None) -> AsyncIterator[RecordStore]:
    store = open_records(url, keyring=ring)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def records(redis_url: str) -> AsyncIterator[RecordStore]:
    async with records_at(redis_url, keyring()) as store:
        yield store


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def key(part: str, session_id: str = "s") -> str:
    return f"rekindle:{{t/{session_id}}}:{part}"


async def converse(records: RecordStore, session_id: str = "s") -> None:
    await records.create(new_record(session_id))
    for tokens in SAID:
        await take_turn(records, session_id, tokens)


def dump(client: redis.Redis) -> bytes:
    """All values of all keys."""
    read: dict[bytes, Callable[[Any], Any]] = {
        b"string": client.get,
        b"list": lambda name: client.lrange(name, 0, -1),
        b"hash": client.hgetall,
        b"zset": lambda name: client.zrange(name, 0, -1),
        b"set": client.smembers,
    }
    return b"".join(_flat(read[client.type(name)](name)) for name in client.scan_iter())  # type: ignore[index]


def _flat(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return b"".join(map(_flat, value.items() if isinstance(value, dict) else value))


async def test_no_token_is_in_redis(records: RecordStore, client: redis.Redis, redis_url: str) -> None:
    await converse(records)
    assert (await records.get("t", "s")).token_ids == ALL_SAID
    read = (TurnMemory("notes", "beef", 0.1, "handbook", 7), TurnMemory("log", "cafe", 0.05, "", 9))
    fork = replace(
        new_record("fork"),
        token_ids=ALL_SAID,
        turns=(replace(turn(0, 1, 8), idempotency_key="by-this-key", memories=read),),
        num_tokens=8,
    )
    await records.create(fork)
    assert (await records.get("t", "fork")).turns == fork.turns
    dumped = dump(client)
    assert not any(said in dumped for said in (b"by-this-key", b"handbook"))
    assert not any(token.to_bytes(4, "little") in dumped for token in ALL_SAID)
    async with records_at(redis_url, None) as plain:
        await converse(plain, "plain")
    dumped = dump(client)
    assert all(token.to_bytes(4, "little") in dumped for token in ALL_SAID), "the search finds what is there"


TAMPERINGS: dict[str, Callable[[redis.Redis], object]] = {
    "last piece cut off": lambda client: client.rpop(key("turns")),
    "first piece cut off": lambda client: client.lpop(key("turns")),
    "all pieces gone": lambda client: client.delete(key("turns")),
    "pieces in another order": lambda client: client.lmove(key("turns"), key("turns")),
    "a piece twice": lambda client: client.rpush(key("turns"), client.lindex(key("turns"), -1)),  # type: ignore[arg-type]
    "a piece of another session": lambda client: client.lset(
        key("turns"),
        1,
        client.lindex(key("turns", "other"), 1),  # type: ignore[arg-type]
    ),
    "all pieces of another session": lambda client: client.copy(key("turns", "other"), key("turns"), replace=True),
    "all of another session": lambda client: [
        client.copy(key(part, "other"), key(part), replace=True) for part in ("meta", "turns")
    ],
    "no seal": lambda client: client.hdel(key("meta"), "seal"),
    "another version": lambda client: client.hset(key("meta"), "version", 2),
    "no version": lambda client: client.hdel(key("meta"), "version"),
    "another length": lambda client: client.hset(key("meta"), "num_tokens", 3),
    "another codec": lambda client: client.hset(key("meta"), "codec", "int4"),
    "another model": lambda client: client.hset(key("meta"), "model", "cd34"),
    "another parent": lambda client: client.hset(key("meta"), "parent_session_id", "somebody's"),
    "another policy": lambda client: client.hset(key("meta"), "context_policy", "recall"),
    "a bank that was not attached": lambda client: client.hset(key("meta"), "banks", '[["theirs", "read"]]'),
    "nonsense for banks": lambda client: client.hset(key("meta"), "banks", "[1]"),
    "nonsense for a number": lambda client: client.hset(key("meta"), "created_ms", "soon"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
async def test_a_record_that_was_changed_is_an_error_and_not_locked(
    records: RecordStore, client: redis.Redis, tampering: str
) -> None:
    await converse(records)
    await converse(records, "other")
    TAMPERINGS[tampering](client)
    with pytest.raises(RecordUnreadable, match="session s is not"):
        await records.get("t", "s")
    for holder in ("first", "second"):
        with pytest.raises(RecordUnreadable):
            await records.begin("t", "s", holder=holder, lease_s=10)
    assert (await records.get("t", "other")).token_ids == ALL_SAID


async def test_pieces_of_an_earlier_state_do_not_pass_for_the_present_one(
    records: RecordStore, client: redis.Redis
) -> None:
    """As when a backup was restored, went on, and pieces of both are mixed."""
    await records.create(new_record())
    for tokens in SAID[:2]:
        await take_turn(records, "s", tokens)
    names = [key(part) for part in ("meta", "turns")]
    backup = {name: client.dump(name) for name in names}
    await take_turn(records, "s", [1, 2, 3])
    other = client.lindex(key("turns"), 2)
    for name, dumped in backup.items():
        assert dumped is not None
        client.restore(name, 0, dumped, replace=True)
    await take_turn(records, "s", [4, 5, 6])
    client.lset(key("turns"), 2, other)  # type: ignore[arg-type]
    with pytest.raises(RecordUnreadable):
        await records.get("t", "s")


async def test_what_says_how_long_a_record_is_kept_may_change(records: RecordStore) -> None:
    await converse(records)
    assert (await records.update("t", "s", ttl_s=50, pinned=True)).token_ids == ALL_SAID
    assert (await records.get("t", "s")).pinned
    await take_turn(records, "s", [9])
    assert (await records.get("t", "s")).token_ids == (*ALL_SAID, 9)


async def test_banks_are_sealed_too_and_change_without_a_turn(records: RecordStore, client: redis.Redis) -> None:
    await converse(records)
    banks = (BankAttachment("notes", BankAccess.READ),)
    await records.update("t", "s", ttl_s=None, pinned=None, banks=banks)
    await take_turn(records, "s", [9])
    kept = await records.get("t", "s")
    assert (kept.banks, kept.token_ids) == (banks, (*ALL_SAID, 9))
    client.hdel(key("meta"), "banks")
    with pytest.raises(RecordUnreadable):
        await records.get("t", "s")


async def test_a_record_in_the_clear_keeps_its_banks_when_it_is_sealed(redis_url: str) -> None:
    banks = (BankAttachment("notes", BankAccess.READ),)
    async with records_at(redis_url, None) as plain:
        await converse(plain)
    async with records_at(redis_url, keyring(takes_plain=True)) as moving:
        await moving.update("t", "s", ttl_s=None, pinned=None, banks=banks)
        assert (await moving.get("t", "s")).banks == banks
        await take_turn(moving, "s", [9])
    async with records_at(redis_url, keyring()) as strict:
        assert (await strict.get("t", "s")).banks == banks


async def test_a_record_moves_to_the_first_key_with_its_next_turn(redis_url: str) -> None:
    old, adding, rotated, new = (keyring(*ids) for ids in (("1",), ("1", "2"), ("2", "1"), ("2",)))
    async with records_at(redis_url, old) as first:
        await converse(first)
        await converse(first, "idle")
    async with records_at(redis_url, adding) as front_end, records_at(redis_url, rotated) as another:
        await take_turn(another, "s", [1])
        await take_turn(front_end, "s", [2])  # with both keys known, either may seal
        await take_turn(another, "s", [3])
    async with records_at(redis_url, new) as last:
        kept = await last.get("t", "s")
        assert kept.token_ids == (*ALL_SAID, 1, 2, 3)
        assert [turn.end for turn in kept.turns] == [3, 5, 8, 9, 10, 11]
        with pytest.raises(RecordUnreadable, match="session idle is sealed under a master key called '1', which is"):
            await last.get("t", "idle")


async def test_a_wrong_key_of_the_right_id_is_said_so(records: RecordStore, redis_url: str) -> None:
    await converse(records)
    wrong = Keyring([MasterKey("2026", bytes(32))], names=bytes(32))
    async with records_at(redis_url, wrong) as others:
        with pytest.raises(RecordUnreadable, match="another master key than the one called 2026"):
            await others.get("t", "s")


async def test_without_keys_a_sealed_record_is_an_error(records: RecordStore, redis_url: str) -> None:
    await converse(records)
    async with records_at(redis_url, None) as plain:
        with pytest.raises(RecordUnreadable, match="no master keys"):
            await plain.get("t", "s")


async def test_a_record_in_the_clear_is_refused_or_sealed_by_its_next_turn(redis_url: str, client: redis.Redis) -> None:
    async with records_at(redis_url, None) as plain:
        await converse(plain)
    async with records_at(redis_url, keyring()) as strict:
        with pytest.raises(RecordUnreadable, match="session s is not sealed"):
            await strict.get("t", "s")
        async with records_at(redis_url, keyring(takes_plain=True)) as moving:
            assert (await moving.get("t", "s")).token_ids == ALL_SAID
            await take_turn(moving, "s", [9])
        kept = await strict.get("t", "s")
        assert kept.token_ids == (*ALL_SAID, 9)
        assert len(kept.turns) == 4
    assert not any(token.to_bytes(4, "little") in dump(client) for token in ALL_SAID)


async def test_listings_tell_of_sealed_records_what_they_tell_of_others(records: RecordStore) -> None:
    await converse(records)
    [listed] = (await records.list("t", page_size=10, page_token="")).records
    assert (listed.version, listed.num_tokens, listed.model) == (3, 8, "ab12")


# Without Redis


class Shelf:
    """What Redis would keep of one session."""

    def __init__(self, ring: Keyring | None = None) -> None:
        self.format = SealedFormat((ring or keyring()).sealer(Purpose.RECORDS), takes_plain=False)
        self.record = new_record(created_ms=int(time.time() * 1000))
        self.meta: dict[bytes, bytes] = {}
        self.entries: list[bytes] = []
        self._keep(self.record, self.format.created(self.record))

    def commit(self, tokens: list[int], **more: Any) -> None:
        before = self.read()
        done = replace(turn(before.num_tokens, before.num_tokens, before.num_tokens + len(tokens)), **more)
        written = self.format.committed(before, new_tokens=tokens, turn=done, model="ab")
        if written.replaces:
            self.entries.clear()
        after = replace(
            before, version=before.version + 1, model="ab", token_ids=(*before.token_ids, *tokens), turns=()
        )
        self._keep(after, written)

    def read(self) -> SessionRecord:
        return self.format.read("t", "s", Kept(self.meta, b"", self.entries))

    def _keep(self, record: SessionRecord, written: Written) -> None:
        assert written.num_tokens == len(record.token_ids)
        self.entries += written.entries
        self.meta = {name.encode(): str(value).encode() for name, value in meta_fields(record).items()}
        self.meta[b"seal"] = written.seal


@settings(max_examples=40, deadline=None)
@given(
    said=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), min_size=1, max_size=5), data=st.data()
)
def test_whatever_becomes_of_the_pieces_a_record_is_as_it_was_or_an_error(
    said: list[list[int]], data: st.DataObject
) -> None:
    shelf = Shelf()
    for tokens in said:
        shelf.commit(tokens)
    was = shelf.read()
    assert was.token_ids == tuple(token for tokens in said for token in tokens)
    others = data.draw(st.permutations(shelf.entries))
    left = others[: data.draw(st.integers(0, len(others)))]
    place = data.draw(st.integers(0, len(others)))  # beyond the last: no piece is changed in itself
    if place < len(left):
        bit = data.draw(st.integers(0, 8 * len(left[place]) - 1))
        piece = bytearray(left[place])
        piece[bit // 8] ^= 1 << bit % 8
        left[place] = bytes(piece)
    if left == shelf.entries:
        assert shelf.read() == was
    else:
        shelf.entries = left
        with pytest.raises(RecordUnreadable):
            shelf.read()


@pytest.mark.parametrize(
    "more",
    [{"lost_inserts": tuple(range(30_000))}, *({"idempotency_key": "k" * num} for num in range(65_508, 65_513))],
    ids=lambda more: str(len(str(more))),
)
def test_a_turn_has_as_much_to_say_as_it_has(more: dict[str, Any]) -> None:
    shelf = Shelf()
    for _ in range(2):
        shelf.commit([1], **more)
    whole = shelf.format.created(shelf.read())  # in one piece
    for entries in (shelf.entries, whole.entries):
        shelf.meta[b"seal"], shelf.entries = (whole.seal if entries is whole.entries else shelf.meta[b"seal"]), entries
        assert shelf.read().turns == tuple(replace(turn(at, at, at + 1), **more) for at in range(2))


def test_a_long_conversation_is_kept_in_a_bounded_number_of_pieces() -> None:
    shelf = Shelf()
    longest = 0
    for number in range(300):
        shelf.commit([number])
        longest = max(longest, len(shelf.entries))
    assert shelf.read().token_ids == tuple(range(300))
    assert len(shelf.read().turns) == 300
    assert longest == 256
    assert len(shelf.entries) == 44
