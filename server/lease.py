"""Hold a session while something is done to it: locked on entry, kept locked, unlocked however it ends.

A lock outlives a front end that is killed, up to its lease. Others find out sooner: a holder's name begins with its
front end's, and each front end says again and again that it lives.
"""

import asyncio
import uuid
from collections.abc import Awaitable
from types import TracebackType
from typing import Self

import structlog

from cache_store.errors import SessionBusy, SessionNotFound, StoreError
from cache_store.records import RecordStore, SessionRecord, TurnRecord

_COMMIT_PAUSES_S = (0.05, 0.2, 0.5)
"""Between tries to commit: long enough for a failover of Redis to be noticed, short enough for a client that waits."""
_BUSY_PAUSES_S = (0.02, 0.05, 0.1)
"""Between tries to lock: who has hung up may call again before the call that was left has unlocked."""
_ALIVE_S = 3.0
"""A front end that has not been heard of for so long is dead. If it is not, its turns can't be committed: no harm."""

_log = structlog.get_logger(__name__)


class Leases:
    """One front end's."""

    def __init__(self, records: RecordStore, *, lease_s: float) -> None:
        self._records = records
        self._lease_s = lease_s
        self._front = uuid.uuid4().hex
        self._living: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._living = asyncio.create_task(self._live(), name="say that this front end lives")

    async def aclose(self) -> None:
        if self._living is not None:
            self._living.cancel()
            await asyncio.wait([self._living])
            self._living = None
            await self._say(0.0)

    def hold(self, tenant: str, session_id: str) -> "Lease":
        """One call's lock on a session, to be entered."""
        holder = f"{self._front}/{uuid.uuid4().hex}"
        return Lease(self._records, tenant, session_id, holder=holder, lease_s=self._lease_s)

    async def _live(self) -> None:
        while True:
            await self._say(_ALIVE_S)
            await asyncio.sleep(_ALIVE_S / 3)

    async def _say(self, for_s: float) -> None:
        try:
            await self._records.keep_alive(self._front, for_s)
        except StoreError as error:  # mostly nobody can lock anything then either
            _log.warning("this front end can't say that it lives", error=str(error))


class Lease:
    """`async with leases.hold(...) as lease:` raises SessionNotFound, SessionBusy or StoreUnavailable on entry."""

    def __init__(self, records: RecordStore, tenant: str, session_id: str, *, holder: str, lease_s: float) -> None:
        self._records = records
        self._tenant = tenant
        self._session_id = session_id
        self._holder = holder
        self._lease_s = lease_s
        self._renewal: asyncio.Task[None] | None = None
        self._ended = False
        self._lost: SessionBusy | SessionNotFound | None = None
        self.record: SessionRecord
        """The session as it was when it was locked; nobody else changes its history meanwhile."""

    async def __aenter__(self) -> Self:
        try:
            self.record = await self._begin()
        except (SessionBusy, SessionNotFound):
            raise
        except BaseException:  # the lock may be ours although the answer never came
            await self._release()
            raise
        self._renewal = asyncio.create_task(self._keep_renewing(), name=f"lease {self._session_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop_renewing()
        if not self._ended:
            await self._release()

    def check(self) -> None:
        """Raise SessionBusy or SessionNotFound if the lease was lost: what is being done can't be committed."""
        if self._lost is not None:
            raise self._lost

    async def commit(self, new_tokens: list[int], turn: TurnRecord, *, model: str, worker_id: str) -> None:
        """Append the turn and unlock. Tries again while Redis is away for a moment: a commit may be repeated.

        The lease is renewed meanwhile: where Redis is slow, the tries take longer than it. After the last one there is
        nothing to renew, and nobody minds.
        """
        for pause_s in (*_COMMIT_PAUSES_S, None):
            try:
                await self._records.commit(
                    self.record,
                    holder=self._holder,
                    new_tokens=new_tokens,
                    turn=turn,
                    model=model,
                    worker_id=worker_id,
                )
            except StoreError:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            else:
                break
        self._ended = True

    async def delete(self) -> SessionRecord:
        """Forget the session, lock and all."""
        await self._stop_renewing()
        was = await self._records.delete(self._tenant, self._session_id)
        self._ended = True
        return was

    async def _begin(self) -> SessionRecord:
        dead = ""
        for pause_s in _BUSY_PAUSES_S:
            try:
                return await self._try_to_begin(dead)
            except SessionBusy as error:
                dead = await self._if_dead(error.holder)
            if not dead:
                await asyncio.sleep(pause_s)
        return await self._try_to_begin(dead)

    async def _try_to_begin(self, dead: str) -> SessionRecord:
        return await self._records.begin(
            self._tenant, self._session_id, holder=self._holder, lease_s=self._lease_s, instead_of=dead
        )

    async def _if_dead(self, holder: str) -> str:
        """The holder, if its front end is dead; "" if it lives, or who that is can't be told."""
        front, slash, _ = holder.partition("/")
        if not slash or await self._records.is_alive(front):
            return ""
        _log.warning("taken from a front end that is dead", session=self._session_id, front=front)
        return holder

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._records.renew(self._tenant, self._session_id, holder=self._holder, lease_s=self._lease_s)
            except (SessionBusy, SessionNotFound) as error:
                self._lost = error
                return
            except StoreError as error:  # there is time for two more tries; the commit tells in the end
                _log.warning("lease not renewed", session=self._session_id, error=str(error))

    async def _stop_renewing(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()
            await asyncio.wait([renewal])  # its connection is back before anybody closes the pool

    async def _release(self) -> None:
        await _uninterrupted(self._try_release())

    async def _try_release(self) -> None:
        try:
            await self._records.release(self._tenant, self._session_id, holder=self._holder)
        except StoreError as error:
            _log.warning("session stays locked until its lease ends", session=self._session_id, error=str(error))


async def _uninterrupted(work: Awaitable[None]) -> None:
    """See `work` through, even when the caller is cancelled (once more) meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
