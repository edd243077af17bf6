"""What a store does behind everyone's back: small commands that nobody waits for, and asking whether Redis is back.

One thread and a bounded queue. Knows lanes and commands. Knows no blocks.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from cache_store.errors import StoreError
from cache_store.redis_errors import ours
from cache_store.redis_lanes import Lanes
from cache_store.redis_link import RedisLink
from cache_store.resp import Buffer, ErrorReply, Wire, command

_QUEUED_JOBS = 1024
_WITHIN_S = 10.0

log = structlog.get_logger(__name__)


class KeyCommands:
    """A batch of commands on one key each (the second word), answered by integers, which `answers` keeps by index."""

    in_flight = 64

    def __init__(self, commands: Sequence[Sequence[bytes]]) -> None:
        self._commands = commands
        self.answers = [0] * len(commands)

    def request(self, index: int) -> Sequence[Buffer]:
        return [command(*self._commands[index])]

    def receive(self, index: int, wire: Wire) -> ErrorReply | None:
        reply = wire.reply()
        if isinstance(reply, ErrorReply):
            return reply
        assert isinstance(reply, int), f"{self._commands[index][0]!r} was answered {reply!r}"
        self.answers[index] = reply
        return None


class _Job(NamedTuple):
    keys: Sequence[bytes]
    commands: Sequence[Sequence[bytes]]


_WAKE = _Job((), ())


class Keeper:
    """Runs until `close`. Starts by looking whether Redis is there."""

    def __init__(self, link: RedisLink, lanes: Lanes) -> None:
        self._link = link
        self._lanes = lanes
        self._jobs: queue.Queue[_Job] = queue.Queue(_QUEUED_JOBS)
        self._policy_seen = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rekindle-store-keeper", daemon=True)
        self._thread.start()

    def later(self, keys: Sequence[bytes], commands: Sequence[Sequence[bytes]]) -> None:
        """Run the commands when there is time. Forgotten when the queue is full or Redis does not answer."""
        if keys:
            self._offer(_Job(keys, commands))

    def wake(self) -> None:
        """Something failed: see whether a probe is due."""
        self._offer(_WAKE)

    def close(self) -> None:
        """Leave what is queued undone."""
        self._closing.set()
        self._offer(_WAKE)
        self._thread.join()

    def _offer(self, job: _Job) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            log.debug("store keeper is behind", forgotten_commands=len(job.keys))

    def _run(self) -> None:
        self._look()
        while not self._closing.is_set():
            wait_s = self._lanes.probe_in_s()
            if wait_s == 0:
                self._look()
                continue
            try:
                job = self._jobs.get(timeout=wait_s)
            except queue.Empty:
                continue
            self._lanes.run(job.keys, KeyCommands(job.commands), deadline_s=time.monotonic() + _WITHIN_S)

    def _look(self) -> None:
        was_available = self._lanes.available()
        available = self._lanes.probe()
        if available != was_available:
            log.info("redis is back") if available else log.warning("redis does not answer")
        if available and not self._policy_seen:
            self._see_policy()

    def _see_policy(self) -> None:
        """Warn, once, when a conversation's record could be evicted to make room for a block."""
        try:
            with ours("ask for the eviction policy"):
                policies = {str(server.info("memory")["maxmemory_policy"]) for server in self._link.servers()}
        except StoreError as error:
            log.debug("eviction policy unknown", error=str(error))
            return
        self._policy_seen = True
        for policy in policies:
            if policy.startswith("allkeys-"):
                log.warning(
                    "redis may evict session records, not only blocks: prefer volatile-lru", maxmemory_policy=policy
                )
