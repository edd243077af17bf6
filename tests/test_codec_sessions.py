"""Sessions of every codec leave the device and come back: exact ones bit for bit, lossy ones encoded once, unmixed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from redis import Redis

from cache_store.codecs import INT8, LADDER, LOSSLESS, RAW, SESSION_CODECS, CodecInfo, fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.frame import HEADER_BYTES, Framer
from cache_store.ids import BlockHash, root_hash
from cache_store.open_store import open_block_store
from cache_store.store import Store
from tests import tiny_models
from tests.engines import TENANT, EngineFactory, Turn, generate, poison, start
from worker.calls import MissReason, Token
from worker.engine.engine import Engine
from worker.engine.prefix import Wanted, wanted_by_history

PROMPT = tuple(range(5, 105))
SECOND = (7, 7, 9, 11, 2)
BLOCK = 16
LOSSY = ("int8", "k8v4", "int4")


@pytest.fixture
def engine(build_engine: EngineFactory, own_redis: RedisServer) -> Engine:
    return build_engine(redis_url=own_redis.url)


@pytest.fixture
def client(own_redis: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(own_redis.url) as client:
        yield client


def blocks_of(engine: Engine, history: Sequence[int], codec: str) -> list[Wanted]:
    return wanted_by_history(root_hash(engine.fingerprint, TENANT, fidelity_of(codec)), history, BLOCK)


def key(name: BlockHash) -> str:
    return f"rekindle:b:{name.hex()}"


def kv_of(engine: Engine, want: Wanted) -> torch.Tensor | None:
    """What the device has of a block."""
    block = engine._pool.find(want.name)
    return None if block is None else engine._tiers.device.view(block)[:, :, :, : want.content_tokens].clone()


def all_kv(engine: Engine, history: Sequence[int], codec: str) -> list[torch.Tensor]:
    found = [kv_of(engine, want) for want in blocks_of(engine, history, codec)]
    assert all(kv is not None for kv in found)
    return [kv for kv in found if kv is not None]


def first_turn(engine: Engine, codec: str) -> tuple[int, ...]:
    """A history of six full blocks and an unfull one, on the device and on its way below."""
    return (*PROMPT, *generate(engine, (), PROMPT, codec=codec).reply)


def park(engine: Engine, history: Sequence[int], codec: str, *, drop_host: bool = True) -> int:
    """Off the device, with poison where it lay; the tokens that Redis has."""
    report = engine.park(TENANT, history, codec=codec, drop_host=drop_host, ttl_s=60).result(30)
    poison(engine)
    return report.redis_tokens


def encoded(engine: Engine, codec: str) -> int:
    """Blocks that left the device in a codec."""
    return sum(
        moved.blocks
        for moved in engine.stats().moved
        if (moved.source, moved.target, moved.codec) == ("device", "host", codec)
    )


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Bit for bit: NaN is NaN."""
    return all(
        torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_exact_sessions_come_back_bit_for_bit_and_reply_as_if_they_had_stayed(
    architecture: str, codec: str, dtype: str, tmp_path: Path, build_engine: EngineFactory, redis_url: str
) -> None:
    checkpoint = str(tiny_models.save_tiny_model(tmp_path / architecture, architecture))
    engine = build_engine(model=checkpoint, dtype=dtype, redis_url=redis_url)
    inputs = [PROMPT[:37], SECOND, PROMPT[50:80]]
    hot: tuple[int, ...] = ()
    for new in inputs:
        hot = (*hot, *new, *generate(engine, hot, new).reply)
    engine.drop(TENANT, hot, with_redis=True).result(30)
    history: tuple[int, ...] = ()
    for new in inputs:
        history = (*history, *new, *generate(engine, history, new, codec=codec).reply)
        before = all_kv(engine, history, codec)
        assert park(engine, history, codec) == len(history) - 1
        assert engine.warm(TENANT, history, codec=codec).result(30).restored_tokens == len(history) - 1
        assert same(all_kv(engine, history, codec), before)
    assert history == hot


@pytest.mark.parametrize("drop_host", [True, False], ids=["redis", "host"])
@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_sessions_come_back_nearly_the_same_and_their_unfull_block_exactly(
    engine: Engine, codec: str, drop_host: bool
) -> None:
    history = first_turn(engine, codec)
    *before, tail_before = all_kv(engine, history, codec)
    assert park(engine, history, codec, drop_host=drop_host) == len(history) - 1
    assert engine.warm(TENANT, history, codec=codec).result(30).restored_tokens == len(history) - 1
    *after, tail = all_kv(engine, history, codec)
    assert same([tail], [tail_before])
    for kv, original in zip(after, before, strict=True):
        assert 0 < float((kv - original).norm() / original.norm()) < 0.2


@pytest.mark.parametrize("codec", SESSION_CODECS)
def test_receipts_count_the_bytes_that_were_moved(engine: Engine, client: Redis, codec: str) -> None:
    history = first_turn(engine, codec)
    report = engine.park(TENANT, history, codec=codec, drop_host=True, ttl_s=60).result(30)
    wanted = blocks_of(engine, history, codec)
    stored = sum(client.strlen(key(want.name)) - HEADER_BYTES for want in wanted)
    assert (stored < len(wanted) * engine.layout.block_bytes) == (codec != "raw")
    assert 0 < report.bytes_stored <= stored
    turn = generate(engine, history, SECOND, codec=codec)
    assert turn.receipt.redis_tokens == len(history) - 1
    assert turn.receipt.restored_bytes == stored
    moved = [moved for moved in engine.stats().moved if (moved.source, moved.target) == ("redis", "host")]
    assert sum(move.bytes for move in moved) == stored
    assert sum(move.raw_bytes for move in moved) == len(wanted) * engine.layout.block_bytes


@pytest.mark.parametrize(
    ("session", "full", "unfull"),
    [
        ("raw", RAW, RAW),
        ("lossless", LOSSLESS, LOSSLESS),
        ("int8", INT8, LOSSLESS),
        ("ladder", LOSSLESS, LOSSLESS),
    ],
)
def test_blocks_say_what_they_are_in_and_where_they_stood(
    engine: Engine, client: Redis, session: str, full: CodecInfo, unfull: CodecInfo
) -> None:
    history = first_turn(engine, session)
    park(engine, history, session)
    framer = Framer(engine.layout, engine.fingerprint)
    wanted = blocks_of(engine, history, session)
    for want in wanted:
        value = client.get(key(want.name))
        assert isinstance(value, bytes)
        frame = framer.read(value[:HEADER_BYTES], block=want.name, value_bytes=len(value))
        assert frame.codec is (full if want.content_tokens == BLOCK else unfull)
        assert frame.first_position == want.index * BLOCK
        assert frame.fidelity_kind == {"int8": 1, "ladder": 2}.get(session, 0)


def test_the_first_rung_of_a_ladder_is_what_its_blocks_leave_the_device_in(
    build_engine: EngineFactory, own_redis: RedisServer
) -> None:
    engine = build_engine(redis_url=own_redis.url, codec_ladder="int8,int4@60")
    history = first_turn(engine, LADDER)
    park(engine, history, LADDER)
    assert encoded(engine, "int8") == len(history) // BLOCK
    assert encoded(engine, "lossless") == 1


@pytest.mark.parametrize(("writes", "reads"), [("raw", "lossless"), ("lossless", "raw")])
def test_exact_sessions_share_their_blocks(engine: Engine, writes: str, reads: str) -> None:
    history = first_turn(engine, writes)
    before = all_kv(engine, history, writes)
    park(engine, history, writes)
    assert engine.warm(TENANT, history, codec=reads).result(30).restored_tokens == len(history) - 1
    assert same(all_kv(engine, history, reads), before)


@pytest.mark.parametrize(
    ("writes", "reads"), [("int8", "raw"), ("int8", "lossless"), ("raw", "int8"), ("int8", "int4"), ("ladder", "int8")]
)
def test_sessions_of_unlike_fidelity_share_nothing_in_any_tier(engine: Engine, writes: str, reads: str) -> None:
    history = first_turn(engine, writes)
    for _ in ("hot", "in Redis and the host tier"):
        turn = generate(engine, history, (1,), codec=reads, max_new_tokens=1)
        assert turn.receipt.computed_tokens == len(history) + 1
        engine.drop(TENANT, (*history, 1, *turn.reply), codec=reads, with_redis=True).result(30)
        park(engine, history, writes, drop_host=False)


def plant(engine: Engine, redis: RedisServer, store: Store) -> None:
    others = open_block_store(redis.url, engine.layout, engine.fingerprint, timeout_s=2, refresh_ttl_s=60)
    assert others is not None
    others.put([store])
    others.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codec": INT8}, MissReason.FOREIGN),
        ({"codec": INT8, "fidelity": "int8"}, MissReason.FOREIGN),
        ({"codec": LOSSLESS, "fidelity": "ladder"}, MissReason.FOREIGN),
        ({"codec": CodecInfo("zip", 77, 1, lossy=False)}, MissReason.FOREIGN),
        ({"codec": CodecInfo("lossless", LOSSLESS.id, LOSSLESS.version + 1, lossy=False)}, MissReason.FOREIGN),
        ({"codec": LOSSLESS, "first_position": 0}, MissReason.CORRUPT),
        ({"codec": LOSSLESS}, MissReason.CORRUPT),
    ],
    ids=["lossy", "lossy and says so", "another fidelity", "unknown id", "unknown version", "place", "nonsense"],
)
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_an_exact_session_is_given_nothing_else_and_computes_it(
    engine: Engine, own_redis: RedisServer, codec: str, changes: dict[str, object], reason: MissReason
) -> None:
    history = first_turn(engine, codec)
    wanted = generate(engine, history, SECOND).reply
    engine.drop(TENANT, (*history, *SECOND, *wanted), with_redis=True).result(30)
    first_turn(engine, codec)
    park(engine, history, codec)
    name = blocks_of(engine, history, codec)[2].name
    nonsense = memoryview(bytes(1000))
    plant(engine, own_redis, replace(Store(name, BLOCK, nonsense, 60, first_position=2 * BLOCK), **changes))  # type: ignore[arg-type]
    turn = generate(engine, history, SECOND, codec=codec)
    assert turn.receipt.misses[reason] == BLOCK
    assert turn.receipt.redis_tokens == len(history) - 1 - BLOCK
    assert turn.reply == wanted
    park(engine, history, codec)
    again = generate(engine, history, SECOND, codec=codec)
    assert again.receipt.redis_tokens == len(history) - 1, "what was computed has taken its place"
    assert again.reply == wanted


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_block_is_encoded_once_however_often_it_is_parked_and_lost(
    engine: Engine, client: Redis, codec: str
) -> None:
    history = first_turn(engine, codec)
    park(engine, history, codec)
    wanted = blocks_of(engine, history, codec)
    full = len(history) // BLOCK
    assert encoded(engine, codec) == full
    values = {want.name: client.get(key(want.name)) for want in wanted}
    for _ in range(2):
        engine.warm(TENANT, history, codec=codec).result(30)
        assert park(engine, history, codec) == len(history) - 1
    engine.warm(TENANT, history, codec=codec).result(30)
    client.delete(*map(key, values))
    assert park(engine, history, codec) == len(history) - 1, "the host tier still has the payloads"
    assert {name: client.get(key(name)) for name in values} == values
    engine.warm(TENANT, history, codec=codec).result(30)
    client.delete(*map(key, values))
    engine._tiers.host.drop(values)
    assert park(engine, history, codec) == len(history) - 1 - full * BLOCK, (
        "the unfull block is exact: it is stored again"
    )
    assert encoded(engine, codec) == full
    assert engine.locate(TENANT, history, codec=codec, with_redis=True).result(30).device_tokens == full * BLOCK


@pytest.mark.parametrize("drop_host", [True, False], ids=["redis", "host"])
@pytest.mark.parametrize("codec", LOSSY)
def test_what_a_turn_brought_back_is_not_encoded_again(
    engine: Engine, client: Redis, codec: str, drop_host: bool
) -> None:
    history = first_turn(engine, codec)
    park(engine, history, codec, drop_host=drop_host)
    longer = (*history, *SECOND, *generate(engine, history, SECOND, codec=codec).reply)
    engine.flush(TENANT, longer, codec=codec).result(30)
    encodes = encoded(engine, codec)
    names = [want.name for want in blocks_of(engine, longer, codec)]
    client.delete(*map(key, names))
    engine._tiers.host.drop(names)
    first_full, all_kv_tokens = len(history) // BLOCK, len(longer) - 1
    assert park(engine, longer, codec) == all_kv_tokens - first_full * BLOCK
    assert encoded(engine, codec) - encodes == all_kv_tokens // BLOCK - first_full, "what this turn has computed"


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_lost_everywhere_is_computed_and_encoded_from_the_original_again(
    engine: Engine, client: Redis, codec: str
) -> None:
    history = first_turn(engine, codec)
    park(engine, history, codec)
    names = [key(want.name) for want in blocks_of(engine, history, codec)]
    values = [client.get(name) for name in names]
    client.delete(*names)
    turn = generate(engine, history, (), codec=codec, max_new_tokens=1)
    assert turn.receipt.computed_tokens == len(history)
    park(engine, history, codec)
    assert encoded(engine, codec) == 2 * (len(history) // BLOCK)
    assert [client.get(name) for name in names[:-1]] == values[:-1]


def test_what_was_copied_from_a_lossy_block_is_not_encoded_either(engine: Engine) -> None:
    prompt = PROMPT[: 3 * BLOCK]
    generate(engine, (), prompt, codec="int8", max_new_tokens=1)
    park(engine, (*prompt, 0), "int8")
    engine.warm(TENANT, (*prompt, 0), codec="int8").result(30)
    encodes = encoded(engine, "int8"), encoded(engine, "lossless")
    stream = start(engine, (), prompt, codec="int8", max_new_tokens=1000)  # copies the last block: it computes its end
    assert isinstance(stream.next(), Token)
    engine.finish(stream.request_id, 0)
    while isinstance(stream.next(), Token):
        pass
    (tail,) = blocks_of(engine, prompt, "int8")[2:]
    block = engine._pool.find(tail.name)
    assert block is not None
    assert engine._pool.is_lossy(block)
    engine.flush(TENANT, prompt, codec="int8").result(30)
    assert not engine._tiers.host.contains(tail.name)
    assert (encoded(engine, "int8"), encoded(engine, "lossless")) == encodes


@pytest.mark.parametrize("codec", SESSION_CODECS)
def test_turns_over_a_parked_session_go_on_filling_the_unfull_block(engine: Engine, client: Redis, codec: str) -> None:
    history = first_turn(engine, codec)
    lossy = fidelity_of(codec) in LOSSY
    for new in (SECOND, PROMPT[:9], PROMPT[3:40]):
        park(engine, history, codec)
        turn: Turn = generate(engine, history, new, codec=codec)
        assert turn.receipt.redis_tokens == len(history) - 1
        history = (*history, *new, *turn.reply)
        if lossy:
            engine.flush(TENANT, history, codec=codec).result(30)
            assert encoded(engine, codec) == (len(history) - 1) // BLOCK, "each once, when it was full"
