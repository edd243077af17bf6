"""The host tier: what is published is found, what is pinned stays, and every slot is accounted for."""

import threading

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache_store.codecs import INT8, RAW
from cache_store.host_slab import Slab
from cache_store.host_tier import HostTier, Slot
from cache_store.ids import BlockHash
from cache_store.store import Encoding

BLOCK_BYTES = 64
WHOLE = Encoding(RAW, BLOCK_BYTES)


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(24, "little"))


def tier_of(slots: int, evicted: list[BlockHash] | None = None) -> HostTier:
    gone = evicted if evicted is not None else []
    return HostTier(
        Slab.private(capacity_bytes=slots * BLOCK_BYTES, block_bytes=BLOCK_BYTES),
        on_change=lambda block, is_here: None if is_here else gone.append(block),
    )


def keep(tier: HostTier, number: int) -> Slot:
    slot = tier.reserve(name(number), number)
    assert slot is not None
    slot.buffer[:] = bytes([number]) * BLOCK_BYTES
    tier.publish(slot, WHOLE)
    return slot


def test_a_block_is_found_only_once_it_is_published() -> None:
    tier = tier_of(2)
    slot = tier.reserve(name(1), 7)
    assert slot is not None
    assert tier.pin(name(1)) is None
    assert not tier.contains(name(1))
    assert tier.reserve(name(1), 7) is None, "on its way already"
    tier.publish(slot, WHOLE)
    found = tier.pin(name(1))
    assert found is slot
    assert found.num_tokens == 7
    assert tier.reserve(name(1), 7) is None, "here already"
    tier.check()


def test_a_payload_smaller_than_its_slot_is_found_as_it_was_written() -> None:
    tier = tier_of(1)
    slot = tier.reserve(name(1), 7)
    assert slot is not None
    slot.buffer[:5] = b"small"
    tier.publish(slot, Encoding(INT8, 5))
    found = tier.pin(name(1))
    assert found is not None
    assert found.encoding.codec is INT8
    assert found.payload.tobytes() == b"small"


def test_a_payloads_checksum_is_kept_with_it_computed_here_or_before() -> None:
    tier = tier_of(2)
    assert keep(tier, 1).encoding.checksum == xxhash.xxh3_64_intdigest(bytes([1]) * BLOCK_BYTES)
    slot = tier.reserve(name(2), 2)
    assert slot is not None
    tier.publish(slot, Encoding(INT8, 5, checksum=17))
    assert slot.encoding.checksum == 17


def test_an_aborted_slot_is_free_again() -> None:
    tier = tier_of(1)
    slot = tier.reserve(name(1), 1)
    assert slot is not None
    tier.abort(slot)
    tier.check()
    assert tier.use() == (0, 1)
    keep(tier, 2)


def test_whoever_waits_for_a_block_hears_that_it_came_or_will_not() -> None:
    tier = tier_of(2)
    assert tier.awaited(name(1)) is None, "nobody brings it"
    came = tier.reserve(name(1), 1)
    given_up = tier.reserve(name(2), 2)
    assert came is not None
    assert given_up is not None
    first, second, other = tier.awaited(name(1)), tier.awaited(name(1)), tier.awaited(name(2))
    assert first is second
    assert first is not None
    assert other is not None
    assert not first.cancel(), "another waits for it too"
    assert not first.done()
    seen_when_told: list[bool] = []
    first.add_done_callback(lambda _: seen_when_told.append(tier.contains(name(1))))
    tier.publish(came, WHOLE)
    tier.abort(given_up)
    assert seen_when_told == [True]
    assert first.result(timeout=0) is True
    assert other.result(timeout=0) is False
    assert tier.awaited(name(1)) is None, "it is here"
    assert tier.awaited(name(2)) is None
    tier.check()
    again = tier.reserve(name(3), 3)
    assert again is not None
    assert tier.awaited(name(3)) is not other
    tier.abort(again)


def test_the_least_recently_used_block_goes_first() -> None:
    evicted: list[BlockHash] = []
    tier = tier_of(3, evicted)
    for number in (1, 2, 3):
        keep(tier, number)
    used = tier.pin(name(1))
    assert used is not None
    tier.unpin(used)
    keep(tier, 4)
    keep(tier, 5)
    assert evicted == [name(2), name(3)]
    assert [tier.contains(name(number)) for number in range(1, 6)] == [True, False, False, True, True]
    tier.check()


def test_pinned_and_reserved_slots_are_never_evicted() -> None:
    tier = tier_of(2)
    pinned = keep(tier, 1)
    assert tier.pin(name(1)) is pinned
    reserved = tier.reserve(name(2), 2)
    assert reserved is not None
    assert tier.reserve(name(3), 3) is None, "no room"
    tier.unpin(pinned)
    assert tier.reserve(name(3), 3) is pinned
    tier.check()


def test_a_pinned_block_that_is_dropped_keeps_its_bytes_until_unpinned() -> None:
    tier = tier_of(1)
    keep(tier, 1)
    slot = tier.pin(name(1))
    assert slot is not None
    assert tier.pin(name(1)) is slot
    assert tier.drop([name(1), name(2)]) == 1
    assert tier.pin(name(1)) is None
    assert tier.reserve(name(1), 1) is None, "its slot is still read"
    assert slot.buffer == bytes([1]) * BLOCK_BYTES
    tier.check()
    tier.unpin(slot)
    assert tier.use() == (1, 1)
    tier.unpin(slot)
    assert tier.use() == (0, 1)
    tier.check()


def test_a_block_dropped_while_it_comes_is_not_found_when_it_is_there() -> None:
    tier = tier_of(1)
    slot = tier.reserve(name(1), 1)
    assert slot is not None
    awaited = tier.awaited(name(1))
    assert awaited is not None
    assert tier.drop([name(1)]) == 0, "it is not here yet"
    tier.check()
    tier.publish(slot, WHOLE)
    tier.check()
    assert awaited.result(timeout=0) is False
    assert not tier.contains(name(1))
    assert tier.use().blocks == 0
    keep(tier, 1)
    assert tier.contains(name(1)), "whoever brings it anew is believed"
    tier.check()


def test_slots_do_not_overlap_and_lie_in_the_slab() -> None:
    tier = tier_of(5)
    slots = [keep(tier, number) for number in range(5)]
    for number, slot in enumerate(slots):
        assert slot.buffer == bytes([number]) * BLOCK_BYTES
    assert sorted(tier.slab) == sorted(b"".join(bytes([number]) * BLOCK_BYTES for number in range(5)))


def test_a_tier_without_room_keeps_nothing() -> None:
    for capacity_bytes in (0, BLOCK_BYTES - 1):
        tier = HostTier(Slab.private(capacity_bytes=capacity_bytes, block_bytes=BLOCK_BYTES))
        assert tier.use() == (0, 0)
        assert tier.reserve(name(1), 1) is None
        assert tier.pin(name(1)) is None
        assert tier.drop([name(1)]) == 0
        tier.check()


def test_a_slot_is_not_published_twice() -> None:
    tier = tier_of(1)
    slot = keep(tier, 1)
    with pytest.raises(AssertionError):
        tier.publish(slot, WHOLE)
    with pytest.raises(AssertionError):
        tier.unpin(slot)


def test_threads_never_see_another_blocks_bytes() -> None:
    tier = tier_of(4)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(2000):
            number = (seed + turn * 7) % 12
            slot = tier.pin(name(number))
            if slot is not None:
                if bytes(slot.buffer) != bytes([number]) * BLOCK_BYTES:
                    wrong.append(number)
                tier.unpin(slot)
                if turn % 11 == 0:
                    tier.drop([name(number)])
                continue
            slot = tier.reserve(name(number), number)
            if slot is not None:
                slot.buffer[:] = bytes([number]) * BLOCK_BYTES
                tier.publish(slot, WHOLE)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier.check()


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called, in whatever order: the accounts hold, and a pinned slot keeps its block's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = tier_of(3)
        self.reserved: list[tuple[int, Slot]] = []
        self.pinned: list[tuple[int, Slot]] = []

    @rule(number=st.integers(0, 5))
    def reserve(self, number: int) -> None:
        slot = self.tier.reserve(name(number), number)
        if slot is not None:
            slot.buffer[:] = bytes([number]) * BLOCK_BYTES
            self.reserved.append((number, slot))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), keeps=st.booleans())
    def settle(self, data: st.DataObject, keeps: bool) -> None:
        _, slot = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        if keeps:
            self.tier.publish(slot, WHOLE)
        else:
            self.tier.abort(slot)

    @rule(number=st.integers(0, 5))
    def pin(self, number: int) -> None:
        slot = self.tier.pin(name(number))
        assert (slot is not None) == self.tier.contains(name(number))
        if slot is not None:
            self.pinned.append((number, slot))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.tier.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))[1])

    @rule(numbers=st.sets(st.integers(0, 5)))
    def drop(self, numbers: set[int]) -> None:
        here = sum(self.tier.contains(name(number)) for number in numbers)
        assert self.tier.drop([name(number) for number in numbers]) == here

    @invariant()
    def accounts_hold(self) -> None:
        self.tier.check()
        for number, slot in (*self.reserved, *self.pinned):
            assert slot.buffer == bytes([number]) * BLOCK_BYTES


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
