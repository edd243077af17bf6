"""Conversations whose KV comes from the disk: the same tokens as ever, whatever becomes of the files."""

from pathlib import Path

import pytest

from cache_store.disk_files import BlockFiles
from tests.engines import TENANT, EngineFactory, Turn, generate
from worker.engine.engine import Engine

BLOCK = 16
PROMPT = [(7 * place) % 300 + 5 for place in range(75)]
SECOND = [(11 * place) % 300 + 5 for place in range(9)]
FULL = (len(PROMPT) + 8 - 1) // BLOCK * BLOCK
"""Tokens of the first turn in full blocks."""


def on_disk(tmp_path: Path, **settings: object) -> dict[str, object]:
    return {"disk_dir": str(tmp_path), "disk_bytes": 64 << 20, **settings}


def first_turn(engine: Engine) -> tuple[int, ...]:
    """Returns the history, all of whose full blocks are on the disk now."""
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    settle(engine)
    return history


def settle(engine: Engine) -> None:
    disk = engine._tiers.disk
    assert disk is not None
    assert engine._tiers.write_behind.settled(timeout_s=30)
    assert disk.settled(timeout_s=30)


def end(engine: Engine) -> None:
    engine.check()
    engine.close()


def undisturbed(build_engine: EngineFactory) -> Turn:
    engine = build_engine()
    history = (*PROMPT, *generate(engine, (), PROMPT).reply)
    return generate(engine, history, SECOND)


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("rekindle-blocks-*/*"))


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_the_next_worker_resumes_from_the_disk_with_the_same_tokens(
    build_engine: EngineFactory, tmp_path: Path
) -> None:
    before = build_engine(**on_disk(tmp_path))
    history = first_turn(before)
    end(before)
    assert len(files(tmp_path)) == FULL // BLOCK
    engine = build_engine(**on_disk(tmp_path))
    located = engine.locate(TENANT, history, with_redis=False).result(30)
    assert (located.device_tokens, located.host_tokens, located.disk_tokens) == (0, 0, FULL)
    turn = generate(engine, history, SECOND)
    assert turn.receipt.disk_tokens == FULL
    assert turn.receipt.computed_tokens == len(history) + len(SECOND) - FULL
    assert turn.receipt.restored_bytes == FULL // BLOCK * engine.layout.block_bytes
    assert turn.reply == undisturbed(build_engine).reply
    assert engine.locate(TENANT, history, with_redis=False).result(30).host_tokens == FULL, "promoted"
    settle(engine)
    stats = engine.stats()
    assert stats.disk_tokens == FULL
    assert stats.disk.blocks == len(files(tmp_path)) > FULL // BLOCK
    assert [(m.blocks, m.codec) for m in stats.moved if (m.source, m.target) == ("disk", "host")] == [
        (FULL // BLOCK, "raw")
    ]


@pytest.mark.parametrize("codec", ["lossless", "int8", "ladder"])
def test_encoded_blocks_come_back_from_the_disk(build_engine: EngineFactory, tmp_path: Path, codec: str) -> None:
    before = build_engine(**on_disk(tmp_path))
    history = (*PROMPT, *generate(before, (), PROMPT, codec=codec).reply)
    settle(before)
    end(before)
    engine = build_engine(**on_disk(tmp_path))
    turn = generate(engine, history, SECOND, codec=codec, audit=True)
    assert turn.receipt.disk_tokens == FULL
    assert turn.receipt.restored_bytes < FULL // BLOCK * engine.layout.block_bytes
    assert turn.receipt.audit is not None
    assert turn.receipt.audit.passed


def test_a_block_that_the_disk_spoiled_comes_from_redis_or_is_computed(
    build_engine: EngineFactory, tmp_path: Path, redis_url: str
) -> None:
    before = build_engine(**on_disk(tmp_path), redis_url=redis_url)
    history = first_turn(before)
    end(before)
    spoil(files(tmp_path)[0])
    with_redis = build_engine(**on_disk(tmp_path), redis_url=redis_url)
    turn = generate(with_redis, history, SECOND)
    assert (turn.receipt.disk_tokens, turn.receipt.redis_tokens) == (FULL - BLOCK, BLOCK)
    expected = undisturbed(build_engine).reply
    assert turn.reply == expected
    settle(with_redis)
    assert with_redis.stats().local_faults["disk_corrupt"] == 1
    end(with_redis)
    spoil(files(tmp_path)[0])
    alone = build_engine(**on_disk(tmp_path))
    turn = generate(alone, history, SECOND)
    assert turn.receipt.disk_tokens < FULL
    assert turn.reply == expected


def test_what_is_forgotten_is_forgotten_on_the_disk_too(
    build_engine: EngineFactory, tmp_path: Path, redis_url: str
) -> None:
    engine = build_engine(**on_disk(tmp_path), redis_url=redis_url)
    history = first_turn(engine)
    assert files(tmp_path)
    engine.park(TENANT, history, drop_host=False, ttl_s=60).result(30)
    assert files(tmp_path)
    engine.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    assert not files(tmp_path)
    history = (*history, *SECOND, *generate(engine, history, SECOND).reply)
    settle(engine)
    assert files(tmp_path)
    engine.drop(TENANT, history, with_redis=True).result(30)
    assert not files(tmp_path)


def test_a_disk_that_refuses_costs_no_turn(
    build_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_engine(**on_disk(tmp_path))
    history = first_turn(before)
    end(before)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BlockFiles, "read", refuse)
    monkeypatch.setattr(BlockFiles, "write", refuse)
    engine = build_engine(**on_disk(tmp_path))
    turn = generate(engine, history, SECOND)
    assert turn.receipt.disk_tokens == 0
    assert turn.reply == undisturbed(build_engine).reply
    assert engine.stats().local_faults["disk_failed"] >= 3
    assert engine._tiers.disk is not None
    assert not engine._tiers.disk.works


def test_a_host_tier_smaller_than_the_history_restores_it_from_the_disk(
    build_engine: EngineFactory, tmp_path: Path
) -> None:
    before = build_engine(**on_disk(tmp_path))
    prompt = [(5 * place) % 300 + 5 for place in range(40 * BLOCK)]
    history = (*prompt, *generate(before, (), prompt).reply)
    settle(before)
    end(before)
    engine = build_engine(**on_disk(tmp_path, host_cache_bytes=0))
    assert engine.stats().host.capacity_blocks < 40, "the few buffers that restores land in"
    turn = generate(engine, history, SECOND)
    assert turn.receipt.disk_tokens == 40 * BLOCK
