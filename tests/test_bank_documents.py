"""Documents and whole banks into a bank and out of it: the same for memory and Redis."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cache_store.bank_store import BankStore
from cache_store.banks import BankRecord, BankSettings, Entry, EntryFilter, EntryKind
from cache_store.errors import BankFull, EmbedderChanged, InvalidRequest
from cache_store.open_banks import open_banks
from server.banks import checks
from server.banks.keeper import BankKeeper, Document, DocumentDone, Imported
from server.errors import NoWorker
from tests.fake_embedding import FakeEmbedding
from tests.keyrings import keyring

SMALL = BankSettings(chunk_tokens=16, overlap_tokens=4)
LONG = " ".join(f"word{number}" for number in range(60))


@pytest.fixture(params=["memory", "redis", "sealed"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[BankStore]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")
    store = open_banks(url, keyring=keyring() if request.param == "sealed" else None)
    yield store
    await store.aclose()


@pytest.fixture
def embedding() -> FakeEmbedding:
    return FakeEmbedding()


@pytest.fixture
async def keeper(store: BankStore, embedding: FakeEmbedding) -> AsyncIterator[BankKeeper]:
    keeper = BankKeeper(store, embedding, max_entries=40)
    await keeper.create("t", "b", settings=SMALL)
    yield keeper
    await keeper.aclose()


async def put(keeper: BankKeeper, *documents: Document, bank: str = "b") -> list[DocumentDone]:
    return [done async for done in keeper.put_documents("t", bank, documents)]


async def chunks_of(keeper: BankKeeper, document_id: str, query: str = "word1") -> dict[int, str]:
    where = EntryFilter(document_id=document_id)
    recalled = await keeper.recall("t", "b", query, k=100, where=where)
    return {one.entry.chunk: one.entry.text for one in recalled}


async def exported(keeper: BankKeeper, *, with_vectors: bool = False, bank: str = "b") -> list[dict[str, Any]]:
    pieces = [piece async for piece in keeper.export("t", bank, with_vectors=with_vectors)]
    return [json.loads(line) for line in b"".join(pieces).splitlines()]


async def imported(keeper: BankKeeper, lines: Iterable[dict[str, Any]], bank: str = "b", size: int = 100) -> Imported:
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    return await keeper.import_lines("t", bank, pieces())


class Prefilled:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    async def prefill(self, bank: BankRecord, entries: Sequence[Entry]) -> int:
        self.entries += entries
        return len(entries)

    async def forget(self, bank: BankRecord, entries: Sequence[Entry]) -> None:
        raise AssertionError("nothing is forgotten")


async def test_chunks_are_prefilled_as_turns_will_read_them(store: BankStore, embedding: FakeEmbedding) -> None:
    prefilled, day_s = Prefilled(), 86_400.0
    keeper = BankKeeper(store, embedding, now=lambda: day_s, prefills=prefilled)
    bank = await keeper.create("t", "b", settings=replace(SMALL, kv_ttl_s=60))
    await put(keeper, Document(text=LONG, id="d"))
    day_s, prefilled.entries = 3 * day_s, []
    [done] = await put(keeper, Document(text=LONG + " and one more word", id="d"))
    assert done.prefilled_chunks == done.chunks > done.new_chunks > 0
    assert await store.entries(bank, [entry.id for entry in prefilled.entries]) == prefilled.entries
    await keeper.aclose()


async def test_a_document_is_cut_in_chunks_that_overlap_and_cover_it(keeper: BankKeeper) -> None:
    [done] = await put(keeper, Document(text=LONG, id="d", metadata={"by": "Ann"}))
    chunks = await chunks_of(keeper, "d")
    assert done == DocumentDone("d", 1, 1, len(chunks), len(chunks))
    assert sorted(chunks) == list(range(5))
    assert {word for text in chunks.values() for word in text.split()} == set(LONG.split())
    assert chunks[0].split()[-4:] == chunks[1].split()[:4]
    record = await keeper.get("t", "b")
    assert (record.entries, record.documents) == (5, 1)
    [best] = await keeper.recall("t", "b", "word17", k=1, where=EntryFilter(metadata={"by": "Ann"}))
    assert best.entry.kind is EntryKind.DOCUMENT
    assert best.entry.document_id == "d"


async def test_a_document_that_is_there_needs_no_worker(keeper: BankKeeper, embedding: FakeEmbedding) -> None:
    [first, unnamed] = await put(keeper, Document(text=LONG, id="d"), Document(text="word1 alone"))
    embedding.error = NoWorker("nobody embeds")
    again = await put(keeper, Document(text=LONG, id="d"), Document(text="word1 alone"))
    assert again == [DocumentDone("d", 1, 2, 0, 0), DocumentDone(unnamed.document_id, 2, 2, 0, 0)]
    with pytest.raises(NoWorker):
        await put(keeper, Document(text=LONG, id="another"))
    assert first.new_chunks == 5


async def test_a_document_with_another_content_replaces_what_it_was(keeper: BankKeeper) -> None:
    await put(keeper, Document(text=LONG, id="d"))
    [done] = await put(keeper, Document(text=LONG + " and word60", id="d"))
    assert 0 < done.new_chunks < done.chunks
    chunks = await chunks_of(keeper, "d")
    assert chunks[len(chunks) - 1].endswith("word60")
    assert len(chunks) == done.chunks == (await keeper.get("t", "b")).entries
    await put(keeper, Document(text="word1 is all", id="d"))
    assert await chunks_of(keeper, "d") == {0: "word1 is all"}
    assert (await keeper.get("t", "b")).documents == 1


async def test_a_reader_sees_the_old_document_or_the_new_one_and_never_neither(keeper: BankKeeper) -> None:
    versions = [" ".join(f"v{version} word{number}" for number in range(40)) for version in range(4)]
    await put(keeper, Document(text=versions[0], id="d"))
    seen = set()

    async def read() -> None:
        while True:
            chunks = await chunks_of(keeper, "d")
            [version] = {word for text in chunks.values() for word in text.split() if word.startswith("v")}
            assert sorted(chunks) == list(range(7))
            seen.add(version)
            await asyncio.sleep(0)

    reader = asyncio.create_task(read())
    for _ in range(2):
        for text in versions:
            await put(keeper, Document(text=text, id="d"))
            await asyncio.sleep(0.03)  # some searches long
    assert not reader.done(), reader.exception()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert len(seen) > 1


async def test_a_document_of_which_a_chunk_was_forgotten_is_put_again(keeper: BankKeeper) -> None:
    await put(keeper, Document(text=LONG, id="d"))
    [one] = await keeper.recall("t", "b", "word17", k=1)
    assert await keeper.forget("t", "b", ids=[one.entry.id]) == 1
    [done] = await put(keeper, Document(text=LONG, id="d"))
    assert (done.chunks, done.new_chunks) == (5, 1)
    assert await keeper.forget("t", "b", where=EntryFilter(document_id="d")) == 5
    record = await keeper.get("t", "b")
    assert (record.entries, record.documents) == (0, 0)


async def test_a_document_that_fits_no_more_leaves_nothing_to_see(keeper: BankKeeper) -> None:
    with pytest.raises(BankFull):
        await put(keeper, Document(text=" ".join([LONG] * 10), id="d"))
    record = await keeper.get("t", "b")
    assert (record.entries, record.documents) == (0, 0)
    assert await chunks_of(keeper, "d") == {}


async def test_a_document_of_too_many_chunks_is_refused_by_name(
    keeper: BankKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(keeper, Document(text=LONG, id="d"))
    lines = await exported(keeper)
    await keeper.create("t", "copy", settings=SMALL)
    monkeypatch.setattr(checks, "MAX_CHUNKS", 4)
    with pytest.raises(InvalidRequest, match=r"documents\[0\]\.text: has 5 chunks"):
        await put(keeper, Document(text=LONG, id="another"))
    with pytest.raises(InvalidRequest, match="document d: has 5 chunks"):
        await imported(keeper, lines, "copy")
    assert (await keeper.get("t", "copy")).entries == 0


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (Document(text="", id="d"), "documents[1].text"),
        (Document(text="x" * (16 * 2**20 + 1)), "documents[1].text"),
        (Document(text="x", id="a/b"), "documents[1].id"),
        (Document(text="x", metadata={"k": "v" * 1025}), "documents[1].metadata[k]"),
        (Document(text="x", importance=2), "documents[1].importance"),
    ],
)
async def test_documents_are_checked_before_any_is_put(keeper: BankKeeper, document: Document, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await put(keeper, Document(text="good"), document)
    assert caught.value.field == field
    assert (await keeper.get("t", "b")).entries == 0
    with pytest.raises(InvalidRequest, match="documents: must be"):
        await put(keeper)


async def filled(keeper: BankKeeper) -> list[dict[str, Any]]:
    """A bank with some of everything; what is exported of it."""
    old = await keeper.remember("t", "b", text="Ann lives in Rome", metadata={"who": "Ann ü"}, importance=0.75)
    middle = await keeper.remember("t", "b", text="Ann lives in Bern", metadata={}, supersedes=[old.id])
    await keeper.remember("t", "b", text="Ann lives in Oslo", metadata={}, supersedes=[middle.id])
    await keeper.remember("t", "b", text="said", metadata={}, kind=EntryKind.EPISODE, session_id="s", turn=4)
    await put(keeper, Document(text=LONG, id="d", metadata={"by": "Bob"}))
    await keeper.recall("t", "b", "said", k=1)
    await keeper._uses.flush()
    return await exported(keeper, with_vectors=True)


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without ids, which belong to a bank; who supersedes is named by its text. The same vectors to 6 digits."""
    texts = {line["id"]: line["text"] for line in lines}
    kept = []
    for line in lines:
        line = {name: value for name, value in line.items() if name not in ("id", "vector")}
        if "superseded_by" in line:
            line["superseded_by"] = texts[line["superseded_by"]]
        kept.append(line)
    return sorted(kept, key=lambda line: (line["created_ms"], line["text"]))


@pytest.mark.parametrize("with_vectors", [True, False])
async def test_an_exported_bank_is_the_same_once_imported(
    keeper: BankKeeper, embedding: FakeEmbedding, with_vectors: bool
) -> None:
    lines = await filled(keeper)
    await keeper.create("t", "copy", settings=SMALL)
    sent = lines if with_vectors else await exported(keeper)
    assert with_vectors or "vector" not in sent[0]
    embedding.texts.clear()
    assert await imported(keeper, sent, "copy") == Imported(9, 9)
    assert len(embedding.texts) <= (1 if with_vectors else 10)
    copy = await exported(keeper, with_vectors=True, bank="copy")
    assert comparable(copy) == comparable(lines)
    assert (await keeper.get("t", "copy")).documents == 1
    [done] = await put(keeper, Document(text=LONG, id="d", metadata={"by": "Bob"}), bank="copy")
    assert done.new_chunks == 0
    assert await imported(keeper, sent, "copy") == Imported(9, 0)
    assert comparable(await exported(keeper, with_vectors=True, bank="copy")) == comparable(lines)


async def test_an_import_into_the_same_bank_changes_nothing_and_needs_no_worker(
    keeper: BankKeeper, embedding: FakeEmbedding
) -> None:
    lines = await filled(keeper)
    before = await keeper.get("t", "b")
    embedding.error = NoWorker("nobody embeds")
    assert await imported(keeper, reversed(lines)) == Imported(9, 0)
    assert await keeper.get("t", "b") == before


async def test_vectors_of_another_embedder_are_made_anew(keeper: BankKeeper, embedding: FakeEmbedding) -> None:
    lines = await filled(keeper)
    embedding.embedder, embedding.dim = "other", 24
    await keeper.create("t", "copy", settings=SMALL)
    await imported(keeper, lines, "copy")
    record = await keeper.get("t", "copy")
    assert (record.embedder, record.embedding_dim, record.entries) == ("other", 24, 9)
    with pytest.raises(EmbedderChanged):
        await imported(keeper, [{"text": "new and without a vector"}])


async def test_an_imported_correction_never_brings_back_what_was_corrected_here(keeper: BankKeeper) -> None:
    lines = await filled(keeper)
    rome, bern = (next(line["id"] for line in lines if line["text"].endswith(city)) for city in ("Rome", "Bern"))
    await keeper.remember("t", "b", text="Ann lives in Rome", metadata={"who": "Ann ü"}, supersedes=[bern])
    await imported(keeper, lines)
    standing = {line["id"] for line in await exported(keeper) if "superseded_by" not in line}
    assert rome in standing
    assert bern not in standing


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("no json", "lines[1]"),
        ("[1]", "lines[1]"),
        ('{"text": ""}', "lines[1].text"),
        ('{"text": 5}', "lines[1].text"),
        ('{"text": "x", "kind": "rumour"}', "lines[1].kind"),
        ('{"text": "x", "metadata": {"a": 1}}', "lines[1].metadata"),
        ('{"text": "x", "importance": 1.5}', "lines[1].importance"),
        ('{"text": "x", "importance": true}', "lines[1].importance"),
        ('{"text": "x", "created_ms": -1}', "lines[1].created_ms"),
        ('{"text": "x", "recalls": 1e400}', "lines[1].recalls"),
        ('{"text": "x", "kind": "document"}', "lines[1].document_id"),
        ('{"text": "x", "vector": "AAA"}', "lines[1].vector"),
        ('{"text": "x", "vector": "AAAAAA=="}', "lines[1].vector"),
        ('{"text": "x", "vector": "AADAfw=="}', "lines[1].vector"),
        ('{"text": "x", "embedder": "fa4e", "vector": "AACAPw=="}', "lines[1].vector"),
    ],
)
async def test_a_line_that_is_no_entry_is_refused_by_its_number_and_field(
    keeper: BankKeeper, line: str, field: str
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"text": "good"}\n' + line.encode()

    with pytest.raises(InvalidRequest) as caught:
        await keeper.import_lines("t", "b", pieces())
    assert caught.value.field == field


async def test_a_line_without_end_and_corrections_in_a_circle_are_refused(keeper: BankKeeper) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100_000

    with pytest.raises(InvalidRequest, match="at most"):
        await keeper.import_lines("t", "b", pieces())
    lines = [{"id": str(number), "text": f"t{number}", "superseded_by": str((number + 1) % 3)} for number in range(3)]
    with pytest.raises(InvalidRequest, match="circle"):
        await imported(keeper, lines)


async def test_what_is_remembered_while_all_vectors_are_made_anew_has_one_too(
    keeper: BankKeeper, embedding: FakeEmbedding, store: BankStore
) -> None:
    for number in range(30):
        await keeper.remember("t", "b", text=f"fact {number}", metadata={})
    old = BankKeeper(store, FakeEmbedding())
    embedding.embedder, embedding.dim = "other", 32
    steps = keeper.reembed("t", "b")
    await anext(steps)
    await old.remember("t", "b", text="fact late", metadata={})  # by a front end that still has the other workers
    assert (await old.recall("t", "b", "fact late"))[0].entry.text == "fact late"
    assert [step async for step in steps][-1] == (31, 31)
    assert (await keeper.recall("t", "b", "fact late"))[0].entry.text == "fact late"
    with pytest.raises(EmbedderChanged):
        await old.recall("t", "b", "fact late")
    await old.aclose()
