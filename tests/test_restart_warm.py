"""A worker that was killed leaves its warm tier to the next one on its machine: nothing of it is computed again."""

import mmap
import os
from pathlib import Path

from protos import rekindle_pb2 as pb
from tests.systems import BLOCK_TOKENS, System, Truth, WorkerProcess, chat, eventually, running_system, scrape

SESSION = "outlives-its-worker"


async def keeps(system: System, tier: pb.Tier, tokens: int) -> None:
    """Wait until a tier holds so many of the session's tokens."""

    async def there() -> bool:
        residency = (await system.client.get_session(SESSION, with_residency=True)).residency
        return any(where.tier == tier and where.tokens == tokens for where in residency)

    await eventually(there)


def spoil(folder: Path) -> None:
    """Change one byte in each KiB of every slot but the first."""
    [slab] = folder.glob("rekindle-slab-*")
    content = bytearray(slab.read_bytes())
    block_bytes = int(slab.name.split("-")[-2].partition("x")[0])
    for at in range(2 * mmap.PAGESIZE + block_bytes, len(content), 1024):
        content[at] ^= 0xFF
    slab.write_bytes(content)


async def test_a_worker_killed_and_started_again_finds_its_warm_tier(
    redis_url: str, tmp_path: Path, truth: Truth
) -> None:
    with WorkerProcess("first", host_cache_dir=str(tmp_path)) as worker:
        async with running_system(redis_url, [worker]) as system:
            await system.client.create_session(SESSION)
            await system.say(chat("Remember this, and the worker that hears it will be killed."), SESSION)
            kept = (await system.client.get_session(SESSION)).num_tokens - 1
            await keeps(system, pb.TIER_HOST, kept)
            worker.kill()
    with WorkerProcess("second", host_cache_dir=str(tmp_path)) as worker:
        async with running_system(redis_url, [worker]) as system:
            turn = await system.say(chat("Do you?"), SESSION, audit=True)
            assert turn.receipt.host_tokens == kept
            assert turn.receipt.device_tokens == turn.receipt.redis_tokens == 0
            assert truth.confirms(await system.client.get_session(SESSION, with_token_ids=True))
    assert len(os.listdir(tmp_path)) == 1, "both had the same slab"  # pathlib's is refused in coroutines


async def test_what_is_wrong_in_the_warm_tier_is_computed_again(redis_url: str, tmp_path: Path, truth: Truth) -> None:
    settings: dict[str, object] = {"host_cache_dir": str(tmp_path), "host_cache_bytes": 1 << 20}
    with WorkerProcess("first", **settings) as worker:
        async with running_system(redis_url, [worker]) as system:
            await system.client.create_session(SESSION)
            for text in ("One thing and another, and a third one, of which none is to be lost.", "Go on!"):
                await system.say(chat(text), SESSION, max_new_tokens=40)
            kept = (await system.client.get_session(SESSION)).num_tokens - 1
            await keeps(system, pb.TIER_HOST, kept)
    spoil(tmp_path)
    with WorkerProcess("second", **settings) as worker:
        async with running_system(redis_url, [worker]) as system:
            turn = await system.say(chat("Do you?"), SESSION)
            assert turn.receipt.host_tokens == BLOCK_TOKENS, "the first slot is whole"
            assert turn.receipt.computed_tokens > kept - BLOCK_TOKENS
            assert truth.confirms(await system.client.get_session(SESSION, with_token_ids=True))


async def test_a_worker_killed_and_started_again_finds_its_disk(redis_url: str, tmp_path: Path, truth: Truth) -> None:
    settings: dict[str, object] = {"disk_dir": str(tmp_path), "disk_bytes": 16 << 20}
    with WorkerProcess("first", **settings) as worker:
        async with running_system(redis_url, [worker]) as system:
            await system.client.create_session(SESSION)
            await system.say(chat("This one is written down, and its worker will be killed all the same."), SESSION)
            kept = ((await system.client.get_session(SESSION)).num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            await keeps(system, pb.TIER_DISK, kept)
            worker.kill()
    with WorkerProcess("second", **settings) as worker:
        async with running_system(redis_url, [worker]) as system:
            turn = await system.say(chat("Was it?"), SESSION)
            assert turn.receipt.disk_tokens == kept
            assert turn.receipt.host_tokens == turn.receipt.redis_tokens == 0
            assert truth.confirms(await system.client.get_session(SESSION, with_token_ids=True))
            stats = await system.client.stats()
            assert stats.disk_hit_rate == stats.hit_rate == kept / turn.finished.usage.prompt_tokens
            assert stats.workers[0].disk.capacity_bytes == 16 << 20
            assert stats.workers[0].disk.blocks >= kept // BLOCK_TOKENS
            samples = await scrape(worker.metrics_address)
            assert samples["rekindle_prompt_tokens_total{source=disk}"] == kept
            assert samples["rekindle_local_faults_total{kind=disk_failed}"] == 0
            assert samples["rekindle_ttft_seconds_count{kind=disk}"] == 1
