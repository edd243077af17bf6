"""Who comes next out of a queue of several tenants: virtual token counters, weighted. It knows no clock and no engine.

Each tenant has a counter of the tokens it was served, divided by its weight, and the tenant with the smallest comes
next ("Fairness in Serving Large Language Models", OSDI 2024). A tenant that comes back from idling starts at the
smallest counter of those that are served, so idling earns nothing. Within a tenant it is first come first served.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heapreplace
from itertools import count
from operator import itemgetter
from typing import Generic, Protocol, TypeVar


class Queued(Hashable, Protocol):
    """Hashed by identity."""

    @property
    def tenant(self) -> str: ...
    @property
    def expected_tokens(self) -> int:
        """What is charged when it is taken; above 0."""
        ...


T = TypeVar("T", bound=Queued)


class FairQueue(Generic[T]):
    """Whatever waits is in it once. Iterating has the order in which all would be taken, were nothing else charged."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """A tenant of weight 2 gets twice the tokens of one of weight 1, which is what all others have."""
        self._weights = weights
        self._returned: deque[T] = deque()
        self._queues: dict[str, deque[tuple[int, T]]] = {}
        """Of tenants that wait, each with the number of its arrival."""
        self._served: dict[str, float] = {}
        """Counters, at least of all tenants that wait."""
        self._begun: dict[T, float] = {}
        """What was taken and is not done: its tenant's counter as it was before."""
        self._last = 0.0
        """The counter of whoever was served last."""
        self._numbers = count()

    def __len__(self) -> int:
        queues = list(self._queues.values())  # at once: other threads ask, too, for their figures
        return len(self._returned) + sum(map(len, queues))

    def __iter__(self) -> Iterator[T]:
        yield from self._returned
        heads = []
        for tenant, queue in self._queues.items():
            rest = iter(queue)
            heads.append((self._served[tenant], *next(rest), rest))
        heapify(heads)  # by counter, then by arrival: no two have the same number
        while heads:
            served, _, item, rest = heads[0]
            yield item
            if (following := next(rest, None)) is None:
                heappop(heads)
            else:
                heapreplace(heads, (served + self._share(item.tenant, item.expected_tokens), *following, rest))

    def push(self, item: T) -> None:
        tenant = item.tenant
        if tenant not in self._queues:
            floor = self._floor()
            # Who is not above it starts there, whether it is remembered or not.
            self._served = {t: served for t, served in self._served.items() if served > floor or t in self._queues}
            self._served.setdefault(tenant, floor)
            self._queues[tenant] = deque()
        self._queues[tenant].append((next(self._numbers), item))

    def front(self) -> T | None:
        """What is taken next."""
        if self._returned:
            return self._returned[0]
        heads = ((self._served[tenant], *queue[0]) for tenant, queue in self._queues.items())
        return min(heads, key=itemgetter(0, 1))[2] if self._queues else None

    def take(self) -> T:
        """Take the front, which must be there, and charge its tenant, once: not for what was given back."""
        item = self.front()
        assert item is not None, "nothing waits"
        if self._returned:
            return self._returned.popleft()
        self._begun[item] = self._served[item.tenant]
        self.charge(item.tenant, item.expected_tokens)
        self.remove(item)
        return item

    def give_back(self, item: T) -> None:
        """Something that was taken comes before all others."""
        self.done(item)
        self._returned.appendleft(item)

    def remove(self, item: T) -> None:
        """It waits no longer."""
        if item in self._returned:
            self._returned.remove(item)
            return
        queue = self._queues[item.tenant]
        del queue[next(place for place, (_, other) in enumerate(queue) if other is item)]
        if not queue:
            del self._queues[item.tenant]

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served so many tokens more than it was charged for until now; below 0: fewer."""
        if tenant not in self._served:
            self._served[tenant] = self._floor()
        self._last = self._served[tenant] = self._served[tenant] + self._share(tenant, tokens)

    def done(self, item: T) -> None:
        """What was taken needs its turn no longer. Harmless when said twice."""
        self._begun.pop(item, None)

    def in_turn(self, items: Iterable[T]) -> list[T]:
        """What was taken, in the order in which it should be done: what was given back comes first."""
        return sorted(items, key=lambda item: self._begun.get(item, float("-inf")))

    def _floor(self) -> float:
        """Where a tenant that comes starts: beside whoever is to be served next, or was served last."""
        waiting = (self._served[tenant] for tenant in self._queues)
        return min([*waiting, *self._begun.values()], default=self._last)

    def _share(self, tenant: str, tokens: float) -> float:
        return tokens / self._weights.get(tenant, 1.0)
