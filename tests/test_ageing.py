"""Blocks of ladder sessions go down the ladder in a real Redis, and nothing else does, whatever happens meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis

from cache_store.codecs import INT4, INT8, LADDER, LOSSLESS, CodecInfo
from cache_store.embedded_redis import RedisServer
from cache_store.errors import StoreError
from cache_store.frame import HEADER_BYTES, Framer
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.ladder import Ladder, parse_ladder
from cache_store.layout import KVLayout
from cache_store.open_store import open_block_store
from cache_store.store import BlockStore, Held, Store
from tests.redis_servers import RedisCluster
from worker.config import ConfigError, WorkerConfig
from worker.tiers.ageing import Ager

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32")
FULL = LAYOUT.block_tokens
MODEL = b"model"
LADDER_OF_THREE = parse_ladder("lossless,int8@600,int4@3600")


def name(number: int, fidelity: str = LADDER) -> BlockHash:
    return chain(root_hash(MODEL, "tenant", fidelity), [number])


def key(number: int, fidelity: str = LADDER) -> str:
    return f"rekindle:b:{name(number, fidelity).hex()}"


def content(number: int, codec: CodecInfo = LOSSLESS) -> bytes:
    """Every block differs; a codec's says which it is, and is half as long as the one before."""
    return bytes([number, codec.id]) * (LAYOUT.block_bytes >> (1 + codec.id))


def shrink(held: Held, target: CodecInfo) -> memoryview:
    number, codec_id = held.payload[:2]
    assert codec_id == held.codec.id, "the header says what the payload is"
    assert target.id > codec_id, "never up the ladder, and never the same again"
    return memoryview(content(number, target))


def stored(
    number: int,
    codec: CodecInfo = LOSSLESS,
    *,
    fidelity: str = LADDER,
    num_tokens: int = FULL,
    ttl_s: int = 1000,
) -> Store:
    payload = memoryview(content(number, codec))
    return Store(name(number, fidelity), num_tokens, payload, ttl_s, codec, 32, fidelity)


def make_idle(client: redis.Redis, key: str, idle_s: int) -> None:
    """As if nobody had used the key for so long."""
    dumped = client.dump(key)
    assert dumped is not None
    client.restore(key, max(client.pttl(key), 0), dumped, replace=True, idletime=idle_s)


def idle_s(client: redis.Redis, key: str) -> int:
    seconds = client.object("idletime", key)
    assert isinstance(seconds, int), f"{key} is gone"
    return seconds


def codec_at(client: redis.Redis, number: int, fidelity: str = LADDER) -> str:
    """Of a block, whose value is checked. Makes it recent."""
    value = client.get(key(number, fidelity))
    assert isinstance(value, bytes)
    block = name(number, fidelity)
    frame = Framer(LAYOUT, MODEL).read(value[:HEADER_BYTES], block=block, value_bytes=len(value))
    assert value[HEADER_BYTES:] == content(number, frame.codec)
    assert frame.first_position == 32
    return frame.codec.name


def eventually(holds: Callable[[], bool], *, within_s: float = 10.0) -> None:
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.01)


@contextmanager
def store_at(url: str, fingerprint: bytes = MODEL) -> Iterator[BlockStore]:
    store = open_block_store(url, LAYOUT, fingerprint, timeout_s=2.0, refresh_ttl_s=0)
    assert store is not None
    try:
        yield store
    finally:
        store.close()


@contextmanager
def ageing(
    store: BlockStore,
    ladder: Ladder = LADDER_OF_THREE,
    by: Callable[[Held, CodecInfo], memoryview] = shrink,
) -> Iterator[Ager]:
    shelf = store.ageing()
    assert shelf is not None
    ager = Ager(shelf, ladder, by, block_tokens=FULL, sweep_every_s=0.02)
    ager.start()
    try:
        yield ager
    finally:
        ager.close()


def moved(ager: Ager) -> dict[tuple[str, str], int]:
    return {(aged.source, aged.target): aged.blocks for aged in ager.stats().aged}


@pytest.fixture
def store(redis_url: str) -> Iterator[BlockStore]:
    with store_at(redis_url) as store:
        yield store


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_a_block_goes_down_the_ladder_and_stays_as_idle_and_as_mortal_as_it_was(
    store: BlockStore, client: redis.Redis
) -> None:
    store.put([stored(1), stored(2, ttl_s=0), stored(3)])
    make_idle(client, key(1), 700)
    make_idle(client, key(2), 700)
    make_idle(client, key(3), 4000)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 2, ("lossless", "int4"): 1})
        assert 700 <= idle_s(client, key(1)) <= 705
        assert 4000 <= idle_s(client, key(3)) <= 4005
        assert 990 < client.ttl(key(1)) <= 1000
        assert client.ttl(key(2)) == -1, "pinned"
        assert client.get(key(1)) != client.get(key(2))
        make_idle(client, key(1), 3700)
        eventually(lambda: ("int8", "int4") in moved(ager))
        saved = {aged.target: aged.saved_bytes for aged in ager.stats().aged if aged.source == "lossless"}
    assert [codec_at(client, number) for number in (1, 2, 3)] == ["int4", "int8", "int4"]
    assert saved["int4"] == len(content(3)) - len(content(3, INT4))


def test_blocks_of_a_cluster_age_on_each_of_its_nodes(redis_cluster: RedisCluster) -> None:
    with store_at(redis_cluster.url) as store:
        store.put([stored(number) for number in range(12)])
        for node in redis_cluster.nodes:
            with redis.Redis.from_url(node.url) as client:
                keys = [found.decode() for found in client.keys("rekindle:b:*")]
                assert keys, "each node has some"
                for found in keys:
                    make_idle(client, found, 700)
        with ageing(store) as ager:
            eventually(lambda: moved(ager) == {("lossless", "int8"): 12})


def test_blocks_of_other_sessions_stay_as_they_are_and_as_idle_as_they_are(
    store: BlockStore, client: redis.Redis
) -> None:
    store.put([stored(1), stored(2, fidelity=""), stored(3, INT8, fidelity="int8"), stored(4, num_tokens=FULL - 1)])
    before = {}
    for number, fidelity in [(1, LADDER), (2, ""), (3, "int8"), (4, LADDER)]:
        before[key(number, fidelity)] = client.get(key(number, fidelity))
        make_idle(client, key(number, fidelity), 4000)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int4"): 1})
        time.sleep(0.2)  # some sweeps more
        assert moved(ager) == {("lossless", "int4"): 1}
    del before[key(1)]
    assert all(idle_s(client, other) >= 4000 for other in before), "LRU would else keep what was looked at"
    assert {other: client.get(other) for other in before} == before


def test_a_block_that_was_put_again_or_deleted_meanwhile_is_left_alone(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1), stored(2), stored(3)])
    for number in (1, 2, 3):
        make_idle(client, key(number), 700)

    def interrupted(held: Held, target: CodecInfo) -> memoryview:
        if held.block == name(1):
            store.delete([name(1)])
        elif held.block == name(2):
            store.put([stored(2, num_tokens=FULL - 1)])
        return shrink(held, target)

    with ageing(store, by=interrupted) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1})
        eventually(lambda: not client.exists(key(1)))
        time.sleep(0.2)
    assert not client.exists(key(1)), "not raised from the dead"
    assert codec_at(client, 2) == "lossless"
    assert codec_at(client, 3) == "int8"


def test_a_block_that_is_read_before_its_turn_comes_is_left_alone(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(number) for number in range(5)])
    for number in range(5):
        make_idle(client, key(number), 700)

    def interrupted(held: Held, target: CodecInfo) -> memoryview:
        for number in range(5):
            if held.block != name(number):
                client.get(key(number))
        return shrink(held, target)

    with ageing(store, by=interrupted) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1})
        time.sleep(0.1)
        assert moved(ager) == {("lossless", "int8"): 1}
    assert sorted(codec_at(client, number) for number in range(5)) == ["int8", *["lossless"] * 4]


def test_a_block_that_was_computed_and_put_again_ages_again(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1)])
    make_idle(client, key(1), 700)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1})
        store.put([stored(1)])
        make_idle(client, key(1), 650)
        eventually(lambda: moved(ager) == {("lossless", "int8"): 2})


def test_a_block_read_again_keeps_its_codec_until_it_is_due_for_the_next(
    store: BlockStore, client: redis.Redis
) -> None:
    store.put([stored(1, INT8), stored(2)])
    make_idle(client, key(1), 700)
    make_idle(client, key(2), 700)
    before = client.get(key(1))
    make_idle(client, key(1), 700)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1})
        time.sleep(0.2)
        assert idle_s(client, key(1)) >= 700, "looked at, and given back its age"
        assert client.get(key(1)) == before
        time.sleep(0.2)
        assert moved(ager) == {("lossless", "int8"): 1}


def test_one_worker_at_a_time_ages_blocks_and_another_goes_on_when_it_leaves(
    redis_url: str, store: BlockStore, client: redis.Redis
) -> None:
    def cold(number: int) -> None:
        store.put([stored(number)])
        make_idle(client, key(number), 700)

    cold(1)
    with store_at(redis_url) as another, ageing(another) as first:
        eventually(lambda: moved(first) == {("lossless", "int8"): 1})
        with ageing(store) as second:
            cold(2)
            eventually(lambda: moved(first) == {("lossless", "int8"): 2})
            time.sleep(0.1)
            assert moved(second) == {}
            first.close()
            cold(3)
            eventually(lambda: moved(second) == {("lossless", "int8"): 1})
    assert client.keys("rekindle:ageing:*") == [], "nobody leads, and nobody has to wait"


def test_a_worker_that_died_is_followed_when_its_lease_ends(store: BlockStore) -> None:
    dead, alive = store.ageing(), store.ageing()
    assert dead is not None
    assert alive is not None
    assert dead.lead(for_s=0.3)
    assert not alive.lead(for_s=0.3)
    alive.resign()
    assert dead.lead(for_s=0.3), "only its holder gives a lease up"
    eventually(lambda: alive.lead(for_s=0.3))


def test_only_the_worker_that_leads_scans(store: BlockStore, client: redis.Redis) -> None:
    def scans() -> int:
        return int(client.info("commandstats").get("cmdstat_scan", {"calls": 0})["calls"])

    leader = store.ageing()
    assert leader is not None
    assert leader.lead(for_s=60)
    before = scans()
    with ageing(store) as ager:
        time.sleep(0.2)  # some sweeps
        assert scans() == before
        leader.resign()
        eventually(lambda: scans() > before)
        assert ager.stats().held_back == ""


@pytest.mark.parametrize("odd", ["z" * 32, "A" * 32, " " * 32])
def test_keys_that_look_like_a_ladders_block_and_name_none_are_passed_over(
    store: BlockStore, client: redis.Redis, odd: str
) -> None:
    client.set(f"rekindle:b:{odd}02", b"somebody else's")
    store.put([stored(1)])
    make_idle(client, key(1), 700)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1})
        assert ager.stats().held_back == ""
    assert client.get(f"rekindle:b:{odd}02") == b"somebody else's"


def test_a_sweep_that_fails_unexpectedly_is_told_and_the_next_goes_on(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1)])
    make_idle(client, key(1), 700)
    is_broken = True

    def breaks(held: Held, target: CodecInfo) -> memoryview:
        if is_broken:
            raise ZeroDivisionError("a bug")
        return shrink(held, target)

    with ageing(store, by=breaks) as ager:
        eventually(lambda: "a bug" in ager.stats().held_back)
        is_broken = False
        make_idle(client, key(1), 700)
        eventually(lambda: moved(ager) == {("lossless", "int8"): 1} and not ager.stats().held_back)


def test_blocks_of_another_model_are_left_to_its_own_workers(
    redis_url: str, store: BlockStore, client: redis.Redis
) -> None:
    with store_at(redis_url, b"another model") as another:
        another.put([stored(1)])
    store.put([stored(2)])
    before = client.get(key(1))
    make_idle(client, key(1), 4000)
    make_idle(client, key(2), 4000)
    with ageing(store) as ager:
        eventually(lambda: moved(ager) == {("lossless", "int4"): 1})
        time.sleep(0.1)
        assert moved(ager) == {("lossless", "int4"): 1}
    assert idle_s(client, key(1)) >= 4000
    assert client.get(key(1)) == before
    with store_at(redis_url, b"another model") as another, ageing(another) as other:
        make_idle(client, key(1), 4000)
        eventually(lambda: moved(other) == {("lossless", "int4"): 1})


def test_a_redis_that_counts_uses_instead_of_idle_seconds_is_told_and_nothing_ages(own_redis: RedisServer) -> None:
    with store_at(own_redis.url) as store, redis.Redis.from_url(own_redis.url) as client:
        store.put([stored(1)])
        client.config_set("maxmemory-policy", "volatile-lfu")
        with ageing(store) as ager:
            eventually(lambda: "LFU" in ager.stats().held_back)
            client.config_set("maxmemory-policy", "volatile-lru")
            make_idle(client, key(1), 700)
            eventually(lambda: bool(moved(ager)) and not ager.stats().held_back)


def test_ageing_goes_on_when_a_lost_redis_is_back(own_redis: RedisServer) -> None:
    with store_at(own_redis.url) as store, ageing(store) as ager:
        own_redis.stop()
        eventually(lambda: bool(ager.stats().held_back))
        own_redis.start()
        eventually(lambda: not ager.stats().held_back)
        with redis.Redis.from_url(own_redis.url) as client:
            eventually(lambda: _stored(store, stored(1)))
            make_idle(client, key(1), 700)
            eventually(lambda: bool(moved(ager)))


def test_closing_waits_for_one_block_at_most(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(number) for number in range(50)])
    for number in range(50):
        make_idle(client, key(number), 700)

    def slow(held: Held, target: CodecInfo) -> memoryview:
        time.sleep(0.1)
        return shrink(held, target)

    with ageing(store, by=slow) as ager:
        eventually(lambda: bool(moved(ager)))
        began_s = time.monotonic()
        ager.close()
        assert time.monotonic() - began_s < 1.0
        assert sum(moved(ager).values()) < 10


@pytest.mark.parametrize(
    ("text", "rungs"),
    [
        ("lossless,int8,int4", [("lossless", 0), ("int8", 600), ("int4", 3600)]),
        ("raw, lossless@60, k8v4, int4@7200", [("raw", 0), ("lossless", 60), ("k8v4", 1800), ("int4", 7200)]),
        ("int8", [("int8", 0)]),
    ],
)
def test_a_ladder_is_read_with_its_times_or_the_stated_ones(text: str, rungs: list[tuple[str, float]]) -> None:
    assert [(rung.codec.name, rung.after_s) for rung in parse_ladder(text).rungs] == rungs


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no codec ''"),
        ("lossless,zip@5", "no codec 'zip'"),
        ("lossless@5,int8", "born"),
        ("raw,lossless,int8", "say lossless@SECONDS"),
        ("lossless,int8@soon", "whole seconds"),
        ("lossless,int8@", "whole seconds"),
        ("int8,lossless@5", "not smaller"),
        ("lossless,int8@60,int4@60", "not later"),
        ("lossless,int8@0", "not later"),
    ],
)
def test_a_ladder_that_cannot_work_says_why(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_ladder(text)


def test_a_worker_is_not_configured_with_a_ladder_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="codec_ladder: there is no codec 'zip'"):
        WorkerConfig(codec_ladder="lossless,zip@5")


def test_a_block_is_due_for_the_lowest_rung_that_it_is_idle_enough_for() -> None:
    due = {idle_s: LADDER_OF_THREE.due(idle_s) for idle_s in (0, 599, 600, 3599, 3600, 10**6)}
    assert list(due.values()) == [LOSSLESS, LOSSLESS, INT8, INT8, INT4, INT4]


def _stored(store: BlockStore, block: Store) -> bool:
    try:
        store.put([block])
    except StoreError:
        return False
    return True
