"""Banks that keep KV: what they know is prefilled once, and inserted into the turns that read it."""

from collections.abc import AsyncIterator
from itertools import count

import pytest

from cache_store.banks import Entry, EntryKind
from cache_store.record_format import pack_turn, read_turn
from cache_store.records import TurnRecord, inserts_of
from protos import rekindle_memory_pb2 as mpb
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from server.memory_text import element
from server.relay import history_of
from server.tenants import DEFAULT_TENANT
from tests.systems import System, WorkerProcess, chat, eventually, running_system

HANDBOOK = {
    "hours": "The workshop is open from nine to five on weekdays. On Saturdays it closes at noon.",
    "safety": "Wear goggles at the lathe. The fire extinguisher hangs beside the north door.",
    "billing": "Invoices are sent on the first of each month and are due within thirty days.",
}
QUESTION = chat("Where is the fire extinguisher?")


@pytest.fixture
async def system(redis_url: str, workers: tuple[WorkerProcess, WorkerProcess]) -> AsyncIterator[System]:
    async with running_system(redis_url, workers, memory_read_s=20.0) as system:
        await fill(system, "handbook", kv_ttl_s=3600)
        yield system


async def fill(system: System, bank: str, *, kv_ttl_s: int = 0) -> None:
    memory = system.client.memory
    await memory.create_bank(bank, kv_ttl_s=kv_ttl_s)
    documents = [mpb.Document(id=name, text=text) for name, text in HANDBOOK.items()]
    done = [progress async for progress in memory.put_documents(bank, documents)]
    assert [each.prefilled_chunks for each in done] == [bool(kv_ttl_s)] * 3


def inserted(receipt: pb.Receipt) -> int:
    """Tokens of it that were not computed, beyond the first ones of each insert."""
    bounds = receipt.insert_bounds
    return sum(end - start - 16 for start, end in zip(bounds[0::2], bounds[1::2], strict=True))


async def test_what_a_bank_keeps_is_inserted_and_not_computed(system: System) -> None:
    await fill(system, "plain")
    for session, bank, policy in (
        ("with", "handbook", "error"),
        ("without", "plain", "error"),
        ("beyond", "handbook", "window"),
    ):
        await system.client.create_session(session, banks={bank: "read"}, context_policy=policy)
    turn = (await system.say(QUESTION, "with")).finished
    assert len(turn.receipt.insert_bounds) == 2 * len(turn.receipt.memories) == 6
    assert turn.receipt.computed_tokens == turn.usage.prompt_tokens - inserted(turn.receipt)
    assert inserted(turn.receipt) > turn.usage.prompt_tokens / 2
    said = (await system.client.get_session("with", with_text=True)).text
    assert all(text in said for text in HANDBOOK.values())
    for other in ("without", "beyond"):
        turn = (await system.say(QUESTION, other)).finished
        assert len(turn.receipt.memories) == 3
        assert not turn.receipt.insert_bounds
        assert turn.receipt.computed_tokens >= turn.usage.prompt_tokens - 64  # but for what all of these begin with


async def test_a_session_with_inserts_goes_on_elsewhere_and_in_forks(
    system: System, redis_url: str, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    with WorkerProcess("elsewhere", redis_url=redis_url) as worker:
        await system.client.create_session("first", banks={"handbook": "read"})
        first = (await system.say(QUESTION, "first")).finished
        known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert (await system.client.park_session("first", drop_host=True)).redis_tokens == known
        fork = await system.client.fork_session("first", new_session_id="fork")
        async with running_system(redis_url, [worker], memory_read_s=20.0) as elsewhere:
            for session in ("first", fork.session_id):
                receipt = (await elsewhere.say(chat("Thanks"), session)).finished.receipt
                assert receipt.redis_tokens + receipt.host_tokens + receipt.device_tokens >= known
                assert list(receipt.insert_bounds[:6]) == list(first.receipt.insert_bounds)


async def test_the_kv_of_what_is_forgotten_goes_from_every_tier(
    system: System, redis_url: str, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    memory = system.client.memory
    found = [one.entry for one in await memory.recall("handbook", "fire extinguisher", k=3)]
    await memory.forget("handbook", ids=[entry.id for entry in found if entry.document_id == "safety"])
    known = system.application.directory.find(workers[0].worker_id)
    assert known is not None
    texts = [element("handbook", entry_of(entry)) for entry in found]
    request = wpb.DropPrefilledRequest(tenant=DEFAULT_TENANT, with_redis=True)
    for entry, text in zip(found, texts, strict=True):
        del request.texts[:]
        request.texts.append(text)
        left = await known.client.drop_prefilled(request)
        assert bool(left.redis_blocks) == (entry.document_id != "safety")


async def test_what_is_lost_is_computed_in_the_turn_and_prefilled_for_the_next(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    for worker in workers:
        known = system.application.directory.find(worker.worker_id)
        assert known is not None
        await known.client.erase(DEFAULT_TENANT, with_redis=True)
    numbers = count()

    async def ask() -> pb.Finished:
        session = f"session-{next(numbers)}"
        await system.client.create_session(session, banks={"handbook": "read"})
        return (await system.say(QUESTION, session)).finished

    turn = await ask()
    assert len(turn.receipt.memories) == 3
    assert not turn.receipt.insert_bounds
    assert turn.receipt.computed_tokens == turn.usage.prompt_tokens

    async def is_prefilled() -> bool:
        return len((await ask()).receipt.insert_bounds) == 6

    await eventually(is_prefilled, within_s=20)


async def test_a_session_is_deleted_under_the_names_that_it_had_before_inserts_were_lost(
    system: System, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    await system.client.create_session("first", banks={"handbook": "read"})
    await system.say(QUESTION, "first")
    await system.client.park_session("first")
    before = await system.application._records.get(DEFAULT_TENANT, "first")
    history, end = history_of(before), before.turns[0].insert_bounds[1]
    beginning = wpb.History(
        tenant=DEFAULT_TENANT, token_ids=before.token_ids[: end + 1], insert_bounds=history.insert_bounds[:2]
    )
    texts = [
        element("handbook", entry_of(one.entry)) for one in await system.client.memory.recall("handbook", "x", k=3)
    ]
    known = [system.application.directory.find(worker.worker_id) for worker in workers]
    clients = [worker.client for worker in known if worker is not None]
    for client in clients:
        await client.drop(beginning, with_redis=True)
        await client.drop_prefilled(wpb.DropPrefilledRequest(tenant=DEFAULT_TENANT, texts=texts, with_redis=True))
    assert not (await system.say(chat("Thanks"), "first")).receipt.insert_bounds
    assert (await clients[0].locate(history, with_redis=True)).redis_tokens > 0
    await system.client.delete_session("first")
    for client in clients:
        assert await client.locate(history, with_redis=True) == wpb.LocateReply()


def entry_of(entry: mpb.MemoryEntry) -> Entry:
    return Entry(
        id=entry.id,
        text=entry.text,
        kind=EntryKind(entry.kind),
        document_id=entry.document_id,
        created_ms=entry.created_ms,
    )


def turn_of(start: int, *bounds: int, lost: tuple[int, ...] = ()) -> TurnRecord:
    end = start + 100
    return TurnRecord(
        start=start,
        reply_start=end - 10,
        end=end,
        finish_reason=1,
        committed_ms=0,
        idempotency_key="key",
        insert_bounds=bounds,
        lost_inserts=lost,
    )


def test_a_record_says_what_is_inserted_as_of_each_turn() -> None:
    turns = [turn_of(0, 5, 30, 31, 60), turn_of(100), turn_of(200, 210, 250, lost=(5,)), turn_of(300, lost=(31, 210))]
    assert [read_turn(pack_turn(turn)) for turn in turns] == turns
    as_of_each = [inserts_of(turns[:number]) for number in range(5)]
    assert as_of_each == [(), (5, 30, 31, 60), (5, 30, 31, 60), (31, 60, 210, 250), ()]
