"""What can go wrong with a deployment, one fault at a time, and how long it takes until all is well again.

Knows the deployment's parts and the public client. Which fault comes when follows from a seed.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import redis as redis_py

from benchmarks.chaos_load import Clients
from benchmarks.chaos_part import Worker
from benchmarks.chaos_parts import SILENCE_S, Deployment
from rekindle.client import Client
from rekindle.errors import RekindleError

_RECOVER_WITHIN_S = 90.0
_PROBE_S = 0.1


@dataclass(frozen=True, slots=True)
class Recovery:
    """After one fault: seconds from the kill, or else from the fault's end."""

    kind: str
    turn_s: float
    """Until a new session's turn succeeded, at either front end."""
    whole_s: float
    """Until one did at each front end, with all workers up."""


class _NotYet(Exception):
    """Turns succeed, and something is still missing."""


class Faults:
    """Each public method is a fault: it strikes, lasts and ends. A kill returns the part that is being restarted."""

    def __init__(self, deployment: Deployment, chance: random.Random) -> None:
        self._deployment, self._random = deployment, chance

    async def worker_killed(self) -> Worker:
        return await self._killed(self._random.choice(self._deployment.workers))

    async def worker_frozen(self) -> None:
        """For less or more than it may be silent."""
        worker = self._random.choice(self._deployment.workers)
        worker.freeze()
        await self._last(0.5 * SILENCE_S, 2.0 * SILENCE_S)
        worker.thaw()

    async def front_end_killed(self) -> Worker:
        return await self._killed(self._random.choice(self._deployment.fronts))

    async def redis_killed(self) -> None:
        """It comes back with its append-only file."""
        self._deployment.redis.kill()
        await self._last(0.5, 5.0)
        await asyncio.to_thread(self._deployment.redis.start)

    async def redis_slow(self) -> None:
        """From a millisecond to 30 seconds an answer."""
        await self._weather(2.0, 6.0, delay_s=10 ** self._random.uniform(-3, 1.5))

    async def redis_stalled(self) -> None:
        await self._weather(1.0, 6.0, stalled=True)

    async def redis_black_hole(self) -> None:
        await self._weather(1.0, 6.0, swallowed=True)

    async def redis_resets(self) -> None:
        """In the middle of values: a block has 64 KiB."""
        await self._weather(2.0, 6.0, reset_within_bytes=256 << 10)

    async def redis_refuses(self) -> None:
        await self._weather(1.0, 5.0, refused=True)

    async def redis_full(self) -> None:
        await self._command("CONFIG", "SET", "maxmemory", 1)
        await self._last(2.0, 5.0)
        await self._command("CONFIG", "SET", "maxmemory", 0)

    async def redis_loses_blocks(self) -> None:
        """Each of them with a chance of one in two."""
        await asyncio.to_thread(self._lose_blocks)

    async def heal(self) -> None:
        """However the last fault was left."""
        await asyncio.to_thread(self._deployment.proxy.heal)

    async def _killed(self, part: Worker) -> Worker:
        await asyncio.to_thread(part.kill)
        await self._last(0.0, 2.0)
        part.start()
        return part

    async def _weather(self, least_s: float, most_s: float, **weather: object) -> None:
        await asyncio.to_thread(self._deployment.proxy.set, **weather)
        await self._last(least_s, most_s)
        await self.heal()

    async def _last(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self._random.uniform(least_s, most_s))

    async def _command(self, *words: str | int) -> None:
        def ask() -> None:
            with redis_py.Redis.from_url(self._deployment.redis.url) as client:
                client.execute_command(*words)

        await asyncio.to_thread(ask)

    def _lose_blocks(self) -> None:
        with redis_py.Redis.from_url(self._deployment.redis.url) as client:
            keys = list(client.scan_iter("rekindle:b:*", count=1000))
            lost = [key for key in keys if self._random.random() < 0.5]
            if lost:
                client.delete(*lost)


_KILLS = ("worker_killed", "front_end_killed")
KINDS = tuple(name for name in vars(Faults) if not name.startswith("_") and name != "heal")


def schedule(chance: random.Random) -> Iterator[str]:
    """Kinds of fault without an end: every kind once before any comes again."""
    while True:
        yield from chance.sample(KINDS, len(KINDS))


class Storm:
    """Strikes a deployment again and again, and waits each time until it is whole."""

    def __init__(self, deployment: Deployment, clients: Clients, *, seed: int) -> None:
        chance = random.Random(f"storm/{seed}")
        self._deployment, self._clients = deployment, clients
        self._faults = Faults(deployment, chance)
        self._random = chance
        self.now = "nothing"
        """The fault that is on, or that is being recovered from."""
        self.recoveries: list[Recovery] = []

    async def rage(self, until_s: float) -> None:
        """Strike with every kind once, and go on until `until_s` (of `time.monotonic()`).

        Raises TimeoutError where the system stays broken.
        """
        for number, kind in enumerate(schedule(self._random)):
            await asyncio.sleep(self._random.uniform(0.5, 2.0))
            if number >= len(KINDS) and time.monotonic() > until_s:
                return
            self.now = kind
            try:
                self.recoveries.append(await self._strike(kind))
            finally:
                await self._faults.heal()
            self.now = "nothing"

    async def _strike(self, kind: str) -> Recovery:
        fault: Callable[[], Awaitable[Worker | None]] = getattr(self._faults, kind)
        began_s = time.monotonic()
        if kind in _KILLS:
            killed, turn_s = await asyncio.gather(fault(), self._turn_again(began_s))
            assert killed is not None
            await asyncio.to_thread(killed.line)
        else:
            await fault()
            began_s = time.monotonic()
            turn_s = await self._turn_again(began_s)
        whole_s = await self._whole_again(began_s)
        return Recovery(kind, turn_s, whole_s)

    async def _turn_again(self, began_s: float) -> float:
        return await self._until(lambda: self._probe(self._clients.next()), began_s)

    async def _whole_again(self, began_s: float) -> float:
        async def all_serve() -> None:
            for client in self._clients.all():
                stats = await client.stats(timeout_s=2.0)
                if len(stats.workers) < len(self._deployment.workers) or not stats.redis.available:
                    raise _NotYet("a part is missing")
                await self._probe(client)

        return await self._until(all_serve, began_s)

    async def _probe(self, client: Client) -> None:
        """A turn of a session, as a user's."""
        session = await client.create_session(ttl_s=60, timeout_s=2.0)
        await client.generate("Hello", session_id=session.session_id, max_new_tokens=2, timeout_s=5.0).read()

    async def _until(self, works: Callable[[], Awaitable[None]], began_s: float) -> float:
        """Seconds from `began_s` until it works. Raises TimeoutError."""
        while True:
            try:
                await works()
            except (RekindleError, _NotYet) as error:
                if time.monotonic() > began_s + _RECOVER_WITHIN_S:
                    raise TimeoutError(f"not well {_RECOVER_WITHIN_S:g} s after {self.now}: {error}") from error
                await asyncio.sleep(_PROBE_S)
            else:
                return time.monotonic() - began_s
