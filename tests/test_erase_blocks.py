"""All of a tenant's blocks leave a worker's tiers, whatever they are of, and nothing of another tenant's does."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import redis

from cache_store.ids import BlockHash, mark_of, tenant_mark
from cache_store.redis_store import RedisBlockStore
from cache_store.store import Fetch, Landed
from tests.engines import EngineFactory, generate, start
from worker.calls import DropReport, Token
from worker.engine.engine import Engine
from worker.errors import TenantErased

PROMPT = [(7 * place) % 300 + 5 for place in range(75)]
NOTHING = DropReport(0, 0, 0, 0)


def settle(engine: Engine) -> None:
    assert engine._tiers.write_behind.settled(timeout_s=30)
    assert engine._tiers.disk is None or engine._tiers.disk.settled(timeout_s=30)


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


def held(engine: Engine, tenant: str) -> tuple[int, int, int]:
    """How many of its blocks the device, host memory and the disk have."""
    mark, disk = tenant_mark(tenant), engine._tiers.disk
    tiers = (engine.blocks_held().result(30).device, engine._tiers.host.blocks(), disk.blocks() if disk else [])
    device, host, on_disk = (sum(mark_of(BlockHash(name)) == mark for name in names) for names in tiers)
    return device, host, on_disk


def in_redis(url: str, tenant: str) -> int:
    with redis.Redis.from_url(url) as client:
        return sum(tenant_mark(tenant).hex() in key.decode() for key in client.scan_iter("rekindle:b:*"))


def test_what_no_history_names_leaves_every_tier_and_is_counted(
    build_engine: EngineFactory, redis_url: str, tmp_path: Path
) -> None:
    engine = build_engine(redis_url=redis_url, disk_dir=str(tmp_path), disk_bytes=64 << 20)
    for tenant in ("acme", "other"):
        for codec in ("raw", "int8", "ladder"):
            history = (*PROMPT, *generate(engine, (), PROMPT, tenant=tenant, codec=codec).reply)
            engine.park(tenant, history, codec=codec, drop_host=False, ttl_s=60).result(30)
            engine.warm(tenant, history, codec=codec).result(30)
    settle(engine)
    mine, theirs = (*held(engine, "acme"), in_redis(redis_url, "acme")), held(engine, "other")
    assert min(mine) > 0
    assert astuple(engine.erase("acme", with_redis=True).result(30)) == mine
    assert engine.erase("acme", with_redis=True).result(30) == NOTHING
    assert held(engine, "acme") == (0, 0, 0)
    assert len(list(tmp_path.glob("rekindle-blocks-*/*"))) == theirs[2]
    assert (*held(engine, "other"), in_redis(redis_url, "other")) == mine
    located = engine.locate("other", history, codec="ladder", with_redis=True).result(30)
    assert located.device_tokens == located.host_tokens == located.redis_tokens == len(history) - 1


def test_turns_that_run_and_wait_end_and_another_tenants_go_on(build_engine: EngineFactory, redis_url: str) -> None:
    engine = build_engine(redis_url=redis_url, max_running=2)
    running = start(engine, (), PROMPT, max_new_tokens=2000, tenant="acme")
    other = start(engine, (), PROMPT, max_new_tokens=40, tenant="other")
    waiting = start(engine, (), PROMPT[::-1], tenant="acme")
    assert isinstance(running.next(), Token)
    erased = engine.erase("acme", with_redis=True).result(30)
    assert erased.device_blocks > 0
    for stream in (running, waiting):
        with pytest.raises(TenantErased):
            stream.result()
    assert len(other.result().reply) == 40
    settle(engine)
    assert engine.erase("acme", with_redis=True).result(30) == NOTHING
    assert (held(engine, "acme"), in_redis(redis_url, "acme")) == ((0, 0, 0), 0)
    assert generate(engine, (), PROMPT, tenant="acme").receipt.computed_tokens == len(PROMPT)


def test_what_is_on_its_way_up_arrives_nowhere(
    build_engine: EngineFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(redis_url=redis_url)
    history = (*PROMPT, *generate(engine, (), PROMPT, tenant="acme").reply)
    engine.park("acme", history, drop_host=True, ttl_s=60).result(30)
    may_answer, get = threading.Event(), RedisBlockStore.get

    def get_two(store: RedisBlockStore, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        assert all(fetch.wanted is None or fetch.wanted() for fetch in wanted)
        at_once = [replace(fetch, wanted=None) for fetch in wanted]  # the claims on the rest are taken back: it comes
        get(store, at_once[:2], landed, deadline_s=deadline_s)
        may_answer.wait(30)
        get(store, at_once[2:], lambda number, *found: landed(number + 2, *found), deadline_s=deadline_s)

    monkeypatch.setattr(RedisBlockStore, "get", get_two)
    turn = start(engine, history, (5, 6, 7), tenant="acme")
    eventually(lambda: sum(m.blocks for m in engine.stats().moved if (m.source, m.target) == ("host", "device")) == 2)
    assert engine.erase("acme", with_redis=False).result(30) == DropReport(0, 2, 0, 0)
    may_answer.set()
    with pytest.raises(TenantErased):
        turn.result()
    eventually(lambda: engine.stats().running == 0 and not engine._tiers.host._reserved)
    assert engine._tiers.store is not None
    assert engine._tiers.store.stats().blocks_got == -(-len(history) // 16), "they did come"
    assert held(engine, "acme") == (0, 0, 0)
    assert in_redis(redis_url, "acme") > 0, "another worker was to be asked for these"


def test_a_machine_that_was_down_forgets_the_tenant_when_it_comes_back(
    build_engine: EngineFactory, redis_url: str, tmp_path: Path
) -> None:
    local: dict[str, object] = {"host_cache_dir": str(tmp_path), "disk_dir": str(tmp_path), "disk_bytes": 64 << 20}
    down = build_engine(redis_url=redis_url, **local)
    for tenant in ("acme", "other"):
        generate(down, (), PROMPT, tenant=tenant)
    settle(down)
    kept = held(down, "other")
    down.check()
    down.close()
    with redis.Redis.from_url(redis_url) as client:
        assert client.flushall()  # the machine's copies are the last ones: no name of theirs is known
    of_another_model = build_engine(redis_url=redis_url, preset_seed=1)
    assert of_another_model.erase("acme", with_redis=True).result(30) == NOTHING
    again = build_engine(redis_url=redis_url, **local)
    assert held(again, "acme") == (0, 0, 0)
    assert held(again, "other") == (0, *kept[1:])
