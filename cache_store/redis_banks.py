"""Banks in Redis, standalone or Cluster. What changes a bank is one script on its own keys.

A bank's keys share a hash tag, so they live in one slot, and none of them expires: a Redis that evicts what does
(volatile-lru) sheds blocks of KV, and never what is remembered. Each tenant has an index besides, a sorted set of names
and creation times: it may name banks that are gone (never miss one that is there), and is tidied when it is read.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from cache_store import bank_scripts as scripts
from cache_store import bank_staging_scripts as staging
from cache_store.bank_format import BankFormat
from cache_store.bank_keys import index_key, keys_of, member_of, parse_member, parse_token, token_of
from cache_store.bank_store import BankPage, Changes, Committed, Seen
from cache_store.bank_values import BankValues
from cache_store.banks import DEFAULT_MAX_ENTRIES, BankRecord, Entry, Kept, Supersession, Use, Vector
from cache_store.errors import (
    BankExists,
    BankFull,
    BankNotFound,
    EmbedderChanged,
    EntriesMissing,
    StoreError,
)
from cache_store.record_scripts import Script, run
from cache_store.redis_client import Asking, Client

_CREATING_MS: Final = 60_000
"""A name this young may be of a bank that is just being created: it is not tidied away."""
_STAGED_MS: Final = 3_600_000


class RedisBanks:
    """A `BankStore`. Every call ends within `timeout_s`."""

    def __init__(
        self,
        client: Client,
        *,
        timeout_s: float,
        bank_format: BankFormat,
        vector_sets: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """With `vector_sets` new banks get one, where the server has them: it keeps vectors in the clear."""
        self._client = client
        self._redis: Any = client.redis  # redis-py's own types don't agree with what its methods return
        self._asking = Asking(timeout_s)
        self._format = bank_format
        self._values = BankValues(bank_format)
        self._vector_sets = vector_sets
        self._now = now

    def name_of(self, tenant: str, bank: str, *parts: str) -> str:
        return self._format.name(tenant, bank, *parts)

    async def create(self, record: BankRecord) -> BankRecord:
        record = replace(record, incarnation=uuid.uuid4().hex)
        fields = {
            "incarnation": record.incarnation,
            "created_ms": record.created_ms,
            "about": self._format.about(record),
            "embedder": "",
            "dim": 0,
            "version": 0,
            "floor": 0,
        }
        async with self._asking(f"create bank {record.name}"):
            await self._redis.zadd(
                index_key(record.tenant), {member_of(record): 0}
            )  # first: it is listed if it is there
            args = [int(self._vector_sets), *_flat(fields.items())]
            status, has_near = await self._run(scripts.CREATE, record.tenant, record.name, "", *args)
        if status == b"EXISTS":
            raise BankExists(f"bank {record.name} exists")
        return replace(record, has_vector_set=bool(has_near))

    async def get(self, tenant: str, name: str) -> BankRecord:
        [record] = await self._ask(scripts.READ, tenant, name, doing="read")
        return self._record(tenant, name, record)

    async def page(self, tenant: str, *, page_size: int, page_token: str) -> BankPage:
        after = "(" + parse_token(page_token) if page_token else "-"
        records: list[BankRecord] = []
        async with self._asking("list banks"):
            while len(records) <= page_size:  # one more than asked for says whether there is another page
                wanted = page_size + 1 - len(records)
                members = await self._redis.zrangebylex(index_key(tenant), after, "+", start=0, num=wanted)
                records += await self._live(tenant, members)
                if len(members) < wanted:
                    break
                after = "(" + members[-1].decode()
        if len(records) <= page_size:
            return BankPage(records, "")
        last = member_of(records[page_size - 1])
        return BankPage(records[:page_size], token_of(last))

    async def delete(self, tenant: str, name: str) -> int:
        created_ms = (await self.get(tenant, name)).created_ms
        entries = await self._delete(tenant, name)
        async with self._asking("tidy the index of banks"):
            await self._redis.zrem(index_key(tenant), f"{name} {created_ms:015d}")
        return entries

    async def erase(self, tenant: str) -> int:
        """Also those that can't be read."""
        entries = 0
        async with self._asking("list banks"):
            members = await self._redis.zrange(index_key(tenant), 0, -1)
        for name in dict.fromkeys(parse_member(member)[0] for member in members):
            try:
                entries += await self._delete(tenant, name)
            except BankNotFound:
                continue
        if members:
            async with self._asking("tidy the index of banks"):
                await self._redis.zrem(index_key(tenant), *members)
        return entries

    async def add(
        self,
        bank: BankRecord,
        kept: Sequence[Kept],
        *,
        embedder: str,
        supersedes: Sequence[Supersession] = (),
        stands: str = "",
        max_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> list[bool]:
        values = await self._values.written(bank, embedder, kept)
        args = [embedder, _dim(kept), max_entries, stands, len(kept), *values, *_flat(supersedes)]
        [is_new] = await self._change(scripts.ADD, bank, *args, embedder=embedder, max_entries=max_entries)
        return [bool(one) for one in is_new]

    async def stage(self, bank: BankRecord, kept: Sequence[Kept], *, embedder: str, max_entries: int) -> None:
        values = await self._values.written(bank, embedder, kept)
        now_ms = int(self._now() * 1000)
        args = [embedder, _dim(kept), max_entries, now_ms, now_ms - _STAGED_MS, *values]
        await self._change(staging.STAGE, bank, *args, embedder=embedder, max_entries=max_entries)

    async def commit_document(self, bank: BankRecord, document_id: str, digest: str, ids: Sequence[str]) -> Committed:
        args = [self._document(bank, document_id), self._digest(bank, digest), *dict.fromkeys(ids)]
        new_entries, missing = await self._change(staging.COMMIT_DOCUMENT, bank, *args)
        return Committed(new_entries, [entry_id.decode() for entry_id in missing])

    async def has_document(self, bank: BankRecord, document_id: str, digest: str) -> bool:
        args = [self._document(bank, document_id), self._digest(bank, digest)]
        [has] = await self._change(staging.HAS_DOCUMENT, bank, *args)
        return bool(has)

    async def changes(self, tenant: str, name: str, seen: Seen, *, most: int) -> Changes:
        answer = await self._ask(scripts.CHANGES, tenant, name, *seen, most, doing="read what has changed in")
        record, version, begun, anew, is_last, gone, flat = answer
        bank = self._record(tenant, name, record)
        rows = [flat[at : at + 6] for at in range(0, len(flat), 6)]
        kept = await self._values.kept(bank, rows)
        now_seen = Seen(bank.incarnation, bank.embedder, version, begun)
        return Changes(bank, now_seen, bool(anew), kept, [entry_id.decode() for entry_id in gone], bool(is_last))

    async def entries(self, bank: BankRecord, ids: Sequence[str]) -> list[Entry | None]:
        [flat] = await self._change(scripts.ENTRIES, bank, *ids)
        rows = [(entry_id, *flat[4 * at : 4 * at + 4]) for at, entry_id in enumerate(ids)]
        return await self._values.entries(bank, rows)

    async def vectors(self, bank: BankRecord, ids: Sequence[str]) -> list[Vector | None]:
        [values] = await self._change(scripts.VECTORS, bank, bank.embedder, *ids, embedder=bank.embedder)
        return await self._values.vectors(bank, list(zip(ids, values, strict=True)))

    async def near(self, bank: BankRecord, vector: Vector, most: int) -> list[str]:
        key, packed = keys_of(bank.tenant, bank.name).near, vector.astype("<f4").tobytes()
        async with self._asking(f"search bank {bank.name}"):
            found = await self._redis.execute_command("VSIM", key, "FP32", packed, "COUNT", most)
        return [entry_id.decode() for entry_id in found]

    async def uses(self, bank: BankRecord, ids: Sequence[str]) -> list[Use]:
        [flat] = await self._change(scripts.USES, bank, *ids)
        return [Use(int(flat[at]), int(flat[at + 1])) for at in range(0, len(flat), 2)]

    async def add_uses(self, bank: BankRecord, uses: Mapping[str, Use]) -> None:
        await self._change(scripts.ADD_USES, bank, *_flat((entry_id, *use) for entry_id, use in uses.items()))

    async def remove(self, bank: BankRecord, entries: Sequence[Entry], *, unused_since_ms: int = 0) -> list[str]:
        documents = {self._document(bank, entry.document_id) for entry in entries if entry.document_id}
        args = [unused_since_ms, len(entries), *(entry.id for entry in entries), *documents]
        [removed] = await self._change(scripts.REMOVE, bank, *args)
        return [entry_id.decode() for entry_id in removed]

    async def begin_reembed(self, bank: BankRecord, embedder: str) -> None:
        await self._change(staging.BEGIN_REEMBED, bank, embedder)

    async def put_vectors(self, bank: BankRecord, embedder: str, vectors: Mapping[str, Vector]) -> None:
        values = await self._values.written_vectors(bank, embedder, vectors)
        await self._change(staging.PUT_VECTORS, bank, embedder, *values, embedder=embedder)

    async def finish_reembed(self, bank: BankRecord, embedder: str, dim: int, *, at_version: int) -> bool:
        [done] = await self._change(staging.FINISH_REEMBED, bank, embedder, dim, at_version, embedder=embedder)
        return bool(done)

    async def available(self) -> bool:
        try:
            async with self._asking("ping Redis"):
                await self._redis.ping()
        except StoreError:
            return False
        return True

    async def aclose(self) -> None:
        for client in (self._redis, *self._client.asked):
            await client.aclose()

    async def _delete(self, tenant: str, name: str) -> int:
        [entries] = await self._ask(scripts.DELETE, tenant, name, doing="delete")
        return int(entries)

    async def _live(self, tenant: str, members: Sequence[bytes]) -> list[BankRecord]:
        """The banks that the index names; names whose bank is gone are dropped."""
        named = [parse_member(member) for member in members]
        found = await asyncio.gather(*(self._run(scripts.READ, tenant, name, "") for name, _ in named))
        young_ms = int(self._now() * 1000) - _CREATING_MS
        records, gone = [], []
        for member, (name, created_ms), (status, *answer) in zip(members, named, found, strict=True):
            record = self._record(tenant, name, answer[0]) if status == b"OK" else None
            if record is not None and record.created_ms == created_ms:  # not a later bank of this name
                records.append(record)
            elif created_ms < young_ms:
                gone.append(member)
        if gone:
            await self._redis.zrem(index_key(tenant), *gone)
        return records

    async def _change(
        self, script: Script, bank: BankRecord, *args: Any, embedder: str = "", max_entries: int = 0
    ) -> list[Any]:
        """What a script answers about this very bank, if that is not an error."""
        async with self._asking(f"ask bank {bank.name}"):
            status, *answer = await self._run(script, bank.tenant, bank.name, bank.incarnation, *args)
        match status:
            case b"MISSING":
                raise BankNotFound(f"there is no bank {bank.name}, or another one of that name")
            case b"EMBEDDER":
                raise EmbedderChanged(bank.name, answer[0].decode(), embedder)
            case b"FULL":
                raise BankFull("max_bank_entries", max_entries)
            case b"ENTRIES":
                raise EntriesMissing(tuple(dict.fromkeys(entry_id.decode() for entry_id in answer)))
        return answer

    async def _ask(self, script: Script, tenant: str, name: str, *args: Any, doing: str) -> list[Any]:
        async with self._asking(f"{doing} bank {name}"):
            status, *answer = await self._run(script, tenant, name, "", *args)
        if status == b"MISSING":
            raise BankNotFound(f"there is no bank {name}")
        return answer

    async def _run(self, script: Script, tenant: str, name: str, *args: Any) -> list[Any]:
        answer: list[Any] = await run(self._redis, script, keys_of(tenant, name), *args)
        return answer

    def _record(self, tenant: str, name: str, record: list[Any]) -> BankRecord:
        meta, entries, documents = record
        return self._format.read_meta(tenant, name, dict(zip(meta[::2], meta[1::2], strict=True)), entries, documents)

    def _document(self, bank: BankRecord, document_id: str) -> str:
        return self.name_of(bank.tenant, bank.name, "document", document_id)

    def _digest(self, bank: BankRecord, digest: str) -> str:
        return self.name_of(bank.tenant, bank.name, "content", digest)


def _flat(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _dim(kept: Sequence[Kept]) -> int:
    return len(kept[0].vector) if kept else 0
