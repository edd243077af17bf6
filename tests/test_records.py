"""Session records: the same contract for memory, Redis and Redis Cluster, and what Redis alone can do to us."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import redis

from cache_store.attachments import BankAccess, BankAttachment
from cache_store.embedded_redis import RedisServer
from cache_store.errors import (
    InvalidRequest,
    RecordUnreadable,
    SessionBusy,
    SessionExists,
    SessionNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from cache_store.open_records import open_records
from cache_store.records import RecordStore, SessionRecord, TurnRecord, check_session_id
from tests.keyrings import keyring

NOW_MS = 1_700_000_000_000


@pytest.fixture(params=["memory", "redis", "sealed", "cluster"])
async def records(request: pytest.FixtureRequest) -> AsyncIterator[RecordStore]:
    if request.param == "memory":
        url = "memory://"
    elif request.param in ("redis", "sealed"):
        url = request.getfixturevalue("redis_url")
    else:
        url = request.getfixturevalue("redis_cluster").url
    store = open_records(url, keyring=keyring() if request.param == "sealed" else None)
    yield store
    await store.aclose()


def new_record(session_id: str = "s", *, ttl_s: int = 0, pinned: bool = False, created_ms: int = 0) -> SessionRecord:
    created_ms = created_ms or int(time.time() * 1000)
    return SessionRecord(
        tenant="t",
        session_id=session_id,
        version=0,
        model="",
        created_ms=created_ms,
        last_used_ms=created_ms,
        ttl_s=ttl_s,
        pinned=pinned,
        worker_id="",
    )


def turn(start: int, reply_start: int, end: int) -> TurnRecord:
    return TurnRecord(start=start, reply_start=reply_start, end=end, finish_reason=1, committed_ms=NOW_MS)


async def commit(store: RecordStore, before: SessionRecord, holder: str, tokens: list[int]) -> None:
    start = before.num_tokens
    done = turn(start, start + 1, start + len(tokens))
    await store.commit(before, holder=holder, new_tokens=tokens, turn=done, model="ab12", worker_id="1")


async def take_turn(store: RecordStore, session_id: str, tokens: list[int]) -> None:
    holder = f"turn-{tokens}"
    before = await store.begin("t", session_id, holder=holder, lease_s=10)
    await commit(store, before, holder, tokens)


async def test_a_new_session_is_read_as_it_was_created(records: RecordStore) -> None:
    record = new_record(ttl_s=60, created_ms=NOW_MS)
    await records.create(record)
    assert await records.get("t", "s") == record


async def test_a_fork_brings_its_tokens_and_turns(records: RecordStore) -> None:
    fork = replace(
        new_record(), version=2, token_ids=(1, 2, 2**31 - 1), turns=(turn(0, 1, 2), turn(2, 2, 3)), num_tokens=3,
        parent_session_id="p", parent_turn=2, model="ab12", worker_id="0", codec="int4", context_policy="recall",
        banks=(BankAttachment("notes", BankAccess.READ), BankAttachment("log", BankAccess.READ_WRITE)),
    )  # fmt: skip
    await records.create(fork)
    assert await records.get("t", "s") == fork


async def test_a_taken_id_is_refused(records: RecordStore) -> None:
    await records.create(new_record())
    with pytest.raises(SessionExists):
        await records.create(new_record())


async def test_tenants_do_not_see_each_other(records: RecordStore) -> None:
    await records.create(new_record())
    await records.create(replace(new_record(), tenant="t}{ other"))
    await records.delete("t", "s")
    with pytest.raises(SessionNotFound):
        await records.get("t", "s")
    assert (await records.get("t}{ other", "s")).tenant == "t}{ other"
    page = await records.list("t}{ other", page_size=10, page_token="")
    assert [record.session_id for record in page.records] == ["s"]


async def test_turns_append_and_count_versions(records: RecordStore) -> None:
    await records.create(new_record(created_ms=NOW_MS))
    await take_turn(records, "s", [5, 6, 7])
    await take_turn(records, "s", [8, 9])
    record = await records.get("t", "s")
    assert record.token_ids == (5, 6, 7, 8, 9)
    assert record.turns == (turn(0, 1, 3), turn(3, 4, 5))
    assert (record.version, record.num_tokens, record.model, record.worker_id) == (2, 5, "ab12", "1")
    assert record.last_used_ms > NOW_MS


async def test_a_second_turn_at_once_is_refused_and_the_first_goes_on(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=10)
    with pytest.raises(SessionBusy):
        await records.begin("t", "s", holder="b", lease_s=10)
    await commit(records, before, "a", [1, 2])
    assert (await records.begin("t", "s", holder="b", lease_s=10)).token_ids == (1, 2)


async def test_a_released_session_can_be_taken_and_has_nothing_new(records: RecordStore) -> None:
    await records.create(new_record())
    await records.begin("t", "s", holder="a", lease_s=10)
    await records.release("t", "s", holder="a")
    assert (await records.begin("t", "s", holder="b", lease_s=10)).version == 0


async def test_only_the_holder_releases(records: RecordStore) -> None:
    await records.create(new_record())
    await records.begin("t", "s", holder="a", lease_s=10)
    await records.release("t", "s", holder="b")
    await records.release("t", "no-such-session", holder="b")
    with pytest.raises(SessionBusy):
        await records.begin("t", "s", holder="b", lease_s=10)


async def test_a_call_that_has_given_up_or_committed_does_not_lock_when_it_comes_late(records: RecordStore) -> None:
    await records.create(new_record())
    await records.release("t", "s", holder="gave up before its lock came")
    await take_turn(records, "s", [1])
    for holder in ("gave up before its lock came", "turn-[1]"):
        with pytest.raises(SessionBusy):
            await records.begin("t", "s", holder=holder, lease_s=10)
    await take_turn(records, "s", [2])
    assert (await records.get("t", "s")).token_ids == (1, 2)


async def test_a_lease_that_ran_out_can_neither_commit_nor_be_renewed(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=0.05)
    await asyncio.sleep(0.1)
    await records.begin("t", "s", holder="b", lease_s=10)
    with pytest.raises(SessionBusy):
        await records.renew("t", "s", holder="a", lease_s=10)
    with pytest.raises(SessionBusy):
        await commit(records, before, "a", [1, 2])
    assert (await records.get("t", "s")).token_ids == ()


async def test_a_dead_holders_lease_is_taken_from_it_for_good(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="dead", lease_s=10)
    for not_it in ("", "other"):
        with pytest.raises(SessionBusy) as caught:
            await records.begin("t", "s", holder="b", lease_s=10, instead_of=not_it)
        assert caught.value.holder == "dead"
    await records.begin("t", "s", holder="b", lease_s=10, instead_of="dead")
    await records.release("t", "s", holder="dead")
    for call in (commit(records, before, "dead", [1, 2]), records.renew("t", "s", holder="dead", lease_s=10)):
        with pytest.raises(SessionBusy):
            await call
    await commit(records, before, "b", [3])
    assert (await records.get("t", "s")).token_ids == (3,)


async def test_a_front_end_lives_as_long_as_it_says_so(records: RecordStore) -> None:
    assert not await records.is_alive("f")
    await records.keep_alive("f", 10)
    assert await records.is_alive("f")
    assert not await records.is_alive("g")
    await records.keep_alive("f", 0.05)
    await asyncio.sleep(0.1)
    assert not await records.is_alive("f")
    await records.keep_alive("f", 10)
    await records.keep_alive("f", 0)
    assert not await records.is_alive("f"), "it said goodbye"


async def test_a_renewed_lease_holds(records: RecordStore) -> None:
    await records.create(new_record())
    await records.begin("t", "s", holder="a", lease_s=0.2)
    await records.renew("t", "s", holder="a", lease_s=10)
    await asyncio.sleep(0.3)
    with pytest.raises(SessionBusy):
        await records.begin("t", "s", holder="b", lease_s=10)


async def test_a_commit_on_a_version_that_moved_changes_nothing(records: RecordStore) -> None:
    await records.create(new_record())
    stale = await records.begin("t", "s", holder="a", lease_s=10)
    await commit(records, stale, "a", [1, 2])
    await records.begin("t", "s", holder="b", lease_s=10)
    with pytest.raises(SessionBusy):
        await commit(records, stale, "b", [3, 4])
    assert (await records.get("t", "s")).token_ids == (1, 2)


async def test_a_repeated_commit_counts_once(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=10)
    await commit(records, before, "a", [1, 2])
    await commit(records, before, "a", [1, 2])
    record = await records.get("t", "s")
    assert (record.token_ids, record.version, len(record.turns)) == ((1, 2), 1, 1)


async def test_a_session_deleted_in_mid_turn_stays_deleted(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=10)
    await records.delete("t", "s")
    with pytest.raises(SessionNotFound):
        await commit(records, before, "a", [1])
    await records.create(new_record())
    with pytest.raises(SessionBusy):  # the same id and version, but not its session
        await commit(records, before, "a", [1])


async def test_deleting_tells_what_was(records: RecordStore) -> None:
    await records.create(new_record())
    await take_turn(records, "s", [1, 2, 3])
    assert (await records.delete("t", "s")).token_ids == (1, 2, 3)
    with pytest.raises(SessionNotFound):
        await records.delete("t", "s")
    assert (await records.list("t", page_size=10, page_token="")).records == []


async def test_unknown_sessions_are_not_found(records: RecordStore) -> None:
    with pytest.raises(SessionNotFound):
        await records.get("t", "s")
    with pytest.raises(SessionNotFound):
        await records.begin("t", "s", holder="a", lease_s=1)
    with pytest.raises(SessionNotFound):
        await records.renew("t", "s", holder="a", lease_s=1)
    with pytest.raises(SessionNotFound):
        await records.update("t", "s", ttl_s=1, pinned=None)


async def test_an_unused_session_expires_and_its_id_is_free(records: RecordStore) -> None:
    await records.create(new_record(ttl_s=1))
    await take_turn(records, "s", [1, 2])
    await asyncio.sleep(1.1)
    with pytest.raises(SessionNotFound):
        await records.get("t", "s")
    await records.create(new_record())
    assert (await records.get("t", "s")).token_ids == ()


async def test_use_prolongs_a_session(records: RecordStore) -> None:
    await records.create(new_record(ttl_s=1))
    for token in range(3):
        await asyncio.sleep(0.5)
        await take_turn(records, "s", [token])
    assert (await records.get("t", "s")).token_ids == (0, 1, 2)


async def test_a_running_turn_keeps_its_session_from_expiring(records: RecordStore) -> None:
    await records.create(new_record(ttl_s=1))
    before = await records.begin("t", "s", holder="a", lease_s=10)
    for _ in range(3):
        await asyncio.sleep(0.5)
        await records.renew("t", "s", holder="a", lease_s=10)
    await commit(records, before, "a", [1])


async def test_a_pinned_session_does_not_expire_and_an_unpinned_one_does(records: RecordStore) -> None:
    await records.create(new_record("pinned", ttl_s=1))
    await records.create(new_record("loose", ttl_s=1, pinned=True))
    assert (await records.update("t", "pinned", ttl_s=None, pinned=True)).pinned
    assert not (await records.update("t", "loose", ttl_s=None, pinned=False)).pinned
    await asyncio.sleep(1.1)
    assert (await records.get("t", "pinned")).ttl_s == 1
    with pytest.raises(SessionNotFound):
        await records.get("t", "loose")


async def test_a_change_of_ttl_leaves_the_running_turn_alone(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=10)
    assert (await records.update("t", "s", ttl_s=60, pinned=None)).ttl_s == 60
    await commit(records, before, "a", [1])
    assert (await records.get("t", "s")).ttl_s == 60


NOTES = BankAttachment("notes", BankAccess.READ_WRITE)


async def test_banks_are_attached_and_detached_and_turns_go_on(records: RecordStore) -> None:
    await records.create(replace(new_record(), context_policy="window"))
    await take_turn(records, "s", [1, 2])
    assert (await records.update("t", "s", ttl_s=None, pinned=None, banks=(NOTES,))).banks == (NOTES,)
    await take_turn(records, "s", [3, 4])
    record = await records.update("t", "s", ttl_s=60, pinned=None)
    assert (record.banks, record.context_policy, record.token_ids) == ((NOTES,), "window", (1, 2, 3, 4))
    await records.update("t", "s", ttl_s=None, pinned=None, banks=())
    record = await records.get("t", "s")
    assert (record.banks, record.ttl_s) == ((), 60)


async def test_banks_change_between_turns_only(records: RecordStore) -> None:
    await records.create(new_record())
    before = await records.begin("t", "s", holder="a", lease_s=10)
    with pytest.raises(SessionBusy):
        await records.update("t", "s", ttl_s=None, pinned=None, banks=(NOTES,))
    await commit(records, before, "a", [1, 2])
    assert (await records.get("t", "s")).banks == ()


async def test_a_record_from_before_there_were_banks_is_read_and_goes_on(redis_url: str) -> None:
    store = open_records(redis_url)
    await store.create(new_record())
    with redis.Redis.from_url(redis_url) as client:
        client.hdel("rekindle:{t/s}:meta", "banks", "context_policy")
    record = await store.get("t", "s")
    assert (record.banks, record.context_policy) == ((), "")
    await take_turn(store, "s", [1, 2])
    await store.update("t", "s", ttl_s=None, pinned=None, banks=(NOTES,))
    assert (await store.get("t", "s")).banks == (NOTES,)
    await store.aclose()


async def test_pages_are_newest_first_and_complete(records: RecordStore) -> None:
    for number in range(7):
        await records.create(new_record(f"s{number}", created_ms=NOW_MS + number // 2))  # some of one millisecond
    await take_turn(records, "s6", [1, 2])
    seen: list[SessionRecord] = []
    token = ""
    sizes = []
    while True:
        page = await records.list("t", page_size=3, page_token=token)
        seen += page.records
        sizes.append(len(page.records))
        token = page.next_token
        if not token:
            break
    assert sizes == [3, 3, 1]
    assert [record.session_id for record in seen] == ["s6", "s5", "s4", "s3", "s2", "s1", "s0"]
    assert (seen[0].num_tokens, seen[0].token_ids, seen[0].turns) == (2, (), ())


async def test_a_full_last_page_has_no_next(records: RecordStore) -> None:
    for number in range(3):
        await records.create(new_record(f"s{number}", created_ms=NOW_MS + number))
    page = await records.list("t", page_size=3, page_token="")
    assert (len(page.records), page.next_token) == (3, "")


@pytest.mark.parametrize("page_token", ["?", "bm9uc2Vuc2U=", "nonsense", "\N{SNOWMAN}", "AAAA"])
async def test_a_strange_page_token_is_refused(records: RecordStore, page_token: str) -> None:
    with pytest.raises(InvalidRequest, match="page_token"):
        await records.list("t", page_size=3, page_token=page_token)


async def test_listings_skip_sessions_that_expired(records: RecordStore) -> None:
    for number in range(6):
        await records.create(new_record(f"s{number}", ttl_s=number % 2, created_ms=NOW_MS + number))
    await asyncio.sleep(1.1)
    page = await records.list("t", page_size=2, page_token="")
    assert [record.session_id for record in page.records] == ["s4", "s2"]
    page = await records.list("t", page_size=2, page_token=page.next_token)
    assert [record.session_id for record in page.records] == ["s0"]


async def test_the_store_says_that_it_is_there(records: RecordStore) -> None:
    assert await records.available()
    assert (await records.info()).eviction_policy == "noeviction"


@pytest.mark.parametrize("session_id", ["", "a" * 129, "a b", "ä", "a/b", "{a}", "a\n"])
def test_bad_session_ids_are_refused(session_id: str) -> None:
    with pytest.raises(InvalidRequest, match="new_session_id"):
        check_session_id(session_id, "new_session_id")


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379", "redis://127.0.0.1:port"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis_url"):
        open_records(url)


async def test_the_index_forgets_sessions_that_expired(redis_url: str) -> None:
    store = open_records(redis_url)
    for number in range(4):
        await store.create(new_record(f"s{number}", ttl_s=1, created_ms=NOW_MS + number))
    await asyncio.sleep(1.1)
    await store.list("t", page_size=10, page_token="")
    await store.aclose()
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys() == []


async def test_a_long_history_survives_the_trip(redis_url: str) -> None:
    store = open_records(redis_url)
    tokens = tuple(range(200_000))
    await store.create(replace(new_record(), token_ids=tokens))
    await take_turn(store, "s", [7])
    assert (await store.get("t", "s")).token_ids == (*tokens, 7)
    await store.aclose()


async def test_a_record_from_before_there_were_codecs_is_raw(redis_url: str) -> None:
    store = open_records(redis_url)
    await store.create(replace(new_record(), codec="int8"))
    with redis.Redis.from_url(redis_url) as client:
        assert client.hdel("rekindle:{t/s}:meta", "codec") == 1
    assert (await store.get("t", "s")).codec == "raw"
    await store.aclose()


@pytest.mark.parametrize(
    "damage",
    [("del", "tokens"), ("del", "turns"), ("hdel", "meta", "version"), ("hset", "meta", "ttl_s", "x"),
     ("append", "tokens", "x"), ("rpush", "turns", "x")],
    ids=" ".join,
)  # fmt: skip
async def test_a_record_of_which_a_part_is_lost_or_damaged_is_refused_and_not_gone_on_with(
    redis_url: str, damage: tuple[str, ...]
) -> None:
    store = open_records(redis_url)
    await store.create(new_record())
    await take_turn(store, "s", [1, 2, 3])
    verb, part, *words = damage
    with redis.Redis.from_url(redis_url) as client:
        client.execute_command(verb, f"rekindle:{{t/s}}:{part}", *words)
    with pytest.raises(RecordUnreadable):
        await store.get("t", "s")
    with pytest.raises((RecordUnreadable, StoreError)):
        await store.begin("t", "s", holder="h", lease_s=60)
    with pytest.raises((RecordUnreadable, StoreError)):
        await store.delete("t", "s")
    with pytest.raises(SessionNotFound):
        await store.get("t", "s")
    await store.aclose()


async def test_records_are_found_over_a_unix_socket_with_a_password() -> None:
    with RedisServer(user=("front", "s3cret")) as server:
        for url in (server.unix_url, server.url):
            store = open_records(url)
            assert await store.available()
            await store.aclose()
        stranger = open_records(f"redis://front:wrong@127.0.0.1:{server.port}")
        assert not await stranger.available()
        await stranger.aclose()


async def test_redis_may_come_go_and_come_back(own_redis: RedisServer) -> None:
    store = open_records(own_redis.url, timeout_s=0.5)
    own_redis.stop()
    assert not await store.available()
    with pytest.raises(StoreUnavailable):
        await store.create(new_record())
    own_redis.start()
    await store.create(new_record())
    own_redis.restart()  # empty, with other scripts' cache, and all our connections dead
    with pytest.raises(SessionNotFound):
        await store.get("t", "s")
    await store.create(new_record())
    await take_turn(store, "s", [1])
    await store.aclose()


async def test_a_redis_that_stalls_is_given_up_in_time(own_redis: RedisServer) -> None:
    store = open_records(own_redis.url, timeout_s=0.2)
    await store.create(new_record())
    own_redis.pause()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.get("t", "s")
    assert time.monotonic() - began < 1.0
    own_redis.resume()
    assert (await store.get("t", "s")).session_id == "s"
    await store.aclose()


async def test_a_redis_that_stalls_while_a_session_is_locked_leaves_it_unlocked(own_redis: RedisServer) -> None:
    store = open_records(own_redis.url, timeout_s=0.2)
    await store.create(new_record())
    own_redis.pause()
    for holder in ("first", "second"):
        with pytest.raises(StoreUnavailable):
            await store.begin("t", "s", holder=holder, lease_s=600)
        await store.release("t", "s", holder=holder)
    own_redis.resume()
    give_up = time.monotonic() + 5
    while True:
        try:
            await take_turn(store, "s", [1])
            break
        except SessionBusy:
            assert time.monotonic() < give_up
            await asyncio.sleep(0.02)
    await store.aclose()


async def test_sessions_go_on_when_blocks_have_filled_redis(redis_url: str) -> None:
    store = open_records(redis_url)
    await store.create(new_record())
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 1)
        try:
            await take_turn(store, "s", [1])
            before = await store.begin("t", "s", holder="gives up", lease_s=10)
            await store.renew("t", "s", holder="gives up", lease_s=10)
            await store.release("t", "s", holder="gives up")
            await store.update("t", "s", ttl_s=100, pinned=True)
            await store.keep_alive("f", 10)
            assert await store.is_alive("f")
            with pytest.raises(StoreFull):
                await store.create(new_record("new"))
            assert (await store.get("t", "s")).token_ids == before.token_ids == (1,)
        finally:
            client.config_set("maxmemory", 0)
    await store.aclose()


async def test_a_thousand_reads_at_once_share_few_connections(redis_url: str) -> None:
    store = open_records(redis_url)
    await store.create(new_record())
    await asyncio.gather(*(store.get("t", "s") for _ in range(1000)))
    with redis.Redis.from_url(redis_url) as client:
        assert client.info("clients")["connected_clients"] < 100
    await store.aclose()


async def test_more_callers_than_connections_are_all_answered(records: RecordStore) -> None:
    await records.create(new_record())
    assert len(await asyncio.gather(*(records.get("t", "s") for _ in range(300)))) == 300
