"""Play requests to a running server as users would, and note what each of them saw.

The load is open: a request comes when the trace says, however busy the server is; but no turn comes before the reply
to the one before it has ended, and a request for which no client is free waits for one. Time is counted from when the
request was due, so that this waiting shows. Knows the public API only, and no models.
"""

import asyncio
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.trace import Request
from protos import rekindle_pb2 as pb
from rekindle.client import Client

_WARM_UPS = 3
_WARM_UP_TOKENS = 64
_SCRAPE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request, and when what happened to it: seconds since the replay began."""

    request: Request
    due_s: float
    sent_s: float
    first_token_s: float
    end_s: float
    receipt: pb.Receipt

    @property
    def ttft_s(self) -> float:
        """From when it was due."""
        return self.first_token_s - self.due_s

    @property
    def ttft_of_server_s(self) -> float:
        """From when a client sent it."""
        return self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token of the reply after the first; None where there is no other."""
        others = self.request.output_tokens - 1
        return (self.end_s - self.first_token_s) / others if others else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """What went on below the turns since the worker began."""

    stores_dropped: int
    evicted_then_needed: int
    moved_bytes: Counter[str]
    """By way, as "host to redis": payloads."""

    def since(self, before: Self) -> Self:
        return replace(
            self,
            stores_dropped=self.stores_dropped - before.stores_dropped,
            evicted_then_needed=self.evicted_then_needed - before.evicted_then_needed,
            moved_bytes=self.moved_bytes - before.moved_bytes,
        )


Work = Sequence[tuple[Request, Sequence[int]]]
"""Requests, by time, with their prompts' tokens."""


def replay(address: str, work: Work, *, speed: float, clients: int, done: Callable[[], object]) -> list[Served]:
    """Play requests, the trace's time passing `speed` times as fast. `done` hears of each that ended.

    Raises RekindleError if the server refuses one.
    """

    async def play() -> list[Served]:
        async with Client(address) as client:
            return await _Player(client, speed=speed, clients=clients, done=done).play(work)

    return asyncio.run(play())


class _Player:
    def __init__(self, client: Client, *, speed: float, clients: int, done: Callable[[], object]) -> None:
        self._client = client
        self._speed = speed
        self._free = asyncio.Semaphore(clients)
        self._done = done
        self._began = time.perf_counter()

    async def play(self, work: Work) -> list[Served]:
        """Raises what the first failing request raises; the others are then cancelled."""
        last_of: dict[int, asyncio.Task[Served]] = {}
        tasks: list[asyncio.Task[Served]] = []
        try:
            for request, prompt in work:
                due_s = (request.at_s - work[0][0].at_s) / self._speed
                before = last_of.get(request.conversation)
                tasks.append(asyncio.create_task(self._serve(request, prompt, due_s, before)))
                last_of[request.conversation] = tasks[-1]
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _serve(
        self, request: Request, prompt: Sequence[int], due_s: float, before: asyncio.Task[Served] | None
    ) -> Served:
        await asyncio.sleep(due_s - self._now_s())
        if before is not None:
            due_s = max(due_s, (await before).end_s)
        async with self._free:
            sent_s = self._now_s()
            generation = self._client.generate(prompt, max_new_tokens=request.output_tokens, ignore_eos=True)
            deltas = aiter(generation)
            await anext(deltas)
            first_token_s = self._now_s()
            async for _ in deltas:
                pass
            end_s = self._now_s()
        assert generation.receipt is not None, "a reply ended without Finished"
        self._done()
        return Served(
            request=request,
            due_s=due_s,
            sent_s=sent_s,
            first_token_s=first_token_s,
            end_s=end_s,
            receipt=generation.receipt,
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._began


def warm_up(address: str, vocab_size: int) -> None:
    """Run what is slow when it runs for the first time. The prompts are none of a trace's."""

    async def run() -> None:
        async with Client(address) as client:
            for number in range(_WARM_UPS):
                prompt = [(number + 1) * 7919 * position % vocab_size for position in range(1, _WARM_UP_TOKENS)]
                await client.generate(prompt, max_new_tokens=4, ignore_eos=True).read()

    asyncio.run(run())


def below_the_turns(address: str, metrics_port: int) -> Below:
    """Read a deployment of one worker: its statistics, and its metrics on a port of the loopback interface."""

    async def stats() -> pb.CacheStats:
        async with Client(address) as client:
            return await client.stats()

    (worker,) = asyncio.run(stats()).workers
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=_SCRAPE_S) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    moved: Counter[str] = Counter()
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == "rekindle_moved_bytes_total":
            moved[f"{sample.labels['source']} to {sample.labels['target']}"] += int(sample.value)
    return Below(
        stores_dropped=worker.stores_dropped, evicted_then_needed=worker.evicted_then_needed, moved_bytes=moved
    )
