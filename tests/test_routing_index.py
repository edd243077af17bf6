"""The routing index: what it knows of workers' blocks, and whom it chooses."""

import math
from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from server.block_holders import BlockHolders, Segment, Tier
from server.block_table import TAG_BITS, BlockTable
from server.routing_index import BlocksChanged, Choice, RoutingIndex, Snapshot, WorkerCosts

TOKENS, BYTES = 16, 1000


def chain_of(random: Random, num_blocks: int) -> list[bytes]:
    return [random.randbytes(16) for _ in range(num_blocks)]


def built(**options: float) -> RoutingIndex:
    return RoutingIndex(block_tokens=TOKENS, block_bytes=BYTES, **options)


def costs(queue_s: float = 0.0, *, token_s: float = 0.01, host_byte_s: float = 1e-5) -> WorkerCosts:
    """A block takes 160 ms to compute and 10 ms to restore, unless told."""
    return WorkerCosts(queue_s=queue_s, token_s=token_s, host_byte_s=host_byte_s)


def chosen(index: RoutingIndex, chain: Sequence[bytes], *, key: str = "", last: str = "") -> Choice:
    choice = index.choose(chain, key=key, last_worker_id=last)
    assert choice is not None
    return choice


class Plain:
    """The same knowledge, in sets."""

    def __init__(self, names: Sequence[str]) -> None:
        self.blocks: dict[str, dict[Tier, set[bytes]]] = {name: {tier: set() for tier in Tier} for name in names}

    def held(self, chain: Sequence[bytes]) -> dict[str, tuple[int, int]]:
        counts = {
            worker: (
                sum(block in tiers[Tier.DEVICE] for block in chain),
                sum(block in tiers[Tier.HOST] - tiers[Tier.DEVICE] for block in chain),
            )
            for worker, tiers in self.blocks.items()
        }
        return {worker: count for worker, count in counts.items() if any(count)}


@pytest.mark.parametrize("seed", range(10))
def test_what_each_worker_holds_of_a_chain_is_what_its_events_said(seed: int) -> None:
    random = Random(seed)
    workers = [f"worker-{number}" for number in range(7)]
    index, plain, numbers = built(), Plain(workers), Counter[str]()
    shared = chain_of(random, 5)
    chains = [shared[: random.randint(0, 5)] + chain_of(random, random.randint(1, 40)) for _ in range(12)]
    for worker in workers:
        index.resync(Snapshot(worker, 0))
    for step in range(400):
        worker, tier, chain = random.choice(workers), random.choice(list(Tier)), random.choice(chains)
        here = plain.blocks[worker][tier]
        if random.random() < 0.1:  # begun anew, with what it had
            tiers = plain.blocks[worker]
            index.resync(Snapshot(worker, step, list(tiers[Tier.DEVICE]), list(tiers[Tier.HOST])))
            numbers[worker] = step
        numbers[worker] += 1
        if random.random() < 0.6:
            stored = [block for block in chain[: random.randint(1, len(chain))] if block not in here]
            assert index.changed(BlocksChanged(worker, numbers[worker], tier, stored=stored))
            here.update(stored)
        else:  # ends go first; what another chain shares stays
            removed = [block for block in chain[random.randint(5, 40) :] if block in here]
            assert index.changed(BlocksChanged(worker, numbers[worker], tier, removed=removed))
            here.difference_update(removed)
        if random.random() < 0.5:
            index.sweep()
        chain = random.choice(chains)
        assert index.held(chain) == plain.held(chain)
    while index.sweep():
        pass
    assert all(index.held(chain) == plain.held(chain) for chain in chains)
    held = set().union(*(blocks for tiers in plain.blocks.values() for blocks in tiers.values()))
    assert index.num_blocks == len(held)


def test_the_choice_is_the_cheapest_of_all_workers() -> None:
    random = Random(1)
    chain = chain_of(random, 60)
    for _ in range(50):
        index, plain = built(), {}
        for number in range(20):
            on_host = random.randint(0, 60)
            on_device = random.randint(0, on_host)
            queue_s, token_s = random.random() * 20, random.uniform(0.001, 0.02)
            index.report(f"{number}", costs(queue_s, token_s=token_s))
            index.resync(Snapshot(f"{number}", 0, chain[:on_device], chain[:on_host]))
            work_s = (60 - on_host) * TOKENS * token_s + (on_host - on_device) * BYTES * 1e-5
            plain[f"{number}"] = (queue_s + 2 * work_s, queue_s + work_s, on_device, on_host - on_device)
        best = min(plain, key=lambda worker: plain[worker][0])
        choice = chosen(index, chain)
        assert choice.expected_s == pytest.approx(plain[best][1], rel=1e-4)
        assert (choice.worker_id, choice.device_blocks, choice.host_blocks) == (best, *plain[best][2:])


def test_reports_and_restarts_between_choices_are_in_the_next_one() -> None:
    random = Random(12)
    chains = [chain_of(random, 20) for _ in range(30)]
    index = built(sticky_s=0.0)
    held: dict[str, list[tuple[int, int]]] = {}
    measured: dict[str, tuple[float, float]] = {}
    for step in range(600):
        worker, chain_number = f"{random.randrange(30)}", random.randrange(30)
        if step % 3 == 0 or worker not in held:  # by far more sets of holders than are kept as rows
            counts = [(random.randint(0, 10), random.randint(0, 20)) for _ in chains]
            device = [block for chain, (num, _) in zip(chains, counts, strict=True) for block in chain[:num]]
            host = [block for chain, (_, num) in zip(chains, counts, strict=True) for block in chain[:num]]
            index.resync(Snapshot(worker, step, device, host))
            held[worker] = [(on_device, max(0, on_host - on_device)) for on_device, on_host in counts]
        queue_s, token_s = measured[worker] = random.random(), random.uniform(0.001, 0.02)
        index.report(worker, costs(queue_s, token_s=token_s))
        index.sweep()
        expected = {}
        for name, (queue_s, token_s) in measured.items():
            on_device, on_host = held[name][chain_number]
            work_s = (20 - on_device - on_host) * TOKENS * token_s + on_host * BYTES * 1e-5
            expected[name] = queue_s + 2 * work_s
        choice = chosen(index, chains[chain_number])
        assert expected[choice.worker_id] <= min(expected.values()) + 0.001
        assert (choice.device_blocks, choice.host_blocks) == held[choice.worker_id][chain_number]


@pytest.mark.parametrize("never", ["queue_s", "token_s"])
def test_a_worker_that_cannot_be_reached_or_has_measured_no_speed_is_passed_over(never: str) -> None:
    index = built()
    chain = chain_of(Random(13), 4)
    broken = {"queue_s": 0.0, "token_s": 0.01, "host_byte_s": 1e-5} | {never: math.inf}
    index.report("broken", WorkerCosts(**broken))
    index.resync(Snapshot("broken", 0, device=chain))
    assert index.choose(chain, key="") is None
    index.report("sound", costs(3.0))
    for length in (0, 2, 4):
        for last in ("", "broken"):
            assert chosen(index, chain[:length], last=last).worker_id == "sound"
    index.report("broken", costs())
    assert chosen(index, chain) == Choice("broken", 0.0, 0.0, 4, 0)


def test_a_host_tier_that_cannot_be_read_saves_nothing() -> None:
    index = built()
    chain = chain_of(Random(14), 4)
    index.report("worker", costs(host_byte_s=math.inf))
    index.resync(Snapshot("worker", 0, host=chain))
    assert chosen(index, chain).expected_s == pytest.approx(4 * TOKENS * 0.01)


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
@pytest.mark.parametrize("name", ["queue_s", "token_s", "host_byte_s", "shared_byte_s"])
def test_costs_that_are_no_times_are_refused(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        WorkerCosts(**({"queue_s": 0.0, "token_s": 0.0, "host_byte_s": 0.0} | {name: wrong}))


def test_blocks_that_compute_faster_than_they_restore_count_as_computed() -> None:
    index = built()
    [block] = chain_of(Random(2), 1)
    index.report("has it", costs(0.02, host_byte_s=1.0))
    index.report("has it not", costs(0.0))
    index.resync(Snapshot("has it", 0, host=[block]))
    assert chosen(index, [block]).worker_id == "has it not"
    assert chosen(index, [block]).expected_s == pytest.approx(TOKENS * 0.01)


def test_where_all_workers_reach_the_missing_blocks_quickly_the_queue_decides() -> None:
    chain = chain_of(Random(3), 100)
    index = built()
    for shared_byte_s, expected in ((math.inf, "holds"), (1.1e-5, "idle")):
        for worker, queue_s in (("holds", 1.0), ("idle", 0.0)):
            index.report(
                worker, WorkerCosts(queue_s=queue_s, token_s=0.01, host_byte_s=1e-5, shared_byte_s=shared_byte_s)
            )
        index.resync(Snapshot("holds", 0, host=chain))
        assert chosen(index, chain).worker_id == expected


def test_an_event_that_is_missing_asks_for_a_snapshot_and_one_told_twice_changes_nothing() -> None:
    index = built()
    a, b, c = chain_of(Random(4), 3)
    assert not index.changed(BlocksChanged("worker", 7, Tier.HOST, [a])), "numbers begin with a snapshot"
    index.resync(Snapshot("worker", 8, device=[a]))
    assert index.changed(BlocksChanged("worker", 8, Tier.DEVICE, removed=[a]))
    assert index.held([a]) == {"worker": (1, 0)}
    assert index.changed(BlocksChanged("worker", 9, Tier.DEVICE, [b]))
    assert not index.changed(BlocksChanged("worker", 11, Tier.DEVICE, [c]))
    assert not index.changed(BlocksChanged("worker", 12, Tier.DEVICE, removed=[b]))
    assert index.held([a, c]) == {"worker": (2, 0)}, "what is known is used meanwhile"
    index.resync(Snapshot("worker", 12, device=[c]))
    assert index.held([a]) == index.held([b]) == {}
    assert index.changed(BlocksChanged("worker", 13, Tier.DEVICE, [a]))


def test_a_worker_that_left_is_chosen_no_more_and_its_place_passes_on_empty() -> None:
    index = built()
    chain = chain_of(Random(5), 9)
    index.report("old", costs())
    index.resync(Snapshot("old", 0, device=chain))
    index.report("busy", costs(queue_s=5.0))
    index.resync(Snapshot("busy", 0, host=chain[:1]))
    assert chosen(index, chain).worker_id == "old"
    index.leave("old")
    index.leave("never was")
    assert chosen(index, chain, last="old").worker_id == "busy"
    while index.sweep():
        pass
    assert index.num_blocks == 1
    index.report("new", costs())
    assert index.held(chain) == {"busy": (0, 1)}
    assert not index.changed(BlocksChanged("old", 1, Tier.DEVICE, chain))


def test_nobody_is_chosen_before_a_worker_has_reported() -> None:
    index = built()
    chain = chain_of(Random(6), 3)
    assert index.choose(chain, key="") is None
    index.resync(Snapshot("worker", 0, device=chain))
    assert index.choose(chain, key="") is None
    index.report("worker", costs())
    assert chosen(index, []) == Choice("worker", 0.0, 0.0, 0, 0)


def test_a_restarted_worker_keeps_its_costs_and_loses_its_blocks() -> None:
    index = built()
    chain = chain_of(Random(7), 3)
    index.report("worker", costs(1.0))
    index.resync(Snapshot("worker", 5, device=chain))
    index.resync(Snapshot("worker", 0))
    assert chosen(index, chain).expected_s == pytest.approx(1.0 + 3 * TOKENS * 0.01)


def test_a_session_stays_unless_another_worker_is_clearly_better() -> None:
    index = built(sticky_s=0.5)
    for worker, queue_s in (("last", 0.4), ("idle", 0.0)):
        index.report(worker, costs(queue_s))
    assert chosen(index, [], last="last").worker_id == "last"
    index.report("last", costs(0.6))
    assert chosen(index, [], last="last").worker_id == "idle"


def test_equally_good_workers_share_the_keys_and_each_key_has_its_own() -> None:
    index = built()
    for number in range(8):
        index.report(f"{number}", costs())
    homes = {f"session-{number}": chosen(index, [], key=f"session-{number}").worker_id for number in range(400)}
    assert all(25 <= count <= 75 for count in Counter(homes.values()).values())
    assert len(set(homes.values())) == 8
    assert all(chosen(index, [], key=key).worker_id == home for key, home in homes.items())


def test_of_equally_dear_workers_the_less_busy_is_chosen() -> None:
    index = built()
    [block] = chain_of(Random(8), 1)
    index.report("holds", costs(0.32))
    index.resync(Snapshot("holds", 0, device=[block]))
    index.report("idle", costs())
    assert {chosen(index, [block], key=f"{number}").worker_id for number in range(20)} == {"idle"}


def test_of_equally_dear_and_idle_workers_the_one_that_holds_most_is_chosen() -> None:
    index = built()
    chain = chain_of(Random(8), 3)
    for worker, num_held in (("none", 0), ("two", 2), ("one", 1)):
        index.report(worker, costs(token_s=1e-9))
        index.resync(Snapshot(worker, 0, host=chain[:num_held]))
    assert {chosen(index, chain, key=f"{number}").worker_id for number in range(20)} == {"two"}


def test_what_was_given_to_a_worker_since_its_report_is_in_its_queue_until_it_has_had_the_time() -> None:
    index = built(sticky_s=0.0)
    index.report("a", costs(0.5))
    index.report("b", costs(0.6))
    index.give("a", 0.4)
    assert (chosen(index, []).worker_id, chosen(index, []).expected_s) == ("b", 0.6)
    index.pass_time(0.7)
    assert chosen(index, []).worker_id == "b", "idle"
    index.give("b", 0.3)
    assert chosen(index, []).worker_id == "a"
    assert chosen(index, []).expected_s == pytest.approx(0.2)
    index.pass_time(1.0)
    index.report("b", costs(0.1))
    assert chosen(index, []) == Choice("a", 0.0, 0.0, 0, 0), "a queue is never shorter than none"


def test_a_hot_prefix_spreads_over_workers_as_their_queues_grow() -> None:
    random = Random(9)
    index, numbers = built(), Counter[str]()
    prefix = chain_of(random, 20)
    for number in range(10):
        index.resync(Snapshot(f"{number}", 0))
        index.report(f"{number}", costs())
    for number in range(400):
        chain = [*prefix, *chain_of(random, 4)]
        choice = chosen(index, chain, key=f"{number}")
        numbers[choice.worker_id] += 1
        index.changed(BlocksChanged(choice.worker_id, numbers[choice.worker_id], Tier.DEVICE, chain))
        index.report(choice.worker_id, costs(choice.expected_s))
        if number == 4:
            assert len(numbers) == 1, "an idle worker that has the prefix is best"
    assert len(numbers) == 10
    assert max(numbers.values()) < 2 * min(numbers.values())


def test_too_few_lookups_never_promise_a_block_that_nobody_has() -> None:
    random = Random(10)
    for _ in range(200):
        holders, lengths = BlockHolders(), [random.randint(0, 64) for _ in range(6)]
        chain = chain_of(random, 64)
        for length in lengths:
            holders.add(holders.take_slot(), Tier.HOST, chain[:length])
        for max_lookups in (2, 4, 8, 200):
            segments = holders.segments(chain, max_lookups)
            assert sum(segment.num_blocks for segment in segments) == 64
            found = [_blocks(segments, slot) for slot in range(6)]
            assert all(at_most <= length for at_most, length in zip(found, lengths, strict=True))
        assert found == lengths


def _blocks(segments: Sequence[Segment], slot: int) -> int:
    return sum(num_blocks for num_blocks, held in segments if held >> (2 * slot + Tier.HOST) & 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_table_holds_what_a_dict_would_through_crowding_removal_and_growth(seed: int) -> None:
    random = Random(seed)
    table, plain = BlockTable(), dict[int, int]()
    crowded = [random.getrandbits(TAG_BITS - 1) | 1 for _ in range(300)]
    keys = crowded + [crowded[0] + (number << 1) for number in range(300)]  # all of these want one place
    for step in range(6000):
        key = random.choice(keys[: 100 + step // 5])
        number = random.choice([0, 1, 2, 3])
        table.put(key, number)
        plain[key] = number
        if step % 500 == 0:
            table.map_numbers(np.array([0, 2, 3, 0], np.uint64))
            plain = {key: [0, 2, 3, 0][number] for key, number in plain.items()}
    assert all(table.get(key) == plain.get(key, 0) for key in keys)
    assert len(table) == sum(number != 0 for number in plain.values())
    assert set(table.numbers()) - {0} == set(plain.values()) - {0}


def test_sets_of_holders_that_nobody_is_in_any_more_are_swept_out() -> None:
    random = Random(11)
    holders = BlockHolders()
    slots = [holders.take_slot() for _ in range(200)]
    chain = chain_of(random, 100)
    for block in chain:  # each passes through sets of 1 to 99 on its way
        for slot in random.sample(slots, 100):
            holders.add(slot, Tier.DEVICE, [block])
    assert holders.num_sets > 9000
    while holders.sweep():
        pass
    assert holders.num_sets <= 1 + 100, "nobody, and one for each block"
    before = [holders.held(block) for block in chain]
    assert all(bits.bit_count() == 100 for bits in before)
    assert not holders.sweep()


def test_a_slot_that_never_had_a_block_is_taken_again_at_once() -> None:
    holders = BlockHolders()
    first = holders.take_slot()
    holders.add(first, Tier.HOST, [])
    holders.retire(first)
    assert holders.take_slot() == first
    holders.add(first, Tier.HOST, chain_of(Random(15), 1))
    holders.retire(first)
    assert holders.take_slot() != first


def test_holders_that_would_make_too_many_sets_are_forgotten_until_a_sweep() -> None:
    random = Random(16)
    holders, chain = BlockHolders(max_sets=20), chain_of(random, 200)
    slots = [holders.take_slot() for _ in range(6)]
    told = dict.fromkeys(chain, 0)
    for _ in range(2000):
        block, slot, tier = random.choice(chain), random.choice(slots), random.choice(list(Tier))
        holders.add(slot, tier, [block])
        told[block] |= 1 << (2 * slot + tier)
        assert holders.held(block) & ~told[block] == 0, "nobody is said to have what it was not told to have"
    assert holders.num_sets == 20 + 1
    assert any(holders.held(block) != told[block] for block in chain)
    for slot in slots[:5]:
        holders.retire(slot)
    while holders.sweep():
        pass
    holders.add(slots[5], Tier.DEVICE, chain)
    assert all(holders.held(block) & 1 << 10 for block in chain)
