"""Run batches of commands on the nodes that serve their keys: several in flight, under a breaker for each node.

Knows wires, nodes and redirections. Knows nothing of blocks: what is sent and how replies are read is the batch's.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from cache_store.breaker import Breaker
from cache_store.errors import StoreError, StoreFull, StoreUnavailable
from cache_store.redis_errors import DeadlinePassed, refusal
from cache_store.redis_link import RedisLink
from cache_store.resp import Buffer, ErrorReply, Wire, command

_ASKING = command(b"ASKING")
_IDLE_WIRES = 8
_THREADS = 16


class Batch(Protocol):
    """Commands of one key each, by index."""

    in_flight: int
    """Requests sent before the first of them is answered."""

    def request(self, index: int) -> Sequence[Buffer] | None:
        """What to send now. None: nothing, and nothing will be received for this index."""
        ...

    def receive(self, index: int, wire: Wire) -> ErrorReply | None:
        """Read the whole reply."""
        ...


class Refused(NamedTuple):
    number: int
    """Index in the batch."""
    error: StoreError


class Lane:
    """The way to one node: its idle wires, and whether it is worth a try."""

    def __init__(self, connect: Callable[[float], Wire], breaker: Breaker) -> None:
        self.breaker = breaker
        self._connect = connect
        self._idle: list[Wire] = []  # append and pop are atomic

    @contextmanager
    def wire(self, deadline_s: float) -> Generator[Wire, None, None]:
        """Borrow a wire. Closed if anything is raised meanwhile; what is raised is counted. Raises StoreUnavailable."""
        if not self.breaker.closed:
            raise StoreUnavailable("the breaker is open")
        try:
            with self._borrowed(deadline_s) as wire:
                yield wire
        except DeadlinePassed:
            raise
        except StoreUnavailable:
            self.breaker.failed()
            raise
        self.breaker.succeeded()

    def probe(self) -> bool:
        """Ask whether the node is back."""
        try:
            with self._borrowed(math.inf) as wire:
                wire.send([command(b"PING")])
                back = not isinstance(wire.reply(), ErrorReply)  # LOADING is not back
        except StoreUnavailable:
            back = False
        if back:
            self.breaker.succeeded()
        else:
            self.breaker.probe_failed()
        return back

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _borrowed(self, deadline_s: float) -> Generator[Wire, None, None]:
        wire = self._take() or self._connect(deadline_s)
        wire.deadline_s = deadline_s
        try:
            yield wire
        except BaseException:
            wire.close()  # there may be replies on their way that nobody will read
            raise
        if len(self._idle) < _IDLE_WIRES:
            self._idle.append(wire)
        else:
            wire.close()

    def _take(self) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.reusable:
                return wire
            wire.close()  # the server went away meanwhile, or came back anew
        return None


class Lanes:
    """All lanes of one link. Any thread may call."""

    def __init__(self, link: RedisLink, new_breaker: Callable[[], Breaker] = Breaker) -> None:
        self._link = link
        self._new_breaker = new_breaker
        self._topology = new_breaker()
        self._lock = threading.Lock()
        self._lanes: dict[str, Lane] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rekindle-store")

    def run(self, keys: Sequence[bytes], batch: Batch, *, deadline_s: float) -> list[Refused]:
        """Run the whole batch; return what was not done, and why. Each index is received, refused or left out once."""
        if not keys:
            return []
        try:
            refused, moved, asked = _parted(self._on_nodes(self._route(keys), batch, deadline_s))
        except StoreUnavailable as error:
            return [Refused(index, error) for index in range(len(keys))]
        refused += self._on_nodes(asked, batch, deadline_s, asking=True)
        if moved:
            try:
                self._link.refresh()
                routes = self._route([keys[index] for index in moved])
            except StoreUnavailable as error:
                return refused + [Refused(index, error) for index in moved]
            again = {node: [moved[place] for place in places] for node, places in routes.items()}
            refused += self._on_nodes(again, batch, deadline_s)
        return refused

    def available(self) -> bool:
        lanes = list(self._lanes.values())
        return self._topology.closed and (not lanes or any(lane.breaker.closed for lane in lanes))

    def probe_in_s(self) -> float | None:
        """Seconds until `probe` is due; None while every breaker is closed."""
        waits = [breaker.probe_in_s() for breaker in self._breakers()]
        return min((wait for wait in waits if wait is not None), default=None)

    def probe(self) -> bool:
        """Find the nodes, try those whose breaker is due (or never tried), and say whether any is worth a try now."""
        try:
            self._link.refresh()
            self._topology.succeeded()
        except StoreUnavailable:
            self._topology.probe_failed()
            return False
        nodes = self._link.nodes()
        with self._lock:
            gone = [self._lanes.pop(node) for node in set(self._lanes) - nodes]
            new = nodes - set(self._lanes)
        for lane in gone:
            lane.close()
        for node in nodes:
            lane = self._lane(node)
            if node in new or lane.breaker.probe_in_s() == 0:
                lane.probe()
        return self.available()

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        for lane in self._lanes.values():
            lane.close()

    def _breakers(self) -> list[Breaker]:
        return [self._topology, *(lane.breaker for lane in list(self._lanes.values()))]

    def _lane(self, node: str) -> Lane:
        with self._lock:
            if node not in self._lanes:
                connect = lambda deadline_s: self._link.connect(node, deadline_s=deadline_s)  # noqa: E731
                self._lanes[node] = Lane(connect, self._new_breaker())
            return self._lanes[node]

    def _route(self, keys: Sequence[bytes]) -> dict[str, list[int]]:
        if not self._topology.closed:
            raise StoreUnavailable("the breaker is open")
        try:
            return self._link.route(keys)
        except StoreUnavailable:
            self._topology.failed()
            raise

    def _on_nodes(
        self, routes: Mapping[str, list[int]], batch: Batch, deadline_s: float, *, asking: bool = False
    ) -> list[Refused]:
        """Each node's share side by side, the first on this thread. On leaving, none of them runs any more."""
        shares = list(routes.items())
        others = [
            self._threads.submit(self._on_node, node, share, batch, deadline_s, asking) for node, share in shares[1:]
        ]
        try:
            refused = [
                lost for node, share in shares[:1] for lost in self._on_node(node, share, batch, deadline_s, asking)
            ]
        finally:
            wait(others)
        for other in others:
            refused += other.result()
        return refused

    def _on_node(self, node: str, share: Sequence[int], batch: Batch, deadline_s: float, asking: bool) -> list[Refused]:
        refused: list[Refused] = []
        waiting, sent = deque(share), deque[int]()
        try:
            with self._lane(node).wire(deadline_s) as wire:
                while waiting or sent:
                    while waiting and len(sent) < batch.in_flight:
                        index = waiting.popleft()
                        request = batch.request(index)
                        if request is not None:
                            sent.append(index)
                            wire.send([_ASKING, *request] if asking else request)
                    if not sent:
                        break
                    if asking:
                        wire.reply()
                    answer = batch.receive(sent[0], wire)
                    index = sent.popleft()
                    if answer is not None:
                        error = refusal(answer.text)
                        refused.append(Refused(index, error))
                        if isinstance(error, StoreFull):  # what is on its way is answered; the rest would be refused
                            refused += [Refused(index, error) for index in waiting]
                            waiting.clear()
        except StoreUnavailable as error:
            refused += [Refused(index, error) for index in (*sent, *waiting)]
        return refused


def _parted(refused: Sequence[Refused]) -> tuple[list[Refused], list[int], dict[str, list[int]]]:
    """Part true refusals from what moved with its slot, and from what another node is to be asked just this once."""
    final: list[Refused] = []
    moved: list[int] = []
    asked: dict[str, list[int]] = {}
    for index, error in refused:
        words = str(error).split(" ")
        if words[0] == "MOVED":
            moved.append(index)
        elif words[0] == "ASK" and len(words) == 3:
            asked.setdefault(words[2], []).append(index)
        else:
            final.append(Refused(index, error))
    return final, moved, asked
