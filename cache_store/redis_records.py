"""Session records in Redis, standalone or Cluster. What changes a session is one script on its own keys.

A session's keys share a hash tag, so they live in one slot. Each tenant has an index besides, a sorted set of
creation time and id: it may name sessions that are gone (never miss one that is there), and is tidied when read.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from cache_store import record_scripts as scripts
from cache_store.attachments import BankAttachment
from cache_store.errors import (
    LimitReached,
    RecordUnreadable,
    SessionBusy,
    SessionExists,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
)
from cache_store.late_releases import LateReleases
from cache_store.record_format import Kept, PlainFormat, RecordFormat, Written, meta_fields, read_meta
from cache_store.record_scripts import Script
from cache_store.records import NO_QUOTA, Page, Quota, SessionRecord, TurnRecord, Usage
from cache_store.redis_client import Asking
from cache_store.redis_counts import RedisCounts
from cache_store.redis_index import Entry, cursor, index_key, member, parse_member, token_of
from cache_store.store import ServerInfo

_GONE_MS = 300_000
"""How long a released holder can't lock again: longer than what it sent stays on its way."""
_PAGE_ENTRIES = 500
_CREATING_MS = 60_000
"""An index entry this young may be of a record that is just being created: it is not tidied away."""


class _Keys(NamedTuple):
    """In the order of the scripts' KEYS."""

    meta: str
    tokens: str
    turns: str
    lock: str
    gone: str


class RedisRecords:
    """A `RecordStore`. `redis` must not decode responses; every call ends within `timeout_s`."""

    def __init__(
        self,
        redis: "Redis | RedisCluster",
        *,
        timeout_s: float,
        asked: Sequence[Redis] = (),
        record_format: RecordFormat | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`asked` are clients of the Sentinels that `redis` is found through, to be closed with it.

        Without a `record_format` records are kept in the clear.
        """
        self._redis: Any = redis  # redis-py's own types don't agree with what its methods return
        self._asked = asked
        self._asking = Asking(timeout_s)
        self._now = now
        self._format = record_format or PlainFormat()
        self._counts = RedisCounts(redis)
        self._late = LateReleases(self._release)

    async def create(self, record: SessionRecord, *, quota: Quota = NO_QUOTA) -> None:
        index, entry = index_key(record.tenant), member(record.created_ms, record.session_id)
        written = self._format.created(record)
        fields = [part for pair in (meta_fields(record) | _seal_field(written)).items() for part in pair]
        async with self._asking(f"create session {record.session_id}"):
            # Expired sessions leave the index when it is read; where nobody reads it, creating keeps it small.
            await self._live_metas(record.tenant, await self._redis.zrandmember(index, 2))
            await self._redis.zadd(index, {entry: 0})  # first: a session that is there, or counted, is always listed
            try:
                is_new = await self._counts.add(record.tenant, record.session_id, len(record.token_ids), quota)
            except LimitReached:
                await self._redis.zrem(index, entry)
                raise
            args = [uuid.uuid4().hex, written.tokens, len(written.entries), *written.entries, *fields]
            status, *_ = await self._run(scripts.CREATE, record.tenant, record.session_id, *args)
            if status == b"OK" and not is_new:  # one of this id had expired
                await self._counts.set(record.tenant, record.session_id, len(record.token_ids))
        if status == b"EXISTS":
            raise SessionExists(f"session {record.session_id} exists")

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        return await self._record(scripts.READ, tenant, session_id)

    async def list(self, tenant: str, *, page_size: int, page_token: str) -> Page:
        index, upto = index_key(tenant), "(" + cursor(page_token) if page_token else "+"
        found: list[SessionRecord] = []
        async with self._asking("list sessions"):
            while len(found) <= page_size:  # one more than asked for says whether there is another page
                wanted = page_size + 1 - len(found)
                members = await self._redis.zrevrangebylex(index, upto, "-", start=0, num=wanted)
                live = await self._live_metas(tenant, members)
                found += [read_meta(tenant, entry.session_id, meta) for entry, meta in live]
                if len(members) < wanted:
                    break
                upto = "(" + members[-1].decode()
        if len(found) <= page_size:
            return Page(found, "")
        last = found[page_size - 1]
        return Page(found[:page_size], token_of(member(last.created_ms, last.session_id)))

    async def update(
        self,
        tenant: str,
        session_id: str,
        *,
        ttl_s: int | None,
        pinned: bool | None,
        banks: tuple[BankAttachment, ...] | None = None,
    ) -> SessionRecord:
        args: list[int | str | bytes] = ["" if ttl_s is None else ttl_s, "" if pinned is None else int(pinned)]
        if banks is not None:
            before = await self.get(tenant, session_id)
            args += [before.version, *self._format.attached(before, banks)]
        return await self._record(scripts.UPDATE, tenant, session_id, *args)

    async def begin(
        self, tenant: str, session_id: str, *, holder: str, lease_s: float, instead_of: str = ""
    ) -> SessionRecord:
        args = [holder, _ms(lease_s), _ms(self._now()), instead_of]
        try:
            return await self._record(scripts.BEGIN, tenant, session_id, *args, doing="lock")
        except RecordUnreadable:  # locked, and nobody would unlock it
            await self.release(tenant, session_id, holder=holder)
            raise

    async def renew(self, tenant: str, session_id: str, *, holder: str, lease_s: float) -> None:
        await self._answer(scripts.RENEW, tenant, session_id, holder, _ms(lease_s), doing="renew the lease of")

    async def commit(
        self,
        before: SessionRecord,
        *,
        holder: str,
        new_tokens: Sequence[int],
        turn: TurnRecord,
        model: str,
        worker_id: str,
    ) -> None:
        written = self._format.committed(before, new_tokens=new_tokens, turn=turn, model=model)
        [entry] = written.entries
        async with self._asking(f"count session {before.session_id}"):
            await self._counts.set(before.tenant, before.session_id, written.num_tokens)
        args = [written.tokens, entry, _ms(self._now()), model, worker_id, int(written.replaces)]
        args += [written.num_tokens, written.seal]
        try:
            await self._answer(
                scripts.COMMIT, before.tenant, before.session_id, holder, before.version, *args, doing="commit to"
            )
        except SessionNotFound:
            async with self._asking(f"count session {before.session_id}"):
                await self._counts.remove(before.tenant, [before.session_id])
            raise

    async def release(self, tenant: str, session_id: str, *, holder: str) -> None:
        try:
            await self._release(tenant, session_id, holder)
        except StoreUnavailable as error:
            self._late.add(tenant, session_id, holder, error)

    async def delete(self, tenant: str, session_id: str) -> SessionRecord:
        try:
            was = await self._record(scripts.DELETE, tenant, session_id, doing="delete")
        except RecordUnreadable:  # its entry in the index goes when that is read
            async with self._asking("count sessions"):
                await self._counts.remove(tenant, [session_id])
            raise
        async with self._asking("tidy the index of sessions"):
            await self._redis.zrem(index_key(tenant), member(was.created_ms, session_id))
            await self._counts.remove(tenant, [session_id])
        return was

    async def usage(self, tenant: str) -> Usage:
        async with self._asking("count sessions"):
            return await self._counts.read(tenant)

    async def recount(self, tenant: str) -> Usage:
        upto = "+"
        while upto:
            async with self._asking("count sessions"):
                page = await self._redis.zrevrangebylex(index_key(tenant), upto, "-", start=0, num=_PAGE_ENTRIES)
                for entry, meta in await self._live_metas(tenant, page):
                    await self._counts.add(tenant, entry.session_id, int(meta[b"num_tokens"]), NO_QUOTA)
            upto = "(" + page[-1].decode() if page else ""
        return await self.usage(tenant)

    async def keep_alive(self, front: str, for_s: float) -> None:
        async with self._asking("say that this front end lives"):
            await scripts.run(self._redis, scripts.KEEP_ALIVE, [_front_key(front)], _ms(for_s))

    async def is_alive(self, front: str) -> bool:
        async with self._asking("ask whether a front end lives"):
            return bool(await self._redis.exists(_front_key(front)))

    async def info(self) -> ServerInfo:
        async with self._asking("ask Redis how it is"):
            if isinstance(self._redis, RedisCluster):
                nodes = list((await self._redis.info(target_nodes=RedisCluster.PRIMARIES)).values())
            else:
                nodes = [await self._redis.info()]
        return ServerInfo(
            used_bytes=sum(node["used_memory"] for node in nodes),
            max_bytes=sum(node["maxmemory"] for node in nodes),
            evicted_keys=sum(node["evicted_keys"] for node in nodes),
            eviction_policy=str(nodes[0]["maxmemory_policy"]),
        )

    async def available(self) -> bool:
        try:
            async with self._asking("ping Redis"):
                await self._redis.ping()
        except StoreError:
            return False
        return True

    async def aclose(self) -> None:
        await self._late.aclose()
        for client in (self._redis, *self._asked):
            await client.aclose()

    async def _release(self, tenant: str, session_id: str, holder: str) -> None:
        await self._answer(scripts.RELEASE, tenant, session_id, holder, _GONE_MS, doing="release")

    async def _record(
        self, script: Script, tenant: str, session_id: str, *args: Any, doing: str = "read"
    ) -> SessionRecord:
        _, meta, tokens, turns = await self._answer(script, tenant, session_id, *args, doing=doing)
        fields = dict(zip(meta[::2], meta[1::2], strict=True))
        return self._format.read(tenant, session_id, Kept(fields, tokens, turns))

    async def _answer(self, script: Script, tenant: str, session_id: str, *args: Any, doing: str) -> Any:
        async with self._asking(f"{doing} session {session_id}"):
            answer = await self._run(script, tenant, session_id, *args)
        if answer[0] == b"MISSING":
            raise SessionNotFound(f"there is no session {session_id}")
        if answer[0] == b"BUSY":
            holder = answer[1].decode() if len(answer) > 1 else ""
            raise SessionBusy(f"another call holds session {session_id}, or has just changed it", holder)
        return answer

    async def _run(self, script: Script, tenant: str, session_id: str, *args: Any) -> Any:
        return await scripts.run(self._redis, script, _keys(tenant, session_id), *args)

    async def _live_metas(self, tenant: str, members: Sequence[bytes]) -> Sequence[tuple[Entry, Mapping[bytes, bytes]]]:
        """Read the meta of each index entry; drop the entries whose session has gone."""
        if not members:
            return []
        entries = [parse_member(member) for member in members]
        pipeline = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipeline.hgetall(_keys(tenant, entry.session_id).meta)
        metas = await pipeline.execute()
        young_ms = _ms(self._now()) - _CREATING_MS
        live, gone, uncounted = [], [], []
        for name, entry, meta in zip(members, entries, metas, strict=True):
            if meta and int(meta[b"created_ms"]) == entry.created_ms:  # not a later session of the same id
                live.append((entry, meta))
            elif entry.created_ms < young_ms:
                gone.append(name)
                if not meta:
                    uncounted.append(entry.session_id)
        if gone:
            await self._counts.remove(tenant, uncounted)
            await self._redis.zrem(index_key(tenant), *gone)
        return live


def _seal_field(written: Written) -> dict[str, str | int | bytes]:
    return {"seal": written.seal} if written.seal else {}


def _keys(tenant: str, session_id: str) -> _Keys:
    tag = f"rekindle:{{{quote(tenant, safe='')}/{session_id}}}"
    return _Keys(f"{tag}:meta", f"{tag}:tokens", f"{tag}:turns", f"{tag}:lock", f"{tag}:gone")


def _front_key(front: str) -> str:
    return f"rekindle:front:{front}"


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
