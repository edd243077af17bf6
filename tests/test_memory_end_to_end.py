"""Banks with the shipped model and the embedder that comes along: what one session was told, another one knows."""

from collections.abc import Iterator

import pytest

from cache_store.embedded_redis import RedisServer
from protos import rekindle_memory_pb2 as mpb
from tests.systems import WorkerProcess, chat, eventually, running_system

HANDBOOK = {
    "hours": "The workshop is open from nine to five on weekdays. On Saturdays it closes at noon.",
    "safety": "Wear goggles at the lathe. The fire extinguisher hangs beside the north door.",
    "billing": "Invoices are sent on the first of each month and are due within thirty days.",
}


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[WorkerProcess]:
    with WorkerProcess("recalling", redis_url=redis_server.url, model="rekindle-recall") as worker:
        yield worker


async def test_what_was_said_or_put_in_a_bank_is_known_in_other_sessions(redis_url: str, worker: WorkerProcess) -> None:
    async with running_system(redis_url, [worker], memory_read_s=20.0) as system:
        client = system.client
        for bank in ("talk", "handbook"):
            await client.memory.create_bank(bank)
        await client.memory.create_bank("noted", write_facts=1)
        await client.create_session("first", banks={"talk": "write", "noted": "write"})
        await system.say(chat("My name is Walter."), "first", max_new_tokens=20)
        await system.say(chat("I like rainy days."), "first", max_new_tokens=20)

        async def is_remembered() -> bool:
            return (await client.memory.get_bank("talk")).entries == 2

        await eventually(is_remembered, within_s=30)

        async def is_noted() -> bool:
            told = [one.entry for one in await client.memory.recall("noted", "name", k=10)]
            facts = [entry for entry in told if entry.kind == mpb.ENTRY_KIND_FACT]
            return any("Walter" in fact.text and (fact.session_id, fact.turn) == ("first", 1) for fact in facts)

        await eventually(is_noted, within_s=30)
        await client.create_session("second", banks={"talk": "read", "handbook": "read"})
        turn = await system.say(chat("Do you know my name?"), "second", max_new_tokens=20)
        best = turn.finished.receipt.memories[0]
        (told,) = (one.entry for one in await client.memory.recall("talk", "name", k=1))
        assert (best.bank, best.entry_id, told.session_id, told.turn) == ("talk", told.id, "first", 1)
        assert "Walter" in turn.text

        documents = [mpb.Document(id=name, text=text) for name, text in HANDBOOK.items()]
        assert [done.documents_done async for done in client.memory.put_documents("handbook", documents)] == [1, 2, 3]
        turn = await system.say(chat("Where is the fire extinguisher?"), "second", max_new_tokens=4)
        assert turn.finished.receipt.memories[0].document_id == "safety"
        session = await client.get_session("second", with_text=True)
        assert "beside the north door" in session.text
        assert sum(source.tokens for source in turn.finished.receipt.memories) < turn.finished.usage.input_tokens
