"""Whole conversations under encryption at rest: resumed anywhere, readable nowhere, and right whatever is swapped."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from cache_store.codecs import LADDER
from cache_store.embedded_redis import RedisServer
from cache_store.frame import HEADER_BYTES
from cache_store.ids import BlockHash, mark_of, root_hash, tenant_mark
from protos import rekindle_pb2 as pb
from rekindle.cli import make_app
from rekindle.errors import RekindleError
from tests.engines import TENANT, EngineFactory, generate
from tests.keyrings import entries, keyring
from tests.systems import System, Truth, WorkerProcess, chat, running_system
from tests.test_ageing import eventually as soon
from tests.test_ageing import make_idle
from tests.test_sealed_records import dump

SAID = "What I tell you here is for nobody else, and it fills a few blocks of tokens besides."
PROMPT = tuple(range(5, 105))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sources of keys by what is in them: as they follow each other when a key is rotated, and one that is wrong."""
    folder = tmp_path_factory.mktemp("keys")
    named = {
        "old": entries("1"),
        "adding": entries("1", "2"),
        "rotated": entries("2", "1"),
        "wrong": f"1:{'00' * 32} names:{'00' * 32}",
    }
    for name, content in named.items():
        (folder / name).write_text(content)
    return {name: f"file:{folder / name}" for name in named}


@pytest.fixture(scope="module")
def sealed_workers(redis_server: RedisServer, keys: dict[str, str]) -> Iterator[list[WorkerProcess]]:
    """Two workers in mid-rotation: one still seals with the old key, one with the new one."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(WorkerProcess(name, redis_url=redis_server.url, master_keys=keys[name]))
            for name in ("adding", "rotated")
        ]


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


async def parked(system: System, name: str) -> pb.Session:
    """A conversation of one turn that is in Redis alone."""
    await system.client.create_session(name)
    await system.say(chat(SAID), name)
    await system.client.park_session(name, drop_host=True)
    return await system.client.get_session(name, with_token_ids=True, with_text=True)


async def test_a_conversation_goes_on_under_either_key_and_shows_nothing_in_redis(
    redis_url: str, client: redis.Redis, sealed_workers: list[WorkerProcess], keys: dict[str, str], truth: Truth
) -> None:
    first, second = sealed_workers
    async with (
        running_system(redis_url, [first], master_keys=keys["adding"]) as here,
        running_system(redis_url, [second], master_keys=keys["rotated"]) as there,
    ):
        session = await parked(here, "secret")
        resumed = await there.say(chat("Go on."), "secret")
        assert resumed.receipt.redis_tokens == session.num_tokens - 1
        await there.client.park_session("secret", drop_host=True)
        again = await here.say(chat("And on."), "secret")
        assert again.receipt.computed_tokens < 40
        whole = await here.client.get_session("secret", with_token_ids=True, with_text=True)
        assert truth.confirms(whole)
        await here.client.park_session("secret", drop_host=True)
    dumped = dump(client)
    assert b"nobody else" not in dumped
    at_once = 4
    for start in range(len(whole.token_ids) - at_once):
        run = whole.token_ids[start : start + at_once]
        assert b"".join(token.to_bytes(4, "little") for token in run) not in dumped
    blocks = list(client.scan_iter("rekindle:b:*"))
    assert len(blocks) > 3
    for key in blocks:
        value = client.get(key)
        assert isinstance(value, bytes)
        assert len(zlib.compress(value[HEADER_BYTES:])) > 0.99 * len(value), "KV as it is would get smaller"


async def test_a_tenant_is_erased_without_a_trace_and_its_mark_tells_nobody_whose_it_is(
    redis_url: str, client: redis.Redis, sealed_workers: list[WorkerProcess], keys: dict[str, str]
) -> None:
    async with running_system(redis_url, sealed_workers, master_keys=keys["adding"]) as system:
        await parked(system, "erased")
        await system.say(chat(f"{SAID} In no session."))
        blocks = list(client.scan_iter("rekindle:b:*"))
        ours = keyring("1", "2").marks_from
        assert (
            {mark_of(BlockHash(bytes.fromhex(key[11:].decode()))) for key in blocks}
            == {tenant_mark("default", ours)}
            != {tenant_mark("default")}
        )
        client.set(f"rekindle:b:{root_hash(b'model', 'default').hex()}", "from before there were keys")
        erased = await system.client.erase_tenant()
        assert erased.sessions == 1
        assert erased.redis_blocks > len(blocks)
        assert min(erased.device_blocks, erased.host_blocks) > 0
        assert not list(client.scan_iter("rekindle:b:*"))
        assert await system.client.erase_tenant() == pb.EraseTenantResponse()
        assert (await system.say(chat(f"{SAID} In no session."))).receipt.computed_tokens > len(SAID)


async def test_two_blocks_swapped_in_redis_are_computed_and_the_reply_is_right(
    redis_url: str, client: redis.Redis, sealed_workers: list[WorkerProcess], keys: dict[str, str], truth: Truth
) -> None:
    async with running_system(redis_url, sealed_workers[:1], master_keys=keys["adding"]) as system:
        session = await parked(system, "swapped")
        one, two, *_ = client.scan_iter("rekindle:b:*")
        values = client.mget(one, two)
        client.mset({one: values[1], two: values[0]})  # type: ignore[dict-item]
        turn = await system.say(chat("Is it still you?"), "swapped")
        corrupt = [miss for miss in turn.receipt.misses if miss.reason == pb.MISS_REASON_CORRUPT]
        assert sum(miss.tokens for miss in corrupt) >= 17, "two blocks, of which one may not be full"
        assert 0 < turn.receipt.redis_tokens < session.num_tokens - 17
        assert truth.confirms(await system.client.get_session("swapped", with_token_ids=True))


async def test_a_front_end_with_a_wrong_key_says_so_and_changes_nothing(
    redis_url: str, sealed_workers: list[WorkerProcess], keys: dict[str, str]
) -> None:
    async with running_system(redis_url, sealed_workers[:1], master_keys=keys["adding"]) as system:
        session = await parked(system, "mine")
        async with running_system(redis_url, sealed_workers[:1], master_keys=keys["wrong"]) as other:
            for _ in range(2):
                with pytest.raises(RekindleError, match=r"session mine is sealed .* another master key"):
                    await other.say(chat("Who are you?"), "mine")
        after = await system.client.get_session("mine", with_token_ids=True)
        assert (after.token_ids, after.turns) == (session.token_ids, session.turns)
        await system.say(chat("Go on."), "mine")


async def test_a_record_that_was_changed_can_be_deleted_and_nothing_else(
    redis_url: str, client: redis.Redis, sealed_workers: list[WorkerProcess], keys: dict[str, str]
) -> None:
    async with running_system(redis_url, sealed_workers[:1], master_keys=keys["adding"]) as system:
        await parked(system, "changed")
        client.hset("rekindle:{default/changed}:meta", "version", 7)
        with pytest.raises(RekindleError, match="session changed is not as it was sealed"):
            await system.client.fork_session("changed")
        await system.client.delete_session("changed")
        assert not list(client.scan_iter("rekindle:{default/changed}:[mt]*"))
        assert [session.session_id async for session in system.client.list_sessions()] == []
        await system.client.create_session("changed")


def test_sealed_files_are_found_again_by_the_next_worker(
    build_engine: EngineFactory, tmp_path: Path, keys: dict[str, str]
) -> None:
    settings = {"disk_dir": str(tmp_path), "disk_bytes": 64 << 20, "master_keys": keys["old"]}
    before = build_engine(**settings)
    history = (*PROMPT, *generate(before, (), PROMPT).reply)
    assert before._tiers.write_behind.settled(timeout_s=30)
    before.check()
    before.close()
    assert all(
        len(zlib.compress(path.read_bytes())) > 0.99 * path.stat().st_size
        for path in tmp_path.rglob("*")
        if path.is_file()
    )
    after = build_engine(**settings)
    turn = generate(after, history, (7, 9), audit=True)
    assert turn.receipt.disk_tokens == len(history) // 16 * 16
    assert turn.receipt.audit is not None
    assert turn.receipt.audit.passed


def test_a_sealed_ladder_session_ages_and_goes_on(
    build_engine: EngineFactory, redis_url: str, client: redis.Redis, keys: dict[str, str]
) -> None:
    engine = build_engine(redis_url=redis_url, codec_ladder="lossless", master_keys=keys["old"])
    history = (*PROMPT, *generate(engine, (), PROMPT, codec=LADDER).reply)
    engine.park(TENANT, history, codec=LADDER, drop_host=True, ttl_s=60).result(30)
    for key in list(client.scan_iter("rekindle:b:*")):
        make_idle(client, key.decode(), 700)
    another = build_engine(redis_url=redis_url, master_keys=keys["rotated"])  # sweeps as it starts
    soon(lambda: sum(aged.blocks for aged in another.stats().ageing.aged) == 6)
    turn = generate(another, history, (7, 9), codec=LADDER, audit=True)
    assert turn.receipt.redis_tokens == 107
    assert turn.receipt.audit is not None
    assert turn.receipt.audit.passed


@pytest.mark.parametrize("other", ["wrong", ""])
def test_an_engine_with_other_keys_or_none_finds_nothing_and_answers_as_ever(
    build_engine: EngineFactory, redis_url: str, keys: dict[str, str], other: str
) -> None:
    right = build_engine(redis_url=redis_url, master_keys=keys["old"])
    history = (*PROMPT, *generate(right, (), PROMPT).reply)
    right.park(TENANT, history, drop_host=True, ttl_s=60).result(30)
    stranger = build_engine(redis_url=redis_url, master_keys=keys.get(other, ""))
    turn = generate(stranger, history, (7, 9))
    assert (turn.receipt.redis_tokens, turn.receipt.computed_tokens) == (0, len(history) + 2)
    assert generate(right, history, (7, 9)).reply == turn.reply


def test_a_block_says_what_is_in_it_to_nobody_who_guesses_its_tokens(
    build_engine: EngineFactory, redis_url: str, client: redis.Redis, keys: dict[str, str]
) -> None:
    """Names of blocks are hashes of their tokens; with master keys they are keyed."""
    plain = build_engine(redis_url=redis_url)
    generate(plain, (), PROMPT)
    assert plain._tiers.write_behind.settled(timeout_s=30)
    guessed = set(client.scan_iter("rekindle:b:*"))
    assert len(guessed) >= 6
    sealed = build_engine(redis_url=redis_url, master_keys=keys["old"])
    generate(sealed, (), PROMPT)
    assert sealed._tiers.write_behind.settled(timeout_s=30)
    assert len(set(client.scan_iter("rekindle:b:*"))) == 2 * len(guessed)


def test_the_secret_is_in_no_command_line_and_nothing_that_is_logged(redis_url: str) -> None:
    small = {"device_cache_bytes": 16 << 20, "host_cache_bytes": 16 << 20, "self_measure_s": 0}
    config = json.dumps({"model": "preset:tiny", "redis_url": redis_url, "master_keys": "env:MASTER_KEYS"} | small)
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "--config", config],
        env=os.environ | {"MASTER_KEYS": entries("1")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as worker:
        try:
            assert worker.stdout is not None
            shown = [worker.stdout.readline(), Path(f"/proc/{worker.pid}/cmdline").read_bytes()]
        finally:
            worker.terminate()
            shown += worker.communicate(timeout=30)
    assert b"metrics_address" in shown[0]
    assert b"worker serves" in shown[-1]
    assert secret_of("1").encode() not in b"".join(shown)


def test_the_secret_is_not_in_what_the_command_line_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("REKINDLE_MASTER_KEYS", entries("1"))  # by mistake: it is to say where they are
    for words in (["serve", "--help"], ["serve"]):
        with pytest.raises(SystemExit) as ended:
            make_app().meta(words)
        shown = capsys.readouterr()
        assert "master" in shown.out + shown.err
        assert secret_of("1") not in f"{shown.out}{shown.err}{ended.value.code}"
    assert "master_keys must be file:PATH, env:NAME or command:COMMAND" in shown.err


def secret_of(key_id: str) -> str:
    return entries(key_id).split("\n")[0].partition(":")[2]
