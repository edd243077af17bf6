"""What is done to sessions between their turns, through the whole path, and what it leaves in each tier."""

import asyncio

import pytest
import redis.asyncio

from cache_store.frame import HEADER_BYTES
from protos import rekindle_pb2 as pb
from rekindle.errors import NotFound
from tests.systems import BLOCK_TOKENS, System, Truth, block_keys, chat, eventually


async def new_session(system: System, *said: str) -> str:
    """A session that has had these turns."""
    session_id = (await system.client.create_session()).session_id
    for words in said:
        await system.say(chat(words), session_id)
    return session_id


async def with_tokens(system: System, session_id: str) -> pb.Session:
    return await system.client.get_session(session_id, with_token_ids=True)


async def held(system: System, session_id: str) -> dict[tuple[int, str], int]:
    """The session's tokens by tier and worker."""
    session = await system.client.get_session(session_id, with_residency=True)
    return {(where.tier, where.worker_id): where.tokens for where in session.residency}


async def test_a_fork_shares_its_parents_kv_and_goes_its_own_way(system: System, truth: Truth) -> None:
    parent_id = await new_session(system, "A path in the wood.", "It forks.", "We take the left one.")
    parent = await system.client.get_session(parent_id)
    fork = await system.client.fork_session(parent_id, at_turn=2)
    assert (fork.parent_session_id, fork.parent_turn, len(fork.turns)) == (parent_id, 2, 2)
    turn = await system.say(chat("We take the right one."), fork.session_id)
    # The parent has gone on, and filled the block that the second turn had ended in.
    assert turn.receipt.device_tokens >= parent.turns[1].end // BLOCK_TOKENS * BLOCK_TOKENS
    await system.say(chat("And on we go."), parent_id)
    left, right = await with_tokens(system, parent_id), await with_tokens(system, fork.session_id)
    assert left.token_ids[: parent.turns[1].end] == right.token_ids[: parent.turns[1].end]
    assert (len(left.turns), len(right.turns)) == (4, 3)
    assert truth.confirms(left)
    assert truth.confirms(right)


async def test_a_fork_at_the_last_turn_finds_all_of_it_and_one_at_no_turn_begins_anew(system: System) -> None:
    parent_id = await new_session(system, "Where do forks begin?")
    parent = await system.client.get_session(parent_id)
    whole = await system.client.fork_session(parent_id, new_session_id="a-whole-fork")
    turn = await system.say(chat("Here."), whole.session_id)
    assert turn.receipt.device_tokens == parent.num_tokens - 1
    empty = await system.client.fork_session(parent_id, at_turn=0)
    assert (empty.num_tokens, len(empty.turns)) == (0, 0)
    with pytest.raises(NotFound):
        await system.client.fork_session("no-such-parent")


async def test_a_session_says_what_was_said_and_where_its_kv_is(system: System) -> None:
    session_id = (await system.client.create_session()).session_id
    turn = await system.say("Where are you?", session_id)
    kv = turn.finished.usage.prompt_tokens + turn.finished.usage.completion_tokens - 1
    full = kv // BLOCK_TOKENS * BLOCK_TOKENS
    worker_id = turn.receipt.worker_id
    hot = {(pb.TIER_DEVICE, worker_id): kv, (pb.TIER_HOST, worker_id): kv, (pb.TIER_REDIS, ""): full}

    async def written_behind() -> bool:
        return await held(system, session_id) == hot

    await eventually(written_behind)
    await system.client.park_session(session_id)
    assert await held(system, session_id) == {(pb.TIER_HOST, worker_id): kv, (pb.TIER_REDIS, ""): kv}
    await system.client.park_session(session_id, drop_host=True)
    assert await held(system, session_id) == {(pb.TIER_REDIS, ""): kv}
    session = await system.client.get_session(session_id, with_token_ids=True, with_text=True)
    assert session.text == "Where are you?" + turn.text
    assert list(session.token_ids[-len(turn.token_ids) :]) == turn.token_ids
    bare = await system.client.get_session(session_id)
    assert (len(bare.token_ids), bare.text, len(bare.residency), len(bare.turns)) == (0, "", 0, 1)


async def test_sessions_are_listed_in_pages_newest_first(system: System) -> None:
    ids = []
    for _ in range(5):
        ids.append((await system.client.create_session()).session_id)
        await asyncio.sleep(0.002)  # their age is told in milliseconds
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        page = await system.sessions.ListSessions(pb.ListSessionsRequest(page_size=2, page_token=token))
        pages.append([session.session_id for session in page.sessions])
        token = page.next_page_token
    assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
    assert [session.session_id async for session in system.client.list_sessions(page_size=2)] == ids[::-1]


async def test_warming_brings_a_parked_session_back_ahead_of_its_turn(system: System, truth: Truth) -> None:
    session_id = await new_session(system, "Warm me up before we go on.")
    kv = (await system.client.get_session(session_id)).num_tokens - 1
    await system.client.park_session(session_id, drop_host=True)
    warmed = await system.client.warm_session(session_id)
    assert warmed.device_tokens == warmed.restored_tokens == kv
    turn = await system.say(chat("That is better."), session_id)
    assert (turn.receipt.worker_id, turn.receipt.device_tokens) == (warmed.worker_id, kv)
    assert truth.confirms(await with_tokens(system, session_id))


async def test_a_user_who_types_finds_the_session_warm(system: System, truth: Truth) -> None:
    session_id = await new_session(system, "I will think about what to say next.")
    kv = (await system.client.get_session(session_id)).num_tokens - 1
    await system.client.park_session(session_id, drop_host=True)
    await system.client.get_session(session_id, user_is_typing=True)

    async def on_device() -> bool:
        places = await held(system, session_id)
        return kv in [tokens for (tier, _), tokens in places.items() if tier == pb.TIER_DEVICE]

    await eventually(on_device)
    turn = await system.say(chat("Now I know."), session_id)
    assert turn.receipt.device_tokens == kv
    assert truth.confirms(await with_tokens(system, session_id))


async def test_a_pinned_sessions_blocks_stay_for_ever_and_an_unpinned_ones_do_not(
    system: System, redis_url: str
) -> None:
    session_id = (await system.client.create_session(pinned=True)).session_id
    await system.say("Pin me to the wall, please, with a long pin", session_id)
    await system.client.park_session(session_id)
    keys = block_keys(await with_tokens(system, session_id))
    async with redis.asyncio.from_url(redis_url) as client:
        assert [await client.ttl(key) for key in keys] == [-1] * len(keys)
        assert not (await system.client.update_session(session_id, pinned=False)).pinned
        assert all([86_000 < await client.ttl(key) <= 86_400 for key in keys])
        assert (await system.client.update_session(session_id, pinned=True)).pinned
        assert [await client.ttl(key) for key in keys] == [-1] * len(keys)


async def test_a_session_with_a_time_to_live_goes_when_it_is_over(system: System) -> None:
    session_id = (await system.client.create_session(ttl_s=1)).session_id
    await system.say("Not long now", session_id)

    async def gone() -> bool:
        try:
            await system.client.get_session(session_id)
        except NotFound:
            return True
        return False

    assert not await gone()
    await eventually(gone, within_s=3)
    assert session_id not in [session.session_id async for session in system.client.list_sessions()]


async def test_a_deleted_session_is_gone_from_every_tier(system: System, redis_url: str) -> None:
    session_id = await new_session(system, "Forget me.", "All of me.")
    await system.client.park_session(session_id)
    await system.client.warm_session(session_id)
    session = await with_tokens(system, session_id)
    keys = block_keys(session)
    blocks = -(-(session.num_tokens - 1) // BLOCK_TOKENS)
    assert len(keys) == blocks
    async with redis.asyncio.from_url(redis_url) as client:
        assert await client.exists(*keys) == blocks
        deleted = await system.client.delete_session(session_id)
        assert deleted.tokens == session.num_tokens
        assert (deleted.device_blocks, deleted.host_blocks, deleted.redis_blocks) == (blocks, blocks, blocks)
        assert await client.exists(*keys) == 0
        assert [key async for key in client.scan_iter(f"*{session_id}*")] == []
    with pytest.raises(NotFound):
        await system.client.get_session(session_id)
    again = (await system.client.create_session(session_id)).session_id
    turn = await system.say([*session.token_ids, 9], again)
    assert turn.receipt.computed_tokens == session.num_tokens + 1


@pytest.mark.parametrize("codec", ["lossless", "int8", "ladder"])
async def test_sessions_of_any_codec_are_parked_shown_resumed_forked_and_deleted(
    system: System, redis_url: str, codec: str
) -> None:
    client, name = system.client, f"kept-{codec}"
    await client.create_session(name, codec=codec)
    await system.say(f"Kept as {codec}, and long enough to fill a few blocks of tokens.", name)
    session = await with_tokens(system, name)
    num_kv = session.num_tokens - 1
    assert (await client.park_session(name, drop_host=True)).redis_tokens == num_kv
    parked = await client.get_session(name, with_residency=True)
    assert {residency.tier: residency.tokens for residency in parked.residency} == {pb.TIER_REDIS: num_kv}
    keys = block_keys(session)
    async with redis.asyncio.Redis.from_url(redis_url) as store:
        assert await store.exists(*keys) == len(keys)
        stored = sum([await store.strlen(key) - HEADER_BYTES for key in keys])
        turn = await system.say(" and on", name)
        assert turn.receipt.redis_tokens == num_kv
        assert turn.receipt.restored_bytes == stored
        fork = await client.fork_session(name, at_turn=1)
        elsewhere = await system.say(" and elsewhere", fork.session_id)
        assert elsewhere.receipt.device_tokens >= num_kv // BLOCK_TOKENS * BLOCK_TOKENS, "shared with its parent"
        deleted = await client.delete_session(name)
        assert deleted.redis_blocks >= len(keys) - 1
        assert not await store.exists(*keys[:-1])
    await client.delete_session(fork.session_id)
