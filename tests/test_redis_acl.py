"""The ACL line in docs/security.md lets everything of ours through, and has no command that we don't use."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from cache_store.codecs import INT8
from cache_store.embedded_redis import RedisServer
from cache_store.errors import StoreError
from cache_store.ids import mark_of
from cache_store.open_records import open_records
from cache_store.redis_link import link_to
from cache_store.store import Fetched, Payload
from tests import test_ageing as ladder
from tests.redis_servers import RedisCluster, command
from tests.test_block_store import eventually, fetch, key, name, opened, stored, wanted
from tests.test_records import new_record, take_turn

DOCUMENT = Path(__file__).parent.parent / "docs" / "security.md"
NEVER_REFUSED = {"auth", "hello"}
"""An ACL has no say in these."""
OF_WHO_LOOKS = {"config", "migrate", "restore-asking", "select"}
"""What the test itself asks, and what MIGRATE asks of the node that a slot goes to."""


def documented(begin: str) -> str:
    """The line of the document that begins so."""
    (line,) = (line.strip() for line in DOCUMENT.read_text().splitlines() if line.strip().startswith(begin))
    return line


USER = documented("user rekindle ")
IN_A_CLUSTER = documented("+cluster")


def commands(rules: str) -> set[str]:
    return {word[1:].partition("|")[0] for word in rules.split() if word.startswith("+")}


class Guarded:
    """Servers that have the documented user, and what it has called on them."""

    def __init__(self, admins: Sequence[redis.Redis]) -> None:
        self._admins = admins

    def add(self, rules: str) -> None:
        words = rules.replace(">SECRET", ">secret").split()
        for admin in self._admins:
            command(admin, "ACL", "SETUSER", *words[1:])

    def remove(self) -> None:
        for admin in self._admins:
            command(admin, "ACL", "DELUSER", "rekindle")

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        """Afterwards, the commands that succeeded."""
        used: set[str] = set()
        for admin in self._admins:
            admin.config_resetstat()
        yield used
        for admin in self._admins:
            stats = admin.info("commandstats")
            used |= {
                name.removeprefix("cmdstat_").partition("|")[0]
                for name, stat in stats.items()
                if stat["calls"] > stat["failed_calls"]
            }
        used -= NEVER_REFUSED


def as_user(url: str) -> str:
    return url.replace("://", "://rekindle:secret@", 1)


@pytest.fixture
def guarded(redis_server: RedisServer, redis_url: str) -> Iterator[Guarded]:
    with redis.Redis.from_url(redis_url) as admin:
        servers = Guarded([admin])
        servers.add(USER)
        yield servers
        servers.remove()


@pytest.fixture
def guarded_cluster(redis_cluster: RedisCluster) -> Iterator[Guarded]:
    with ExitStack() as stack:
        servers = Guarded([stack.enter_context(redis.Redis.from_url(node.url)) for node in redis_cluster.nodes])
        servers.add(f"{USER} {IN_A_CLUSTER}")
        yield servers
        servers.remove()


async def use_records(url: str) -> None:
    """All that front ends ask of Redis."""
    records = open_records(url)
    assert await records.available()
    for session_id in ("a", "b"):
        await records.create(new_record(session_id, ttl_s=100))
        await take_turn(records, session_id, [1, 2, 3])
    before = await records.begin("t", "a", holder="h", lease_s=10)
    await records.renew("t", "a", holder="h", lease_s=10)
    await records.release("t", "a", holder="h")
    assert (await records.get("t", "a")).token_ids == before.token_ids
    assert len((await records.list("t", page_size=1, page_token="")).records) == 1
    await records.update("t", "a", ttl_s=None, pinned=True)
    await records.create(new_record("expires", ttl_s=1, created_ms=1))
    await asyncio.sleep(1.1)
    assert (await records.recount("t")).tokens == 6
    assert (await records.info()).used_bytes
    await records.keep_alive("front", 10)
    assert await records.is_alive("front")
    await records.delete("t", "a")
    await records.aclose()


def use_blocks(url: str) -> None:
    """All that workers ask of Redis."""
    store = opened(url, refresh_ttl_s=1000)
    eventually(store.available)
    store.put(stored(1, 2))
    link = link_to(url, timeout_s=1.0)
    link.client().set(key(2), b"no frame")
    link.close()
    assert fetch(store, wanted(1, 2, 3)) == [Fetched.HIT, Fetched.CORRUPT, Fetched.ABSENT]
    assert store.which([name(1), name(2)]) == [True, False]
    assert store.retain([name(1)], ttl_s=50) == store.retain([name(1)], ttl_s=0) == 1
    assert store.info().used_bytes
    time.sleep(0.2)  # what was used is prolonged behind
    assert store.delete([name(1)]) == 1
    assert store.deleted([name(1)]) == [True]
    store.put(stored(3))
    assert store.erase(mark_of(name(3))) == 1
    store.close()


def age_blocks(url: str) -> None:
    """All that ageing asks of it."""
    with ladder.store_at(url) as store:
        store.put([ladder.stored(1)])
        shelf = store.ageing()
        assert shelf is not None
        assert shelf.lead(for_s=10.0)
        [idle] = [idle for page in shelf.idle() for idle in page]
        assert shelf.exchange(idle, lambda held: Payload(INT8, ladder.shrink(held, INT8))) is not None
        shelf.resign()


async def use_all(url: str) -> None:
    await use_records(url)
    await asyncio.to_thread(use_blocks, url)
    await asyncio.to_thread(age_blocks, url)


async def test_one_server_needs_the_documented_commands_and_no_others(guarded: Guarded, redis_url: str) -> None:
    with guarded.watched() as used:
        await use_all(as_user(redis_url))
    assert used - OF_WHO_LOOKS == commands(USER)


async def test_a_cluster_needs_some_more(guarded_cluster: Guarded, redis_cluster: RedisCluster) -> None:
    url = as_user(redis_cluster.url)
    with guarded_cluster.watched() as used:
        await use_all(url)
        store = opened(url)
        eventually(store.available)
        store.put(stored(7))
        with redis_cluster.moving(key(7)) as move:
            move.keys()
            assert store.which([name(7)]) == [True]  # the node that it moves to is asked
        store.close()
    assert used - OF_WHO_LOOKS == commands(USER) | commands(IN_A_CLUSTER)


async def test_the_user_reaches_nobody_elses_keys_and_nothing_that_is_dangerous(
    guarded: Guarded, redis_url: str
) -> None:
    with redis.Redis.from_url(as_user(redis_url)) as client:
        client.set("rekindle:anything", "1")
        for words in (
            ("GET", "others:key"),
            ("EVAL", "return redis.call('GET', 'others:key')", 0),
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("ACL", "LIST"),
            ("MONITOR",),
            ("DEBUG", "SLEEP", 0),
            ("PUBLISH", "channel", "text"),
            ("OBJECT", "FREQ", "rekindle:anything"),
        ):
            with pytest.raises(redis.ResponseError, match=r"permission|can't access"):
                command(client, *words)


async def test_a_user_that_lacks_a_command_is_an_error_not_a_hang(guarded: Guarded, redis_url: str) -> None:
    guarded.add("user rekindle -evalsha")
    records = open_records(as_user(redis_url))
    with pytest.raises(StoreError, match="permission"):
        await records.create(new_record())
    await records.aclose()
