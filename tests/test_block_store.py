"""What every block store promises, on memory and on real Redis: TCP, unix socket, TLS, ACL user, cluster, sealed."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import redis
import xxhash
from redis.crc import key_slot

from cache_store import redis_store
from cache_store.codecs import INT4, INT8, K8V4, LADDER, LOSSLESS
from cache_store.embedded_redis import RedisServer
from cache_store.errors import InvalidRequest, StoreFull, StoreUnavailable
from cache_store.frame import HEADER_BYTES
from cache_store.ids import BlockHash, chain, root_hash, tenant_mark
from cache_store.layout import KVLayout
from cache_store.memory_store import MemoryBlockStore
from cache_store.open_records import open_records
from cache_store.open_store import open_block_store
from cache_store.sealing import Purpose
from cache_store.store import BlockStore, Encoding, Fetch, Fetched, Store
from tests.keyrings import keyring
from tests.redis_servers import RedisCluster
from tests.tls_front import TlsFront

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=256, dtype="float32")  # 512 KiB
ROOT = root_hash(b"model", "tenant")
TIMEOUT_S = 1.0
REFRESH_TTL_S = 1000
SEALED = "sealed+"


def name(number: int) -> BlockHash:
    return chain(ROOT, [number])


def key(number: int) -> str:
    return f"rekindle:b:{name(number).hex()}"


def payload(number: int) -> bytes:
    """Every block differs, everywhere."""
    return bytes((number * 7 + 13 * i) % 251 for i in range(4096)) * (LAYOUT.block_bytes // 4096)


def stored(*numbers: int, ttl_s: int = 100, num_tokens: int = 256) -> list[Store]:
    return [Store(name(number), num_tokens, memoryview(payload(number)), ttl_s) for number in numbers]


def wanted(*numbers: int, num_tokens: int = 256) -> list[Fetch]:
    """Buffers full of poison: a lost copy must not pass by luck."""
    return [Fetch(name(number), num_tokens, memoryview(bytearray(b"\xa5" * LAYOUT.block_bytes))) for number in numbers]


def fetch(store: BlockStore, fetches: Sequence[Fetch], *, within_s: float = 10.0) -> list[Fetched]:
    landed: dict[int, Fetched] = {}

    def land(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
        assert index not in landed, "landed twice"
        landed[index] = outcome

    store.get(fetches, land, deadline_s=time.monotonic() + within_s)
    return [landed[index] for index in range(len(fetches))]


def opened(url: str, *, layout: KVLayout = LAYOUT, fingerprint: bytes = b"model", refresh_ttl_s: int = 0) -> BlockStore:
    store = open_block_store(
        url.removeprefix(SEALED),
        layout,
        fingerprint,
        timeout_s=TIMEOUT_S,
        refresh_ttl_s=refresh_ttl_s,
        sealer=keyring().sealer(Purpose.BLOCKS) if url.startswith(SEALED) else None,
    )
    assert store is not None
    return store


def eventually(holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.01)


@pytest.fixture(params=["memory", "tcp", "sealed", "unix", "tls", "acl", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    match request.param:
        case "memory":
            return "memory://"
        case "tcp":
            return str(request.getfixturevalue("redis_url"))
        case "sealed":
            return SEALED + str(request.getfixturevalue("redis_url"))
        case "unix":
            request.getfixturevalue("redis_url")
            server: RedisServer = request.getfixturevalue("redis_server")
            return server.unix_url
        case "tls":
            request.getfixturevalue("redis_url")
            front: TlsFront = request.getfixturevalue("tls_front")
            return front.url
        case "acl":
            guarded: RedisServer = request.getfixturevalue("acl_redis")
            return guarded.url
        case _:
            cluster: RedisCluster = request.getfixturevalue("redis_cluster")
            return cluster.url


@pytest.fixture
def store(url: str) -> Iterator[BlockStore]:
    store = opened(url)
    yield store
    store.close()


@pytest.fixture
def tcp_store(redis_url: str) -> Iterator[BlockStore]:
    store = opened(redis_url)
    yield store
    store.close()


@pytest.fixture
def own_store(own_redis: RedisServer) -> Iterator[BlockStore]:
    store = opened(own_redis.url)
    yield store
    store.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_blocks_come_back_bit_for_bit_and_absent_ones_are_told(store: BlockStore) -> None:
    store.put(stored(*range(20)))
    fetches = wanted(*range(25))
    assert fetch(store, fetches) == [Fetched.HIT] * 20 + [Fetched.ABSENT] * 5
    for number, asked in enumerate(fetches[:20]):
        assert asked.into == payload(number)
    assert all(set(asked.into.tobytes()) == {0xA5} for asked in fetches[20:])


def test_a_tenants_blocks_of_every_model_and_fidelity_are_erased_and_no_others(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "_PAGE_KEYS", 2)  # many pages of few blocks
    kinds = [(model, fidelity) for model in (b"model", b"another") for fidelity in ("", LADDER)]
    mine, theirs = (
        [chain(root_hash(model, tenant, fidelity), [number]) for model, fidelity in kinds for number in range(3)]
        for tenant in ("acme", "other")
    )
    one = stored(0)[0]
    store.put([replace(one, block=block) for block in (*mine, *theirs)])
    assert store.erase(tenant_mark("acme")) == len(mine)
    assert store.erase(tenant_mark("acme")) == store.erase(tenant_mark("nobody")) == 0
    assert not any(store.which(mine))
    assert all(store.which(theirs))
    elsewhere = chain(mine[0], [7])  # what a machine that is down may have kept
    assert store.deleted([mine[0], elsewhere, theirs[0]]) == [True, True, False]


def test_nothing_asked_is_nothing_done(store: BlockStore) -> None:
    store.put([])
    assert fetch(store, []) == []
    assert store.which([]) == []
    assert store.delete([]) == store.retain([], ttl_s=1) == 0


def test_a_block_put_again_is_replaced(store: BlockStore) -> None:
    store.put(stored(1, ttl_s=0))
    store.put([Store(name(1), 256, memoryview(payload(2)), 0)])
    [asked] = wanted(1)
    assert fetch(store, [asked]) == [Fetched.HIT]
    assert asked.into == payload(2)


def test_a_payload_of_any_length_comes_back_with_its_codec_and_leaves_the_rest_of_the_buffer(store: BlockStore) -> None:
    sizes = {LOSSLESS: LAYOUT.block_bytes, INT8: 200_001, K8V4: 70_000, INT4: 1}
    for place, (codec, size) in enumerate(sizes.items()):
        part = memoryview(payload(place))[:size]
        store.put([Store(name(place), 256, part, 100, codec=codec, first_position=256 * place, fidelity=LADDER)])
    fetches = [
        replace(asked, fidelity=LADDER, first_position=256 * place) for place, asked in enumerate(wanted(*range(4)))
    ]
    landed: dict[int, Encoding | None] = {}
    store.get(fetches, lambda index, _, encoding: landed.update({index: encoding}), deadline_s=time.monotonic() + 10)
    assert {place: encoding[:2] for place, encoding in landed.items() if encoding is not None} == {
        place: (codec, size) for place, (codec, size) in enumerate(sizes.items())
    }
    for place, size in enumerate(sizes.values()):
        assert fetches[place].into[:size] == payload(place)[:size]
        encoding = landed[place]
        assert encoding is not None
        assert encoding.checksum in (None, xxhash.xxh3_64_intdigest(payload(place)[:size]))
        assert set(fetches[place].into[size:]) <= {0xA5}
    assert store.stats().bytes_put == store.stats().bytes_got == sum(sizes.values())


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"codec": INT8}, Fetched.FOREIGN),
        ({"codec": INT8, "fidelity": "int8"}, Fetched.FOREIGN),
        ({"codec": LOSSLESS, "first_position": 256}, Fetched.CORRUPT),
    ],
    ids=["lossy", "lossy and says so", "from elsewhere in a conversation"],
)
def test_what_a_name_does_not_promise_is_a_miss(
    store: BlockStore, changes: dict[str, object], outcome: Fetched
) -> None:
    store.put(stored(0, 2))
    store.put([replace(stored(1)[0], payload=memoryview(payload(1))[:1000], **changes)])  # type: ignore[arg-type]
    assert fetch(store, wanted(0, 1, 2)) == [Fetched.HIT, outcome, Fetched.HIT]


def test_which_and_delete_agree(store: BlockStore) -> None:
    store.put(stored(0, 1, 2, 3))
    names = [name(number) for number in range(6)]
    assert store.which(names) == [True] * 4 + [False] * 2
    assert store.delete(names[2:]) == 2
    assert store.which(names) == [True] * 2 + [False] * 4
    assert store.delete(names[2:]) == 0
    assert store.deleted(names) == [False, False, *[True] * (len(names) - 2)]
    store.put(stored(2))
    assert store.deleted(names)[2], "another worker's copy may be older"


def test_blocks_kept_for_a_second_are_gone_after_it(store: BlockStore) -> None:
    store.put(stored(1, ttl_s=1) + stored(2, 3, ttl_s=0))
    assert store.retain([name(3), name(4)], ttl_s=1) == 1
    eventually(lambda: store.which([name(1), name(2), name(3)]) == [False, True, False], within_s=3)


def test_a_retained_block_outlives_its_ttl(store: BlockStore) -> None:
    store.put(stored(1, 2, ttl_s=1) + stored(3, ttl_s=0))
    assert store.retain([name(1), name(3), name(4)], ttl_s=0) == 2, "pinned, or pinned already; not the absent one"
    eventually(lambda: not store.which([name(2)])[0], within_s=3)
    assert store.which([name(1), name(3)]) == [True, True]


def test_a_block_of_other_length_in_tokens_is_not_the_block(store: BlockStore) -> None:
    store.put(stored(1, num_tokens=7))
    assert fetch(store, wanted(1, num_tokens=8)) == [Fetched.CORRUPT]
    store.put(stored(1, num_tokens=7))
    assert fetch(store, wanted(1, num_tokens=7)) == [Fetched.HIT]


def test_a_block_that_nobody_wants_when_its_turn_comes_is_not_asked_for(store: BlockStore) -> None:
    store.put(stored(*range(12)))
    kept = set(range(12)) - {0, 3, 4, 5, 11}
    fetches = [
        replace(asked, wanted=partial(kept.__contains__, number)) for number, asked in enumerate(wanted(*range(12)))
    ]
    outcomes = fetch(store, fetches)
    assert [number for number, outcome in enumerate(outcomes) if outcome is Fetched.SKIPPED] == [0, 3, 4, 5, 11]
    for number, (asked, outcome) in enumerate(zip(fetches, outcomes, strict=True)):
        if number in kept:
            assert outcome is Fetched.HIT
            assert asked.into == payload(number)
        else:
            assert set(asked.into.tobytes()) == {0xA5}
    assert store.stats().blocks_got == 7
    assert fetch(store, wanted(0, 11)) == [Fetched.HIT] * 2, "the connections are as good as before"


def test_what_is_wanted_is_asked_as_late_as_can_be(store: BlockStore) -> None:
    """One who computes from the front while blocks arrive stops the reading in mid-way."""
    store.put(stored(*range(12)))
    landed: dict[int, Fetched] = {}
    fetches = [replace(asked, wanted=lambda: len(landed) < 5) for asked in wanted(*range(12))]

    def land(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
        landed[index] = outcome

    store.get(fetches, land, deadline_s=time.monotonic() + 10)
    assert len(landed) == 12
    skipped = sum(outcome is Fetched.SKIPPED for outcome in landed.values())
    assert skipped >= 12 - 5 - 9, "no more than what was on its way from each of three nodes"
    assert all(outcome in (Fetched.HIT, Fetched.SKIPPED) for outcome in landed.values())


def test_a_stalled_server_is_not_waited_for_where_nothing_is_wanted(
    own_redis: RedisServer, own_store: BlockStore
) -> None:
    own_store.put(stored(1, 2))
    own_redis.pause()
    unwanted = [replace(asked, wanted=lambda: False) for asked in wanted(1, 2)]
    assert fetch(own_store, unwanted) == [Fetched.SKIPPED] * 2
    own_redis.resume()
    assert fetch(own_store, wanted(1, 2)) == [Fetched.HIT] * 2


def test_a_deadline_already_passed_makes_every_block_late(store: BlockStore) -> None:
    store.put(stored(0, 1))
    assert fetch(store, wanted(0, 1), within_s=-1) == [Fetched.LATE] * 2
    assert fetch(store, wanted(0, 1)) == [Fetched.HIT] * 2, "and the store is as good as before"
    assert store.available()


def test_counters_say_what_was_moved(store: BlockStore) -> None:
    store.put(stored(0, 1, 2))
    fetch(store, wanted(0, 1, 5))
    stats = store.stats()
    assert (stats.blocks_put, stats.bytes_put) == (3, 3 * LAYOUT.block_bytes)
    assert (stats.blocks_got, stats.bytes_got) == (2, 2 * LAYOUT.block_bytes)
    assert stats.put_s > 0
    assert stats.get_s > 0
    assert (stats.corrupt, stats.foreign) == (0, 0)


def test_info_tells_what_is_used(store: BlockStore) -> None:
    store.put(stored(0, 1, 2))
    info = store.info()
    assert info.used_bytes >= 3 * LAYOUT.block_bytes
    assert info.eviction_policy == "noeviction"


def test_threads_share_a_store(store: BlockStore) -> None:
    store.put(stored(*range(8)))
    wrong: list[str] = []

    def work(first: int) -> None:
        for turn in range(5):
            store.put(stored(100 + first))
            fetches = wanted(*range(first, 8), 100 + first)
            if fetch(store, fetches) != [Fetched.HIT] * len(fetches):
                wrong.append(f"thread {first} missed in turn {turn}")
            if fetches[0].into != payload(first) or fetches[-1].into != payload(100 + first):
                wrong.append(f"thread {first} got other bytes in turn {turn}")

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_store_forgets_by_its_clock() -> None:
    clock = [0.0]
    store = MemoryBlockStore(refresh_ttl_s=50, now=lambda: clock[0])
    store.put(stored(1, 2, ttl_s=10))
    clock[0] = 9.0
    assert fetch(store, wanted(1)) == [Fetched.HIT]
    clock[0] = 11.0
    assert store.which([name(1), name(2)]) == [True, False]
    clock[0] = 60.0
    assert store.which([name(1)]) == [False]


@pytest.mark.parametrize(
    ("damage", "outcome"),
    [
        (lambda value: value[:-1], Fetched.CORRUPT),
        (lambda value: value[: len(value) // 2], Fetched.CORRUPT),
        (lambda value: value[:HEADER_BYTES], Fetched.CORRUPT),
        (lambda value: value[:10], Fetched.CORRUPT),
        (lambda value: b"", Fetched.CORRUPT),
        (lambda value: value + b"x", Fetched.CORRUPT),
        (lambda value: value[:5] + bytes([value[5] ^ 1]) + value[6:], Fetched.FOREIGN),
        (lambda value: value[:20] + bytes([value[20] ^ 1]) + value[21:], Fetched.CORRUPT),
        (lambda value: value[:-9] + bytes([value[-9] ^ 128]) + value[-8:], Fetched.CORRUPT),
        (lambda value: b"x" * len(value), Fetched.CORRUPT),
        (lambda value: b"x" * (1 << 20), Fetched.CORRUPT),
    ],
    ids=[
        "a byte short",
        "half",
        "header alone",
        "half a header",
        "empty",
        "a byte too long",
        "another version",
        "a bit of the header flipped",
        "a bit of the payload flipped",
        "not ours",
        "not ours and long",
    ],
)
def test_a_damaged_block_is_told_and_deleted_and_its_neighbours_are_not(
    tcp_store: BlockStore, client: redis.Redis, damage: Callable[[bytes], bytes], outcome: Fetched
) -> None:
    tcp_store.put(stored(0, 1, 2))
    value = client.get(key(1))
    assert isinstance(value, bytes)
    client.set(key(1), damage(value))
    fetches = wanted(0, 1, 2)
    assert fetch(tcp_store, fetches) == [Fetched.HIT, outcome, Fetched.HIT]
    assert fetches[0].into == payload(0)
    assert fetches[2].into == payload(2)
    assert tcp_store.stats().corrupt + tcp_store.stats().foreign == 1
    if outcome is Fetched.CORRUPT:
        assert not client.exists(key(1))
    assert client.exists(key(0), key(2)) == 2


def test_a_whole_block_under_another_blocks_name_is_refused(tcp_store: BlockStore, client: redis.Redis) -> None:
    tcp_store.put(stored(0))
    client.rename(key(0), key(1))
    assert fetch(tcp_store, wanted(1)) == [Fetched.CORRUPT]


def test_a_key_of_another_type_is_a_miss(tcp_store: BlockStore, client: redis.Redis) -> None:
    tcp_store.put(stored(0, 2))
    client.rpush(key(1), "x")
    assert fetch(tcp_store, wanted(0, 1, 2)) == [Fetched.HIT, Fetched.UNAVAILABLE, Fetched.HIT]


def test_an_absurdly_long_value_is_not_read_to_its_end(tcp_store: BlockStore, client: redis.Redis) -> None:
    tcp_store.put(stored(0))
    client.setrange(key(1), 65 << 20, "x")
    assert fetch(tcp_store, wanted(0, 1)) == [Fetched.HIT, Fetched.CORRUPT]
    assert not client.exists(key(1))
    assert fetch(tcp_store, wanted(0)) == [Fetched.HIT]


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": b"another model"},
        {"layout": KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=128, dtype="float32")},
        {"layout": KVLayout(num_layers=4, num_kv_heads=1, head_dim=64, block_tokens=256, dtype="float32")},
        {"layout": KVLayout(num_layers=2, num_kv_heads=2, head_dim=128, block_tokens=256, dtype="bfloat16")},
    ],
    ids=["model", "length", "shape of equal length", "dtype of equal length"],
)
def test_a_block_of_another_model_is_foreign_and_left_alone(
    tcp_store: BlockStore, client: redis.Redis, redis_url: str, other: dict[str, object]
) -> None:
    writer = opened(redis_url, **other)  # type: ignore[arg-type]
    layout = other.get("layout", LAYOUT)
    assert isinstance(layout, KVLayout)
    writer.put([Store(name(1), 100, memoryview(bytes(layout.block_bytes)), 0)])
    writer.close()
    assert fetch(tcp_store, wanted(1, num_tokens=100)) == [Fetched.FOREIGN]
    assert tcp_store.stats().foreign == 1
    assert client.exists(key(1))


def test_blocks_used_live_on_and_pinned_ones_stay_pinned(redis_url: str, client: redis.Redis) -> None:
    store = opened(redis_url, refresh_ttl_s=REFRESH_TTL_S)
    store.put(stored(0, 1, ttl_s=10) + stored(2, ttl_s=0) + stored(3, ttl_s=5000))
    fetch(store, wanted(0, 2, 3))
    eventually(lambda: client.ttl(key(0)) > 900)
    assert client.ttl(key(1)) <= 10, "not used"
    assert client.ttl(key(2)) == -1, "pinned"
    assert client.ttl(key(3)) > 4900, "never shortened"
    store.close()


def test_cluster_blocks_are_found_again_after_their_slot_has_moved(redis_cluster: RedisCluster) -> None:
    store = opened(redis_cluster.url)
    store.put(stored(*range(8)))
    with redis_cluster.moving(key(3)) as move:
        assert fetch(store, wanted(*range(8))) == [Fetched.HIT] * 8
        move.keys()
        assert fetch(store, wanted(*range(8))) == [Fetched.HIT] * 8, "asked once at the new node"
        store.put(stored(3))
        move.slot()
        fetches = wanted(*range(8))
        assert fetch(store, fetches) == [Fetched.HIT] * 8, "moved"
        assert [asked.into == payload(number) for number, asked in enumerate(fetches)] == [True] * 8
        assert store.delete([name(number) for number in range(8)]) == 8
    store.close()


@pytest.mark.parametrize("stalled", range(3))
def test_nodes_are_read_side_by_side_so_that_one_that_stalls_holds_up_no_other(
    redis_cluster: RedisCluster, stalled: int
) -> None:
    store = opened(redis_cluster.url)
    store.put(stored(*range(24)))
    with redis.Redis.from_url(redis_cluster.nodes[stalled].url) as node:
        theirs = {
            number
            for number in range(24)
            if node.execute_command("CLUSTER", "COUNTKEYSINSLOT", key_slot(key(number).encode()))
        }
    assert 0 < len(theirs) < 24
    redis_cluster.nodes[stalled].pause()
    try:
        outcomes = fetch(store, wanted(*range(24)), within_s=0.8)
    finally:
        redis_cluster.nodes[stalled].resume()
        store.close()
    assert {number for number, outcome in enumerate(outcomes) if outcome is Fetched.LATE} == theirs
    assert set(outcomes) == {Fetched.HIT, Fetched.LATE}


def test_a_server_killed_in_mid_get_makes_the_rest_unavailable(own_redis: RedisServer, own_store: BlockStore) -> None:
    own_store.put(stored(*range(30)))
    outcomes: list[Fetched] = []

    def land(index: int, outcome: Fetched, encoding: Encoding | None) -> None:
        outcomes.append(outcome)
        if index == 5:
            own_redis.kill()

    own_store.get(wanted(*range(30)), land, deadline_s=time.monotonic() + 10)
    assert outcomes[:6] == [Fetched.HIT] * 6
    assert outcomes[-20:] == [Fetched.UNAVAILABLE] * 20
    with pytest.raises(StoreUnavailable):
        own_store.put(stored(1))


def test_a_stalled_server_makes_blocks_late_by_the_deadline(own_redis: RedisServer, own_store: BlockStore) -> None:
    own_store.put(stored(0, 1))
    own_redis.pause()
    start = time.monotonic()
    assert fetch(own_store, wanted(0, 1), within_s=0.3) == [Fetched.LATE] * 2
    assert time.monotonic() - start < 0.6
    own_redis.resume()
    assert fetch(own_store, wanted(0, 1)) == [Fetched.HIT] * 2


def test_a_short_deadline_says_nothing_about_the_server(own_redis: RedisServer, own_store: BlockStore) -> None:
    own_redis.pause()
    for _ in range(5):
        assert fetch(own_store, wanted(0), within_s=0.05) == [Fetched.LATE], "connecting, this time"
    assert own_store.available()
    own_redis.resume()


def test_a_stalled_server_is_given_up_before_a_far_deadline(own_redis: RedisServer, own_store: BlockStore) -> None:
    own_store.put(stored(0, 1))
    own_redis.pause()
    start = time.monotonic()
    assert fetch(own_store, wanted(0, 1), within_s=60) == [Fetched.LATE] * 2
    assert time.monotonic() - start < TIMEOUT_S + 0.5
    with pytest.raises(StoreUnavailable):
        own_store.put(stored(2))
    with pytest.raises(StoreUnavailable):
        own_store.which([name(0)])
    assert not own_store.available(), "three failures in a row"
    start = time.monotonic()
    assert fetch(own_store, wanted(0, 1), within_s=60) == [Fetched.UNAVAILABLE] * 2
    assert time.monotonic() - start < 0.1, "an open breaker costs nothing"
    own_redis.resume()
    eventually(own_store.available)
    assert fetch(own_store, wanted(0, 1)) == [Fetched.HIT] * 2


def test_a_store_goes_on_when_its_server_is_back(own_redis: RedisServer, own_store: BlockStore) -> None:
    own_store.put(stored(0))
    own_redis.kill()
    for _ in range(3):
        assert fetch(own_store, wanted(0)) == [Fetched.UNAVAILABLE]
    assert not own_store.available()
    with pytest.raises(StoreUnavailable):
        own_store.info()
    own_redis.restart()
    eventually(own_store.available)
    assert fetch(own_store, wanted(0)) == [Fetched.ABSENT]
    own_store.put(stored(0))
    assert fetch(own_store, wanted(0)) == [Fetched.HIT]


def test_a_server_restarted_between_two_calls_is_not_even_noticed(
    own_redis: RedisServer, own_store: BlockStore
) -> None:
    own_store.put(stored(0))
    own_redis.restart()
    own_store.put(stored(1))
    assert fetch(own_store, wanted(0, 1)) == [Fetched.ABSENT, Fetched.HIT]


def test_a_store_opened_before_its_server_works_once_there_is_one() -> None:
    server = RedisServer()
    try:
        server.start()
        server.stop()
        store = opened(server.url)
        eventually(lambda: not store.available())
        assert fetch(store, wanted(0)) == [Fetched.UNAVAILABLE]
        server.start()
        eventually(store.available)
        store.put(stored(0))
        assert fetch(store, wanted(0)) == [Fetched.HIT]
        store.close()
    finally:
        server.close()


def test_a_full_server_refuses_blocks_and_still_gives_those_it_has() -> None:
    with RedisServer(max_memory_bytes=16 << 20) as server:
        store = opened(server.url)
        store.put(stored(0, 1))
        with pytest.raises(StoreFull):
            store.put(stored(*range(2, 64)))
        assert fetch(store, wanted(0, 1)) == [Fetched.HIT] * 2
        assert store.available(), "full is not down"
        store.delete([name(number) for number in range(64)])
        store.put(stored(99))
        store.close()


def test_a_full_server_deletes_blocks_and_remembers_that_it_has(tcp_store: BlockStore, client: redis.Redis) -> None:
    tcp_store.put(stored(0, 1))
    client.config_set("maxmemory", 1)
    try:
        assert tcp_store.delete([name(0)]) == 1
        assert tcp_store.deleted([name(0), name(1)]) == [True, False]
    finally:
        client.config_set("maxmemory", 0)


def test_wrong_credentials_are_misses_not_crashes() -> None:
    with RedisServer(user=("worker", "right")) as server:
        store = opened(server.url.replace("right", "wrong"))
        assert fetch(store, wanted(0)) == [Fetched.UNAVAILABLE]
        with pytest.raises(StoreUnavailable):
            store.put(stored(0))
        store.close()


@pytest.mark.parametrize(("policy", "warns"), [("allkeys-lru", True), ("volatile-lru", False)])
def test_a_policy_that_evicts_conversations_is_warned_of(
    policy: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with RedisServer(eviction_policy=policy) as server:
        store = opened(server.url)
        store.put(stored(0))
        said = ""
        give_up = time.monotonic() + (5 if warns else 0.3)
        while "volatile-lru" not in said and time.monotonic() < give_up:
            said += capsys.readouterr().out
            time.sleep(0.01)
        store.close()
    assert ("session records" in said) is warns


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://localhost",
        "redis://localhost:port",
        "redis://localhost?no_such_option=1",
        "redis://localhost?db=x",
        "unix://",
        "memory://disk",
        "redis+cluster://localhost:port",
    ],
)
def test_a_bad_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        open_block_store(url, LAYOUT, b"model", timeout_s=1, refresh_ttl_s=0)
    assert refused.value.field == "redis_url"


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret/more@host:6379",
        "redis+cluster://user:s3cret/more@host:6379",
        "redis+sentinel://user:s3cret/host",
        "http://user:s3cret@host",
    ],
)
def test_a_bad_url_is_refused_without_its_password(url: str) -> None:
    for opened in (
        lambda: open_records(url),
        lambda: open_block_store(url, LAYOUT, b"model", timeout_s=1, refresh_ttl_s=0),
    ):
        with pytest.raises(InvalidRequest) as refused:
            opened()
        assert "s3cret" not in "".join(traceback.format_exception(refused.value))


def test_no_url_is_no_store() -> None:
    assert open_block_store("", LAYOUT, b"model", timeout_s=1, refresh_ttl_s=0) is None
