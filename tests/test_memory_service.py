"""Banks through the front door: the clients, real gRPC, a front end, and workers that embed without a model."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import rekindle_memory_pb2 as mpb
from protos import rekindle_pb2 as pb
from protos.rekindle_memory_pb2_grpc import MemoryStub
from rekindle.client import Client
from rekindle.errors import AlreadyExists, BadInput, Denied, NotFound, Overloaded, RekindleError
from rekindle.sync_client import Client as PlainClient
from tests.fake_worker import FrontEnd, field_of, front_end
from tests.systems import eventually
from tests.test_api_keys import add_key

DOGS = "Rex is the dog of Ana."
CATS = "The cat of Ana is called Mia."


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end(1) as front:
        yield front


@pytest.fixture
async def client(front: FrontEnd) -> AsyncIterator[Client]:
    async with Client(front.app.address) as client:
        yield client


async def embeds_by(front: FrontEnd, embedder: str) -> None:
    """Give the worker another embedding model, or none."""

    async def is_known() -> bool:
        return front.app.directory.living()[0].description.embedder == embedder

    front.workers["0"].embedder = embedder
    await eventually(is_known)


async def test_a_bank_is_made_shown_listed_and_deleted(client: Client) -> None:
    made = await client.memory.create_bank("notes", description="of mine", read_tokens=100, diversity=0.0)
    assert (made.name, made.description, made.entries, made.embedder) == ("notes", "of mine", 0, "")
    assert (made.settings.read_tokens, made.settings.diversity, made.settings.chunk_tokens) == (100, 0.0, 128)
    await client.memory.remember("notes", DOGS)
    shown = await client.memory.get_bank("notes")
    assert (shown.entries, shown.embedder, shown.embedding_dim) == (1, "fa4e", 64)
    for number in range(3):
        await client.memory.create_bank(f"more-{number}")
    assert [bank.name async for bank in client.memory.list_banks(page_size=2)] == [
        "more-0",
        "more-1",
        "more-2",
        "notes",
    ]
    with pytest.raises(AlreadyExists, match="notes"):
        await client.memory.create_bank("notes")
    assert await client.memory.delete_bank("notes") == 1
    with pytest.raises(NotFound, match="notes"):
        await client.memory.get_bank("notes")


async def test_what_is_remembered_is_recalled_best_first(client: Client) -> None:
    await client.memory.create_bank("notes")
    dog = await client.memory.remember("notes", DOGS, metadata={"of": "dogs"}, importance=0.5)
    await client.memory.remember("notes", CATS, metadata={"of": "cats"})
    assert (dog.kind, dog.importance, dict(dog.metadata)) == (mpb.ENTRY_KIND_FACT, 0.5, {"of": "dogs"})
    assert (await client.memory.remember("notes", DOGS, metadata={"of": "dogs"})).id == dog.id
    best, second = await client.memory.recall("notes", "the cat called Mia")
    assert (best.entry.text, second.entry.text) == (CATS, DOGS)
    assert best.score > second.score
    assert best.cosine > 0.5
    only = mpb.EntryFilter(metadata={"of": "dogs"}, kinds=[mpb.ENTRY_KIND_FACT])
    assert [one.entry.id for one in await client.memory.recall("notes", "the cat", where=only)] == [dog.id]
    assert len(await client.memory.recall("notes", "the cat", k=1)) == 1


async def test_a_correction_stands_in_place_of_what_it_corrects(client: Client) -> None:
    await client.memory.create_bank("notes")
    old = await client.memory.remember("notes", "Ana lives in Rome.")
    new = await client.memory.remember("notes", "Ana lives in Oslo.", supersedes=[old.id])
    assert [one.entry.id for one in await client.memory.recall("notes", "Ana lives")] == [new.id]
    everything = await client.memory.recall("notes", "Ana lives", with_superseded=True)
    assert {one.entry.id: one.entry.superseded_by for one in everything} == {old.id: new.id, new.id: ""}


async def test_documents_come_in_chunks_with_progress_and_once(client: Client) -> None:
    await client.memory.create_bank("library", chunk_tokens=16, overlap_tokens=4)
    words = " ".join(f"word{number}" for number in range(60))
    documents = [mpb.Document(id="long", text=words), mpb.Document(text=CATS, metadata={"of": "cats"})]
    done = [progress async for progress in client.memory.put_documents("library", documents)]
    assert [(one.documents_done, one.documents_in_all) for one in done] == [(1, 2), (2, 2)]
    assert done[0].document_id == "long"
    assert done[0].chunks == done[0].new_chunks > 3
    again = [progress async for progress in client.memory.put_documents("library", documents)]
    assert [one.new_chunks for one in again] == [0, 0]
    (best,) = await client.memory.recall("library", "word30 word31", k=1)
    assert (best.entry.document_id, best.entry.kind) == ("long", mpb.ENTRY_KIND_DOCUMENT)
    assert (await client.memory.get_bank("library")).documents == 2


async def test_entries_are_forgotten_by_id_and_by_filter(client: Client) -> None:
    await client.memory.create_bank("notes")
    dog = await client.memory.remember("notes", DOGS)
    await client.memory.remember("notes", CATS, metadata={"of": "cats"})
    assert await client.memory.forget("notes", ids=[dog.id]) == 1
    assert await client.memory.forget("notes", where=mpb.EntryFilter(metadata={"of": "cats"})) == 1
    assert (await client.memory.get_bank("notes")).entries == 0
    with pytest.raises(BadInput) as refused:
        await client.memory.forget("notes")
    assert refused.value.field == "ids"


@pytest.mark.parametrize("with_vectors", [False, True], ids=["text", "vectors"])
async def test_a_bank_goes_out_as_lines_and_comes_back_in_pieces(client: Client, with_vectors: bool) -> None:
    for name in ("notes", "copy"):
        await client.memory.create_bank(name)
    texts = [f"Ana has {number} dogs." for number in range(30)]
    for text in texts:
        await client.memory.remember("notes", text)
    exported = b"".join([piece async for piece in client.memory.export_bank("notes", with_vectors=with_vectors)])
    assert [json.loads(line)["text"] for line in exported.splitlines()] == texts
    pieces = [exported[start : start + 1000] for start in range(0, len(exported), 1000)]
    imported = await client.memory.import_bank("copy", pieces)
    assert (imported.entries, imported.new_entries) == (30, 30)
    again = await client.memory.import_bank("copy", [exported])
    assert (again.entries, again.new_entries) == (30, 0)


async def test_a_bank_of_another_embedder_says_how_to_make_its_vectors_anew(front: FrontEnd, client: Client) -> None:
    await client.memory.create_bank("notes")
    await client.memory.remember("notes", DOGS)
    await embeds_by(front, "beef")
    with pytest.raises(RekindleError, match="rekindle memory reembed notes") as refused:
        await client.memory.recall("notes", "dogs")
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    done = [progress async for progress in client.memory.reembed("notes")]
    assert (done[-1].entries_done, done[-1].entries_in_all) == (1, 1)
    assert (await client.memory.recall("notes", "dogs"))[0].entry.text == DOGS


async def test_without_an_embedding_model_nothing_is_remembered_and_it_says_why(
    front: FrontEnd, client: Client
) -> None:
    await client.memory.create_bank("notes")
    await embeds_by(front, "")
    with pytest.raises(RekindleError, match="no worker has an embedding model"):
        await client.memory.remember("notes", DOGS)


BAD_FIELDS = [
    ("CreateBank", mpb.CreateBankRequest(name="no good"), "name"),
    ("CreateBank", mpb.CreateBankRequest(name="b", settings=mpb.BankSettings(diversity=2)), "settings.diversity"),
    ("Remember", mpb.RememberRequest(bank="notes", text=" "), "text"),
    ("Remember", mpb.RememberRequest(bank="notes", text="a", importance=2), "importance"),
    ("Recall", mpb.RecallRequest(bank="notes", query=""), "query"),
    ("Recall", mpb.RecallRequest(bank="notes", query="a", k=101), "k"),
    ("Recall", mpb.RecallRequest(bank="notes", query="a", filter=mpb.EntryFilter(kinds=[9])), "filter.kinds"),  # type: ignore[list-item]
    ("ListBanks", mpb.ListBanksRequest(page_size=1001), "page_size"),
]


async def test_bad_fields_are_refused_by_name(front: FrontEnd) -> None:
    stub = MemoryStub(front.channel)  # type: ignore[no-untyped-call]
    await stub.CreateBank(mpb.CreateBankRequest(name="notes"))
    for method, request, field in BAD_FIELDS:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(stub, method)(request)
        assert (refused.value.code(), field_of(refused.value)) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_an_import_that_is_no_message_or_names_no_bank_is_refused(front: FrontEnd) -> None:
    raw: Any = front.channel.stream_unary("/rekindle.v1.Memory/ImportBank", None, None)
    for sent in ([b"\xff\xff"], [], [mpb.ImportBankRequest(lines=b"{}\n").SerializeToString()]):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await raw(iter(sent))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tenants_have_banks_of_their_own_within_their_limit(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = {tenant: add_key(file, tenant, operator=tenant == "operators") for tenant in ("acme", "other", "operators")}
    with file.open("a") as keys_file:
        keys_file.write("[tenants.acme]\nmax_banks = 2\n")
    async with front_end(1, api_keys=str(file)) as front:
        async with Client(front.app.address, api_key=keys["acme"]) as acme:
            await acme.memory.create_bank("notes")
            await acme.memory.remember("notes", DOGS)
            await acme.memory.create_bank("more")
            with pytest.raises(Overloaded, match="max_banks: this tenant may have 2"):
                await acme.memory.create_bank("too-many")
        async with Client(front.app.address, api_key=keys["other"]) as other:
            with pytest.raises(NotFound):
                await other.memory.recall("notes", "dogs")
            with pytest.raises(NotFound, match="notes"):
                await other.create_session("s", banks={"notes": "read"})
            assert [bank async for bank in other.memory.list_banks()] == []
        async with Client(front.app.address, api_key=keys["operators"]) as operators:
            erased = await operators.erase_tenant("acme")
            assert (erased.banks, erased.entries) == (2, 1)
            assert (await operators.erase_tenant("acme")).banks == 0
        async with Client(front.app.address) as nobody:
            with pytest.raises(Denied):
                await nobody.memory.create_bank("notes")
            with pytest.raises(Denied):
                await nobody.memory.import_bank("notes", [b"{}\n"])


async def test_sessions_show_their_banks_and_change_them(front: FrontEnd, client: Client) -> None:
    for name in ("notes", "log"):
        await client.memory.create_bank(name)
    made = await client.create_session("s", banks={"notes": "read", "log": "write"}, context_policy="recall")
    assert [(one.bank, one.access) for one in made.banks] == [
        ("notes", pb.BANK_ACCESS_READ),
        ("log", pb.BANK_ACCESS_WRITE),
    ]
    assert made.context_policy == pb.CONTEXT_POLICY_RECALL
    fork = await client.fork_session("s", new_session_id="fork")
    assert fork.banks == made.banks
    changed = await client.update_session("s", banks={"log": "read_write"})
    assert [(one.bank, one.access) for one in changed.banks] == [("log", pb.BANK_ACCESS_READ_WRITE)]
    assert (await client.update_session("s", ttl_s=50)).banks == changed.banks
    assert not (await client.update_session("s", banks={})).banks


BAD_ATTACHMENTS = {
    "banks[1].bank": [("notes", 1), ("notes", 2)],
    "banks[0].access": [("notes", 0)],
    "banks[0].bank": [("no good", 1)],
    "banks": [(f"b{number}", 1) for number in range(9)],
}


async def test_bad_attachments_are_refused_by_name(front: FrontEnd) -> None:
    for field, banks in BAD_ATTACHMENTS.items():
        attached = [pb.BankAttachment(bank=bank, access=access) for bank, access in banks]  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.new_session(banks=attached)
        assert (refused.value.code(), field_of(refused.value)) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_bank_that_is_not_there_can_not_be_attached(client: Client) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        await client.create_session("s", banks={"nowhere": "read"})
    await client.create_session("s")
    with pytest.raises(NotFound, match="nowhere"):
        await client.update_session("s", banks={"nowhere": "read"})


async def test_the_plain_client_has_banks_too(front: FrontEnd) -> None:
    def use() -> None:
        with PlainClient(front.app.address) as client:
            client.memory.create_bank("notes", chunk_tokens=64)
            assert client.memory.remember("notes", DOGS).text == DOGS
            (done,) = client.memory.put_documents("notes", [mpb.Document(text=CATS)])
            assert done.new_chunks == 1
            assert [bank.name for bank in client.memory.list_banks()] == ["notes"]
            assert {one.entry.text for one in client.memory.recall("notes", "Ana")} == {DOGS, CATS}
            lines = b"".join(client.memory.export_bank("notes"))
            assert client.memory.import_bank("notes", [lines]).new_entries == 0
            assert client.memory.delete_bank("notes") == 2

    await asyncio.to_thread(use)
