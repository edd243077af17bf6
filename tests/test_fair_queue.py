"""Tenants' shares of a queue: nobody is delayed beyond his share by another's flood, and idling earns nothing."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    tenant: str
    expected_tokens: int = 100
    number: int = 0


def drain(queue: FairQueue[Item], count: int | None = None) -> list[Item]:
    return [queue.take() for _ in range(len(queue) if count is None else count)]


def take_and_finish(queue: FairQueue[Item]) -> Item:
    item = queue.take()
    queue.done(item)
    return item


def test_a_flood_delays_another_tenant_by_one_item_at_most() -> None:
    queue: FairQueue[Item] = FairQueue({})
    for _ in range(100):
        queue.push(Item("flood"))
    for _ in range(10):
        take_and_finish(queue)
    late = Item("late")
    queue.push(late)
    assert late in [take_and_finish(queue), take_and_finish(queue)]


def test_prompts_of_a_flood_that_were_taken_already_come_behind_those_of_another() -> None:
    queue: FairQueue[Item] = FairQueue({})
    for _ in range(50):
        queue.push(Item("flood"))
    taken = drain(queue)  # there was room for all of them
    late = Item("late")
    queue.push(late)
    order = queue.in_turn([*taken, queue.take()])
    assert order.index(late) <= 1


def test_shares_follow_the_weights() -> None:
    queue: FairQueue[Item] = FairQueue({"heavy": 3.0})
    for _ in range(200):
        queue.push(Item("heavy"))
        queue.push(Item("light"))
    served = Counter(take_and_finish(queue).tenant for _ in range(200))
    assert 148 <= served["heavy"] <= 152


def test_generated_tokens_count_too() -> None:
    queue: FairQueue[Item] = FairQueue({})
    for _ in range(20):
        queue.push(Item("talks"))
        queue.push(Item("listens"))
    served = Counter[str]()
    for _ in range(20):
        item = take_and_finish(queue)
        served[item.tenant] += 1
        if item.tenant == "talks":
            queue.charge("talks", 200)
    assert served["listens"] == 15
    assert served["talks"] == 5


def test_idling_earns_nothing() -> None:
    queue: FairQueue[Item] = FairQueue({})
    queue.push(Item("idle"))
    take_and_finish(queue)
    for _ in range(60):  # alone, for long
        queue.push(Item("busy"))
    for _ in range(40):
        take_and_finish(queue)
    for _ in range(20):
        queue.push(Item("idle"))
    served = Counter(take_and_finish(queue).tenant for _ in range(20))
    assert 9 <= served["idle"] <= 11


def test_what_is_given_back_comes_first_and_is_charged_once() -> None:
    queue: FairQueue[Item] = FairQueue({})
    for _ in range(3):
        queue.push(Item("a"))
        queue.push(Item("b"))
    first, second = queue.take(), queue.take()
    queue.give_back(second)
    queue.give_back(first)
    assert [queue.take(), queue.take()] == [first, second]
    assert Counter(item.tenant for item in drain(queue, 2)) == {"a": 1, "b": 1}


def test_tenants_that_come_once_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue({})
    for number in range(1000):
        queue.push(Item(f"tenant-{number}"))
        take_and_finish(queue)
    assert len(queue._served) < 10


_items = st.tuples(st.sampled_from("abc"), st.integers(1, 1000))


@given(st.lists(_items, max_size=60))
def test_the_order_foreseen_is_the_order_in_which_all_are_taken(given_items: list[tuple[str, int]]) -> None:
    queue: FairQueue[Item] = FairQueue({"a": 2.0})
    for tenant, tokens in given_items:
        queue.push(Item(tenant, tokens))
    foreseen = list(queue)
    assert drain(queue) == foreseen


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2),
    st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    st.data(),
)
def test_tenants_that_all_wait_are_served_in_proportion_at_any_time(
    weights: dict[str, float], sizes: list[int], data: st.DataObject
) -> None:
    """The bound of the paper: two tenants' counters are never further apart than one item of either."""
    queue: FairQueue[Item] = FairQueue(weights)
    for tenant in data.draw(st.permutations(sorted(weights))):
        for tokens in sizes:
            queue.push(Item(tenant, tokens))
    waiting, served = Counter(dict.fromkeys(weights, len(sizes))), dict.fromkeys(weights, 0.0)
    while min(waiting.values()) > 0:
        item = take_and_finish(queue)
        waiting[item.tenant] -= 1
        served[item.tenant] += item.expected_tokens / weights[item.tenant]
        most = max(max(sizes) / weight for weight in weights.values())
        assert max(served.values()) - min(served.values()) <= most + 1e-6


class AnyUse(RuleBasedStateMachine):
    """Whatever is done, in whatever order: nothing is lost, and each tenant's items keep their order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Item] = FairQueue({"b": 3.0})
        self.waiting: list[Item] = []
        self.returned: list[Item] = []
        self.taken: list[Item] = []
        self.number = 0

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(1, 50))
    def push(self, tenant: str, tokens: int) -> None:
        self.number += 1
        self.waiting.append(Item(tenant, tokens, self.number))
        self.queue.push(self.waiting[-1])

    @precondition(lambda self: self.waiting or self.returned)
    @rule()
    def take(self) -> None:
        front = self.queue.front()
        item = self.queue.take()
        assert item is front
        if self.returned:
            assert item is self.returned.pop(0)
        else:
            assert item is next(other for other in self.waiting if other.tenant == item.tenant)
            self.waiting.remove(item)
        self.taken.append(item)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), back=st.booleans())
    def end(self, data: st.DataObject, back: bool) -> None:
        item = data.draw(st.sampled_from(self.taken))
        self.taken.remove(item)
        if back:
            self.queue.give_back(item)
            self.returned.insert(0, item)
        else:
            self.queue.done(item)

    @precondition(lambda self: self.waiting or self.returned)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([*self.waiting, *self.returned]))
        self.queue.remove(item)
        (self.waiting if item in self.waiting else self.returned).remove(item)

    @rule(tenant=st.sampled_from("abcd"), tokens=st.integers(-20, 200))
    def charge(self, tenant: str, tokens: int) -> None:
        self.queue.charge(tenant, tokens)

    @invariant()
    def nothing_is_lost(self) -> None:
        order = list(self.queue)
        assert order[: len(self.returned)] == self.returned
        assert sorted(order[len(self.returned) :], key=lambda item: item.number) == self.waiting
        assert len(self.queue) == len(order)
        assert (self.queue.front() is None) == (not order)
        for tenant in "abc":
            numbers = [item.number for item in order[len(self.returned) :] if item.tenant == tenant]
            assert numbers == sorted(numbers)


TestAnyUse = AnyUse.TestCase
