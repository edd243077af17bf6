"""Sealed blocks in Redis, on disk and while they age: nobody without the key reads, changes or moves one unseen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cache_store.codecs import INT8, LADDER, LOSSLESS
from cache_store.disk_tier import DiskTier, open_disk_tier
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import HEADER_BYTES, Framer
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.layout import KVLayout
from cache_store.open_store import open_block_store
from cache_store.sealing import SEAL_BYTES, TAG_BYTES, Keyring, MasterKey, Purpose
from cache_store.store import BlockStore, Encoding, Fetch, Fetched, Held, Idle, Payload, Store
from tests.keyrings import keyring
from tests.test_ageing import idle_s, make_idle
from tests.test_block_store import fetch

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="bfloat16")
MODEL = b"weights and config"


def name(number: int, tenant: str = "a", fidelity: str = "") -> BlockHash:
    return chain(root_hash(MODEL, tenant, fidelity), [number])


def key(number: int, tenant: str = "a", fidelity: str = "") -> str:
    return f"rekindle:b:{name(number, tenant, fidelity).hex()}"


def payload(number: int) -> bytes:
    return bytes((number * 31 + 7 * i) % 251 for i in range(LAYOUT.block_bytes))


def stored(number: int, tenant: str = "a") -> Store:
    return Store(name(number, tenant), 16, memoryview(payload(number)), 100, tenant=tenant)


def wanted(number: int, tenant: str = "a") -> Fetch:
    return Fetch(name(number, tenant), 16, memoryview(bytearray(LAYOUT.block_bytes)), tenant=tenant)


def framer(ring: Keyring | None = None) -> Framer:
    return Framer(LAYOUT, MODEL, (ring or keyring()).sealer(Purpose.BLOCKS))


@contextmanager
def store_at(url: str, ring: Keyring | None = None) -> Iterator[BlockStore]:
    sealer = ring.sealer(Purpose.BLOCKS) if ring is not None else None
    store = open_block_store(url, LAYOUT, MODEL, timeout_s=2.0, refresh_ttl_s=0, sealer=sealer)
    assert store is not None
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(redis_url: str) -> Iterator[BlockStore]:
    with store_at(redis_url, keyring()) as store:
        yield store


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def value_at(client: redis.Redis, key: str) -> bytes:
    value = client.get(key)
    assert isinstance(value, bytes)
    return value


VALUE = b"".join(framer().value(stored(1)))


def read(value: bytes, asked: Fetch | None = None) -> bytes:
    """As a store does."""
    asked, judge = asked or wanted(1), framer()
    body = judge.body(value[: judge.header_bytes], asked, value_bytes=len(value))
    rest = memoryview(value)[judge.header_bytes :]
    body.target[:] = rest[: len(body.target)]
    body.seen(body.target)
    body.finish(bytes(rest[len(body.target) :]))
    return asked.into.tobytes()


def test_a_sealed_value_is_read_again() -> None:
    assert read(VALUE) == payload(1)


@given(bit=st.integers(0, 8 * len(VALUE) - 1), sums_right=st.booleans())
def test_no_bit_of_a_sealed_value_can_flip_even_where_the_headers_checksum_is_made_right(
    bit: int, sums_right: bool
) -> None:
    value = bytearray(VALUE)
    value[bit // 8] ^= 1 << bit % 8
    if sums_right and bit // 8 < HEADER_BYTES - 8:
        value[HEADER_BYTES - 8 : HEADER_BYTES] = header_checksum(name(1), bytes(value))
    with pytest.raises((BlockCorrupt, BlockForeign)):
        read(bytes(value))


@given(junk=st.binary(max_size=HEADER_BYTES + SEAL_BYTES + 100))
def test_junk_behind_a_right_header_is_refused(junk: bytes) -> None:
    with pytest.raises((BlockCorrupt, BlockForeign)):
        read(VALUE[:HEADER_BYTES] + junk)


def header_checksum(block: BlockHash, value: bytes) -> bytes:
    """As anybody can compute it: no secret is in it."""
    return xxhash.xxh3_64_intdigest(block + value[: HEADER_BYTES - 8]).to_bytes(8, "little")


def test_nothing_of_a_block_is_in_redis(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1), stored(2, "tenant-by-name")])
    for number, tenant in ((1, "a"), (2, "tenant-by-name")):
        value = value_at(client, key(number, tenant))
        content = payload(number)
        assert len(value) == HEADER_BYTES + SEAL_BYTES + len(content) + TAG_BYTES
        assert not any(content[at : at + 8] in value for at in range(len(content) - 8))
        assert xxhash.xxh3_64_intdigest(content).to_bytes(8, "little") not in value, (
            "it would tell a guess from another"
        )
        assert b"tenant-by-name" not in value


def test_swapped_blocks_are_both_corrupt_and_deleted(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1), stored(2), stored(3)])
    one, two = value_at(client, key(1)), value_at(client, key(2))
    client.set(key(1), two)
    client.set(key(2), one)
    assert fetch(store, [wanted(1), wanted(2), wanted(3)]) == [Fetched.CORRUPT, Fetched.CORRUPT, Fetched.HIT]
    assert not client.exists(key(1), key(2))


def test_a_block_moved_with_its_header_made_right_is_corrupt_all_the_same(
    store: BlockStore, client: redis.Redis
) -> None:
    store.put([stored(1)])
    value = value_at(client, key(1))
    forged = value[: HEADER_BYTES - 8] + header_checksum(name(2), value) + value[HEADER_BYTES:]
    client.set(key(2), forged)
    assert fetch(store, [wanted(2)]) == [Fetched.CORRUPT]


def test_another_tenants_block_is_not_read_whatever_its_name(store: BlockStore, client: redis.Redis) -> None:
    store.put([stored(1, "b")])
    value = value_at(client, key(1, "b"))
    client.set(key(1), value[: HEADER_BYTES - 8] + header_checksum(name(1), value) + value[HEADER_BYTES:])
    assert fetch(store, [wanted(1)]) == [Fetched.FOREIGN]


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (None, keyring()),
        (keyring(), None),
        (keyring("other"), keyring()),
        (Keyring([MasterKey("2026", bytes(32))], names=bytes(32)), keyring()),
    ],
    ids=["plain to who has keys", "sealed to who has none", "another key", "another key of the same id"],
)
def test_what_is_not_sealed_with_our_keys_is_a_miss_and_left_to_whom_it_belongs(
    redis_url: str, client: redis.Redis, writer: Keyring | None, reader: Keyring | None
) -> None:
    with store_at(redis_url, writer) as theirs, store_at(redis_url, reader) as ours:
        theirs.put([stored(1)])
        assert fetch(ours, [wanted(1)]) == [Fetched.FOREIGN]
        assert fetch(theirs, [wanted(1)]) == [Fetched.HIT]
        ours.put([stored(1)])
        assert fetch(ours, [wanted(1)]) == [Fetched.HIT]


def test_keys_rotate_without_a_miss(redis_url: str) -> None:
    old, adding, rotated = (keyring(*ids) for ids in (("1",), ("1", "2"), ("2", "1")))
    with (
        store_at(redis_url, old) as first,
        store_at(redis_url, adding) as second,
        store_at(redis_url, rotated) as third,
    ):
        for number, writer in enumerate((first, second, third)):
            writer.put([stored(number)])
        for reader in (second, third):
            assert fetch(reader, [wanted(number) for number in range(3)]) == [Fetched.HIT] * 3
        assert fetch(first, [wanted(2)]) == [Fetched.FOREIGN], "2 seals before all know it: a miss, and no more"


def test_sealed_blocks_age_for_their_tenant_under_their_key(redis_url: str, client: redis.Redis) -> None:
    block, full = name(1, "a", LADDER), payload(1)
    content = Store(block, 16, memoryview(full), 100, LOSSLESS, 0, LADDER, tenant="a")
    with store_at(redis_url, keyring("1")) as writer, store_at(redis_url, keyring("2", "1")) as ager:
        writer.put([content])
        make_idle(client, key(1, "a", LADDER), 700)
        shelf = ager.ageing()
        assert shelf is not None
        [[idle]] = [page for page in shelf.idle() if page]
        exchanged = shelf.exchange(idle, halved)
        assert exchanged is not None
        assert exchanged.held.payload == full
        assert idle_s(client, key(1, "a", LADDER)) >= 699
        asked = replace(wanted(1), block=block, fidelity=LADDER)
        assert fetch(writer, [asked]) == [Fetched.HIT], "under the key that it had"
        assert asked.into[: len(full) // 2] == full[::2]


def test_an_ager_leaves_a_block_that_it_has_no_key_for_as_it_is(redis_url: str, client: redis.Redis) -> None:
    block = name(1, "a", LADDER)
    with store_at(redis_url, keyring("1")) as writer, store_at(redis_url, keyring("2")) as ager:
        writer.put([Store(block, 16, memoryview(payload(1)), 100, LOSSLESS, 0, LADDER, tenant="a")])
        before = value_at(client, key(1, "a", LADDER))
        shelf = ager.ageing()
        assert shelf is not None
        with pytest.raises(BlockForeign, match="'1', which is not here"):
            shelf.exchange(Idle(block, 0.0, 0.0), halved)
        assert value_at(client, key(1, "a", LADDER)) == before


def halved(held: Held) -> Payload:
    return Payload(INT8, memoryview(bytes(held.payload[::2])))


@contextmanager
def disk_at(folder: Path, ring: Keyring | None = None) -> Iterator[DiskTier]:
    tier = open_disk_tier(folder, framer(ring), capacity_bytes=1 << 20, max_queued=8)
    assert tier is not None
    try:
        yield tier
        tier.check()
    finally:
        tier.close(flush_s=5)


def keep(disk: DiskTier, *numbers: int) -> None:
    for number in numbers:
        disk.offer(stored(number), lambda: None)
    assert disk.settled(timeout_s=5)


def test_a_disk_keeps_sealed_blocks_and_finds_them_again(tmp_path: Path) -> None:
    with disk_at(tmp_path) as disk:
        keep(disk, 1, 2)
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert disk.stats().used_bytes == sum(map(len, files)) > 0
        assert not any(payload(number)[at : at + 8] in file for number in (1, 2) for at in range(500) for file in files)
    with disk_at(tmp_path, keyring("2027", "2026")) as again:
        asked = wanted(1)
        assert isinstance(again.read(asked), Encoding)
        assert asked.into == payload(1)


def test_files_swapped_on_disk_are_both_corrupt(tmp_path: Path) -> None:
    with disk_at(tmp_path) as disk:
        keep(disk, 1, 2)
        one, two = (next(tmp_path.rglob(name(number).hex())) for number in (1, 2))
        one.rename(tmp_path / "between")
        two.rename(one)
        (tmp_path / "between").rename(two)
        assert [disk.read(wanted(1)), disk.read(wanted(2))] == [Fetched.CORRUPT, Fetched.CORRUPT]
