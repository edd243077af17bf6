"""The block pool: accounting, sharing, eviction, neighbours."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cache_store.ids import BlockHash
from worker.engine.pool import BlockPool
from worker.ids import BlockId


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(24, "little"))


def test_taking_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.take(5) is None
    assert pool.stats().free == 4
    taken = pool.take(3)
    assert taken is not None
    assert pool.take(2) is None
    pool.release(taken)
    pool.check()
    assert pool.stats().free == 4


def test_a_sequence_grows_in_place_where_it_can() -> None:
    pool = BlockPool(32)
    first = pool.take(3, room=8)
    second = pool.take(3, room=8)
    assert first is not None
    assert second is not None
    assert first == list(range(first[0], first[0] + 3))
    grown = pool.take(1, after=second[-1])
    assert grown == [second[-1] + 1]


def test_a_mark_goes_with_a_block_until_it_is_free() -> None:
    pool = BlockPool(2)
    kept, dropped = pool.take(2) or []
    for block, number in ((kept, 1), (dropped, 2)):
        assert not pool.is_lossy(block)
        pool.mark_lossy(block)
        pool.name(block, name(number))
        pool.release([block])
        assert pool.is_lossy(block), "cached: its content is still the same"
    pool.drop([name(2)])
    assert not pool.is_lossy(dropped)
    pool.acquire([kept])
    pool.drop([name(1)])
    assert pool.is_lossy(kept), "nameless, but somebody still reads it"
    pool.release([kept])
    assert pool.take(2) is not None
    assert not pool.is_lossy(kept)
    pool.check()


def test_what_is_evicted_takes_its_mark_with_it() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1) or []
    pool.mark_lossy(block)
    pool.name(block, name(1))
    pool.release([block])
    assert pool.take(1) == [block]
    assert not pool.is_lossy(block)


def test_a_small_need_does_not_break_the_largest_run() -> None:
    pool = BlockPool(10)
    blocks = pool.take(10)
    assert blocks is not None
    pool.release(blocks[0:2])
    pool.release(blocks[4:10])
    assert pool.take(2) == [0, 1]


def test_named_blocks_stay_until_the_least_recently_used_chain_loses_its_last_block_first() -> None:
    pool = BlockPool(4)
    old = pool.take(2)
    assert old is not None
    for number, block in enumerate(old):
        assert pool.name(block, name(number))
    pool.release(old)
    assert pool.find(name(0)) == old[0]
    assert pool.take(3) is not None
    assert pool.find(name(1)) is None, "the leaf goes first"
    assert pool.find(name(0)) == old[0]
    pool.check()


def test_a_block_that_somebody_uses_is_never_evicted() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    assert blocks is not None
    pool.name(blocks[0], name(0))
    pool.acquire([blocks[0]])
    pool.release(blocks)
    assert pool.take(2) is None
    assert pool.find(name(0)) == blocks[0]


def test_what_was_evicted_and_is_needed_again_is_counted_once() -> None:
    pool = BlockPool(1)
    for number in range(2):
        block = pool.take(1)
        assert block is not None
        pool.name(block[0], name(number))
        pool.release(block)
    pool.need(name(0))
    pool.need(name(0))
    pool.need(name(7))
    assert pool.evicted_then_needed == 1


def test_equal_contents_share_one_name_and_the_second_block_stays_anonymous() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    assert blocks is not None
    assert pool.name(blocks[0], name(1))
    assert not pool.name(blocks[1], name(1))
    pool.release(blocks)
    assert pool.stats() == (1, 0, 1)
    pool.check()


def test_dropping_frees_what_nobody_uses_and_hides_the_rest() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    assert blocks is not None
    pool.name(blocks[0], name(0))
    pool.name(blocks[1], name(1))
    pool.release(blocks[:1])
    assert pool.drop([name(0), name(1), name(2)]) == 1
    assert pool.find(name(1)) is None
    pool.release(blocks[1:])
    assert pool.stats().free == 2
    pool.check()


def test_acquiring_a_free_block_is_a_bug_and_says_so() -> None:
    with pytest.raises(KeyError):
        BlockPool(1).acquire([BlockId(0)])


class AnyUseOfThePool(RuleBasedStateMachine):
    held = Bundle("held")

    @initialize(size=st.integers(1, 24))
    def build(self, size: int) -> None:
        self.pool = BlockPool(size)

    @rule(target=held, count=st.integers(1, 6), room=st.integers(0, 9))
    def take(self, count: int, room: int) -> object:
        available = self.pool.available
        taken = self.pool.take(count, room=room)
        assert (taken is None) == (count > available)
        if taken is None:
            return multiple()
        assert len(set(taken)) == count
        return tuple(taken)

    @rule(blocks=held, number=st.integers(0, 30))
    def name(self, blocks: tuple[BlockId, ...], number: int) -> None:
        if not self.pool.is_named(blocks[0]):
            self.pool.name(blocks[0], name(number))

    @rule(target=held, number=st.integers(0, 30))
    def share(self, number: int) -> object:
        block = self.pool.find(name(number))
        if block is None:
            return multiple()
        self.pool.acquire([block])
        return (block,)

    @rule(blocks=consumes(held))
    def release(self, blocks: tuple[BlockId, ...]) -> None:
        self.pool.release(blocks)

    @rule(number=st.integers(0, 30))
    def drop(self, number: int) -> None:
        self.pool.drop([name(number)])

    @invariant()
    def balances(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()


TestAnyUseOfThePool = AnyUseOfThePool.TestCase
TestAnyUseOfThePool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
