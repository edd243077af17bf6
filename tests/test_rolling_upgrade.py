"""Workers leave and others come, with the same model or a new one: no turn fails, and no KV gets to another model."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cache_store.embedded_redis import RedisServer
from protos import rekindle_pb2 as pb
from tests.systems import BLOCK_TOKENS, Truth, WorkerProcess, chat, eventually, running_system, session_for

_TEXT = "A sentence that is long enough to fill more than one block, whatever the tokenizer makes of it."


@pytest.fixture
def leaving(redis_server: RedisServer) -> Iterator[WorkerProcess]:
    """A worker for one test, which may go."""
    with WorkerProcess("leaving", drain_s=0.2, redis_url=redis_server.url) as worker:
        yield worker


async def test_a_worker_that_leaves_hands_its_turn_over_in_mid_reply_and_its_sessions_through_redis(
    redis_url: str, leaving: WorkerProcess, workers: tuple[WorkerProcess, WorkerProcess], truth: Truth
) -> None:
    staying = workers[0].worker_id
    async with running_system(redis_url, [leaving, workers[0]]) as system:
        hot = session_for("leaving", ["leaving", staying])
        await system.client.create_session(hot)
        assert (await system.say(chat(_TEXT), hot)).receipt.worker_id == "leaving"
        talking = (await system.client.fork_session(hot)).session_id
        assert (await system.say(chat("And a little more, too."), hot)).receipt.worker_id == "leaving"
        num_kv = (await system.client.get_session(hot)).num_tokens - 1
        assert num_kv % BLOCK_TOKENS, "its last block is not full"
        more: dict[str, Any] = {"max_new_tokens": 800, "ignore_eos": True}
        generation = system.client.generate(chat(_TEXT), session_id=talking, **more)
        deltas = aiter(generation)
        for _ in range(20):
            await anext(deltas)
        left = asyncio.create_task(asyncio.to_thread(leaving.leave, within_s=20))
        await generation.read()
        await left
        assert generation.finished is not None
        assert generation.finished.receipt.worker_id == staying
        assert generation.finished.receipt.redis_tokens > 0
        assert len(generation.token_ids) == 800
        assert truth.confirms(await system.client.get_session(talking, with_token_ids=True))
        turn = await system.say(chat("Where are we?"), hot)
        assert turn.receipt.worker_id == staying
        assert turn.receipt.redis_tokens + turn.receipt.device_tokens + turn.receipt.host_tokens == num_kv


@pytest.fixture
def old_and_new(redis_server: RedisServer) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Two versions of a model: the same shape and tokenizer, other weights."""
    with ExitStack() as stack:
        old, new = (
            stack.enter_context(WorkerProcess(name, redis_url=redis_server.url, preset_seed=seed))
            for name, seed in (("old", 0), ("new", 1))
        )
        yield old, new


async def test_old_and_new_models_serve_side_by_side_and_exchange_no_block(
    redis_url: str, old_and_new: tuple[WorkerProcess, WorkerProcess], truth: Truth
) -> None:
    old = old_and_new[0]
    async with running_system(redis_url, old_and_new) as system:
        sessions = {name: session_for(name, ["old", "new"]) for name in ("old", "new")}
        first = {}
        for name, session_id in sessions.items():
            await system.client.create_session(session_id)
            first[name] = await system.say(chat(name + _TEXT), session_id)
            assert first[name].receipt.worker_id == name
        assert first["old"].finished.usage.prompt_tokens == first["new"].finished.usage.prompt_tokens
        assert first["old"].token_ids != first["new"].token_ids
        models = {name: (await system.client.get_session(id)).model for name, id in sessions.items()}
        assert len(set(models.values())) == 2
        for name, session_id in sessions.items():  # each stays with its model, wherever its KV is
            await system.client.park_session(session_id, drop_host=True)
            turn = await system.say(chat("And on it goes."), session_id)
            assert turn.receipt.worker_id == name
            assert turn.receipt.redis_tokens > 0
        await system.client.park_session(sessions["old"], drop_host=True)
        await asyncio.to_thread(old.leave, within_s=20)

        async def is_noticed() -> bool:
            return not await system.is_serving("worker/old")

        await eventually(is_noticed)
        moved = await system.say(chat("Who are you?"), sessions["old"])
        assert moved.receipt.worker_id == "new"
        below = moved.receipt.host_tokens + moved.receipt.redis_tokens + moved.receipt.device_tokens
        reasons = {miss.reason for miss in moved.receipt.misses}
        assert below == 0, "KV of the old model"
        assert pb.MISS_REASON_FOREIGN not in reasons, "it is not even found"
        session = await system.client.get_session(sessions["old"], with_token_ids=True)
        assert session.model == models["new"]
        assert not truth.confirms(session), "the truth is the old model's"
        again = await system.say(chat("And now?"), sessions["old"])
        assert again.receipt.device_tokens > 0
