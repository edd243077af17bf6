"""Claims: whatever two threads do, each block is filled by exactly one of them, and settled exactly once."""

import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cache_store.codecs import RAW
from cache_store.store import Encoding
from worker.calls import MissReason
from worker.tiers.claims import Claims, Restored, State
from worker.tiers.moves import Tier

FOUND = Restored(Tier.REDIS, Encoding(RAW, 64))


def claims_of(num_blocks: int) -> tuple[Claims, list[str]]:
    told: list[str] = []
    return Claims(num_blocks, lambda: told.append("settled")), told


def test_a_block_that_is_computed_is_neither_asked_for_nor_written() -> None:
    claims, _ = claims_of(2)
    assert claims.take(0, MissReason.FASTER)
    assert not claims.fetch(0)
    assert not claims.write(0)
    assert claims.fetch(1)


def test_a_block_on_its_way_is_taken_over_only_where_that_is_meant() -> None:
    claims, _ = claims_of(1)
    assert claims.fetch(0)
    assert not claims.take(0, MissReason.FASTER)
    assert claims.take(0, MissReason.LATE, in_flight=True)
    assert not claims.write(0), "what arrives now stays in host memory"
    assert claims.outcomes() == [MissReason.LATE]


def test_a_block_that_is_being_written_is_not_taken_by_any_means() -> None:
    claims, told = claims_of(1)
    assert claims.write(0)
    assert not claims.take(0, MissReason.LATE, in_flight=True)
    claims.take_all(MissReason.LATE)
    assert not claims.is_settled
    claims.landed(0, FOUND)
    assert told == ["settled"]
    assert claims.outcomes() == [FOUND]


def test_who_gives_up_leaves_what_is_being_written_to_its_writer() -> None:
    claims, told = claims_of(2)
    assert claims.write(0)
    claims.give_up()
    assert claims.states() == [State.WRITING, State.MISSED]
    assert told == []
    claims.landed(0, FOUND)
    assert told == ["settled"]


def test_a_block_asked_for_twice_on_a_redirect_is_still_wanted() -> None:
    claims, _ = claims_of(1)
    assert claims.fetch(0)
    assert claims.fetch(0)


def test_a_miss_that_comes_after_a_block_was_computed_changes_nothing() -> None:
    claims, told = claims_of(1)
    claims.take(0, MissReason.FASTER)
    claims.missed(0, MissReason.ABSENT)
    claims.give_up()
    assert claims.outcomes() == [MissReason.FASTER]
    assert told == [], "the engine knows that it has settled it"


def test_nothing_to_bring_is_settled_from_the_start() -> None:
    claims, told = claims_of(0)
    assert claims.is_settled
    assert told == []


@given(st.lists(st.tuples(st.sampled_from(["fetch", "write", "land", "miss", "take", "steal"]), st.integers(0, 3))))
def test_accounts_hold_in_any_order(steps: list[tuple[str, int]]) -> None:
    claims, told = claims_of(4)
    for act, index in steps:
        before = claims.states()[index]
        if act == "fetch":
            assert claims.fetch(index) == (before in (State.PENDING, State.FETCHING))
        elif act == "write":
            assert claims.write(index) == (before in (State.PENDING, State.FETCHING))
        elif act == "land" and before is State.WRITING:
            claims.landed(index, FOUND)
        elif act == "miss":
            claims.missed(index, MissReason.ABSENT)
        elif act in ("take", "steal"):
            claims.take(index, MissReason.FASTER, in_flight=act == "steal")
        after = claims.states()[index]
        assert before.is_open or before is after, "what is settled stays as it is"
        assert claims.num_open == sum(state.is_open for state in claims.states())
        assert len(told) <= 1
        assert not told or claims.is_settled


def test_of_two_threads_each_block_goes_to_one() -> None:
    num = 3000
    claims, told = claims_of(num)
    written: list[int] = []
    taken: list[int] = []

    def bring() -> None:
        for index in range(num - 1, -1, -1):
            if claims.fetch(index) and claims.write(index):
                written.append(index)
                claims.landed(index, FOUND)

    def compute() -> None:
        taken.extend(index for index in range(num) if claims.take(index, MissReason.FASTER, in_flight=index % 2 == 0))

    threads = [threading.Thread(target=act) for act in (bring, compute)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(written + taken) == Counter(range(num))
    assert claims.is_settled
    assert len(told) <= 1
    for index in written:
        assert claims.outcomes()[index] is FOUND
