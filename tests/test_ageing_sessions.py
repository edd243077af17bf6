"""What ages are real blocks: the bytes are those of the original, and the session goes on from them."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from redis import Redis

from cache_store.codecs import LADDER, CodecInfo, named
from cache_store.frame import HEADER_BYTES, Framer
from cache_store.ids import root_hash
from cache_store.layout import KVLayout
from cache_store.store import Held
from tests.engines import TENANT, EngineFactory, generate, poison
from tests.test_ageing import eventually, make_idle
from worker.engine.engine import Engine
from worker.engine.prefix import Wanted, wanted_by_history
from worker.metrics import WorkerMetrics
from worker.tiers.codecs import open_codecs
from worker.tiers.shrink import Shrinker

CPU = torch.device("cpu")
PROMPT = tuple(range(5, 105))
BLOCK = 16


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


def key(want: Wanted) -> str:
    return f"rekindle:b:{want.name.hex()}"


def blocks_of(engine: Engine, history: tuple[int, ...]) -> list[Wanted]:
    return wanted_by_history(root_hash(engine.fingerprint, TENANT, LADDER), history, BLOCK)


def codecs_in(client: Redis, engine: Engine, blocks: list[Wanted]) -> list[str]:
    framer = Framer(engine.layout, engine.fingerprint)
    names = []
    for want in blocks:
        value = client.get(key(want))
        assert isinstance(value, bytes)
        names.append(framer.read(value[:HEADER_BYTES], block=want.name, value_bytes=len(value)).codec.name)
    return names


def has_aged(engine: Engine, *, blocks: int) -> bool:
    return sum(aged.blocks for aged in engine.stats().ageing.aged) == blocks


def left_the_device(engine: Engine) -> dict[str, int]:
    """Blocks by the codec that they were encoded in."""
    return {moved.codec: moved.blocks for moved in engine.stats().moved if moved.source == "device"}


@pytest.mark.parametrize("steps", [("raw", "lossless", "int8", "k8v4", "int4"), ("lossless", "int4"), ("int8", "int4")])
@pytest.mark.parametrize("first_position", [0, 64], ids=["first block", "later block"])
@pytest.mark.parametrize("kind", ["numbers", "NaN"])
def test_each_step_down_gives_the_bytes_of_the_original(steps: tuple[str, ...], first_position: int, kind: str) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=64, dtype="bfloat16")
    codecs = open_codecs(layout, None, CPU)
    original = torch.randn(layout.block_shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if kind == "NaN":
        original[1, 0, 1, 5, 7] = torch.nan

    def encoded(codec: CodecInfo) -> memoryview:
        into = memoryview(bytearray(layout.block_bytes))
        return into[: codecs[codec.name].encode(original, into, num_tokens=64, first_position=first_position)]

    shrink = Shrinker(layout, codecs)
    codec, payload = named(steps[0]), encoded(named(steps[0]))
    for step in steps[1:]:
        held = Held(root_hash(b"model", ""), codec, 64, first_position, payload.toreadonly())
        codec, payload = named(step), shrink(held, named(step))
        assert payload == encoded(codec)


def test_a_ladder_session_ages_in_redis_and_goes_on_from_every_rung(
    redis_url: str, client: Redis, build_engine: EngineFactory
) -> None:
    engine = build_engine(redis_url=redis_url, codec_ladder="lossless")  # leaves ageing to another
    history = (*PROMPT, *generate(engine, (), PROMPT, codec=LADDER).reply)
    *full, tail = blocks_of(engine, history)
    assert engine.park(TENANT, history, codec=LADDER, drop_host=True, ttl_s=60).result(30).redis_tokens == 107
    assert codecs_in(client, engine, [*full, tail]) == ["lossless"] * 7
    for idle_s, source, target in [(700, "lossless", "int8"), (3700, "int8", "int4")]:
        before = [client.get(key(want)) for want in full]
        for want in (*full, tail):
            make_idle(client, key(want), idle_s)
        another = build_engine(redis_url=redis_url)  # sweeps as it starts
        eventually(partial(has_aged, another, blocks=6))
        [aged] = another.stats().ageing.aged
        assert (aged.source, aged.target) == (source, target)
        assert codecs_in(client, another, [*full, tail]) == [target] * 6 + ["lossless"]
        saved = sum(len(value) for value in before if isinstance(value, bytes)) - sum(
            client.strlen(key(want)) for want in full
        )
        assert aged.saved_bytes == saved > 0
        scraped = WorkerMetrics(another.stats).registry.get_sample_value
        assert scraped("rekindle_aged_blocks_total", {"source": source, "target": target}) == 6
        assert scraped("rekindle_aged_saved_bytes_total", {"source": source, "target": target}) == saved
        assert scraped("rekindle_ageing_held_back") == 0
        poison(another)
        turn = generate(another, history, (7, 9), codec=LADDER, audit=True)
        assert turn.receipt.redis_tokens == 107
        assert turn.receipt.audit is not None
        assert turn.receipt.audit.passed
        another.park(TENANT, history, codec=LADDER, drop_host=True, ttl_s=60).result(30)
        assert left_the_device(another).get("lossless", 0) <= 2, "what the turn added, and no more"
        assert codecs_in(client, another, full) == [target] * 6, "not encoded again"
        assert client.delete(*client.keys("rekindle:ageing:*")) == 1  # as if its lease had ended


def test_an_exact_session_beside_it_never_ages(redis_url: str, client: Redis, build_engine: EngineFactory) -> None:
    engine = build_engine(redis_url=redis_url, codec_ladder="lossless")  # leaves ageing to another
    for codec in ("raw", "lossless", "int8", LADDER):
        history = (*PROMPT, *generate(engine, (), PROMPT, codec=codec).reply)
        engine.park(TENANT, history, codec=codec, drop_host=False, ttl_s=60).result(30)
    keys = {found.decode() for found in client.scan_iter("rekindle:b:*")}
    ladder = {key(want) for want in blocks_of(engine, (*PROMPT, 0))}
    before = {found: client.get(found) for found in keys}
    for found in keys:
        make_idle(client, found, 4000)
    another = build_engine(redis_url=redis_url)
    eventually(partial(has_aged, another, blocks=6))
    changed = {found for found in keys if client.get(found) != before[found]}
    assert len(changed) == 6
    assert changed <= ladder
