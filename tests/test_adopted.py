"""What was deleted while nobody held it is not found by whoever takes it up: neither in memory nor on disk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cache_store.embedded_redis import RedisServer
from cache_store.errors import StoreUnavailable
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.memory_store import MemoryBlockStore
from tests.engines import TENANT, EngineFactory, generate
from worker.calls import Located
from worker.engine.engine import Engine
from worker.tiers import adopted
from worker.tiers.adopted import Adopted

PROMPT = [(7 * place) % 300 + 5 for place in range(75)]
OTHER = [(13 * place) % 300 + 5 for place in range(75)]
ROOT = root_hash(b"model", "tenant")


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


def located(engine: Engine, history: Sequence[int]) -> Located:
    return engine.locate(TENANT, history, with_redis=False).result(30)


def test_a_conversation_deleted_while_its_worker_was_down_is_found_nowhere(
    build_engine: EngineFactory, redis_url: str, tmp_path: Path
) -> None:
    local: dict[str, object] = {"host_cache_dir": str(tmp_path), "disk_dir": str(tmp_path), "disk_bytes": 64 << 20}
    engine = build_engine(redis_url=redis_url, **local)
    deleted, kept = ((*prompt, *generate(engine, (), prompt).reply) for prompt in (PROMPT, OTHER))
    assert engine._tiers.write_behind.settled(timeout_s=30)
    assert engine._tiers.disk is not None
    assert engine._tiers.disk.settled(timeout_s=30)
    before = located(engine, kept)
    assert min(before.host_tokens, before.disk_tokens) > 0
    engine.check()
    engine.close()
    build_engine(redis_url=redis_url).drop(TENANT, deleted, with_redis=True).result(30)
    again = build_engine(redis_url=redis_url, **local)
    assert located(again, deleted) == Located(0, 0, 0, 0)
    assert located(again, kept) == replace(before, device_tokens=0)


def names(count: int) -> list[BlockHash]:
    return [chain(ROOT, [number]) for number in range(count)]


class Forgetful:
    """Blocks that are forgotten."""

    def __init__(self) -> None:
        self.gone: list[BlockHash] = []

    def __call__(self, blocks: Sequence[BlockHash]) -> int:
        self.gone += blocks
        return len(blocks)


class Failing(MemoryBlockStore):
    """Knows deletions, when it answers."""

    answers = False

    def deleted(self, blocks: Sequence[BlockHash]) -> list[bool]:
        if not self.answers:
            raise StoreUnavailable("not now")
        return super().deleted(blocks)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopted, "_AGAIN_S", 0.2)
    monkeypatch.setattr(adopted, "_RETRY_S", 0.01)


@pytest.mark.usefixtures("waits")
def test_what_is_deleted_before_anybody_knows_of_the_worker_is_seen_at_the_second_look() -> None:
    store, forgotten = MemoryBlockStore(), Forgetful()
    store.delete(names(1))
    looking = Adopted(names(3), store, forgotten)
    assert forgotten.gone == names(1), "at once"
    store.delete(names(2))
    eventually(lambda: forgotten.gone == names(1) + names(2))
    looking.close()


@pytest.mark.usefixtures("waits")
def test_a_store_that_does_not_answer_is_asked_until_it_does() -> None:
    store, forgotten = Failing(), Forgetful()
    store.delete(names(1))
    looking = Adopted(names(3), store, forgotten)
    assert forgotten.gone == []
    store.answers = True
    eventually(lambda: forgotten.gone == names(1) * 2)
    looking.close()


def test_a_worker_that_ends_does_not_wait_for_the_second_look() -> None:
    began_s = time.monotonic()
    Adopted(names(3), MemoryBlockStore(), Forgetful()).close()
    assert time.monotonic() - began_s < 10


def test_without_redis_a_worker_starts_with_what_it_finds(
    build_engine: EngineFactory, own_redis: RedisServer, tmp_path: Path
) -> None:
    engine = build_engine(host_cache_dir=str(tmp_path))
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    engine.check()
    engine.close()
    own_redis.stop()
    again = build_engine(redis_url=own_redis.url, host_cache_dir=str(tmp_path))
    assert located(again, history).host_tokens == len(history) - 1
