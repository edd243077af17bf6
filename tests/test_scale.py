"""The simulation of routing at scale: its workers, its events, its ways, and the index at a small size."""

import json
from collections.abc import Sequence
from random import Random

import pytest

from benchmarks.ladder_trace import Read, Size, lru_hits
from benchmarks.scale import bars_of, run
from benchmarks.scale_index import measure_index
from benchmarks.scale_routing import (
    INDEX,
    POOLED,
    WAYS,
    Machines,
    RoutedByIndex,
    Turn,
    Worker,
    in_turn,
    measure_routing,
    simulate,
    sticky,
    turns_of,
)
from server.routing_index import BlocksChanged, RoutingIndex, Snapshot

SLOW = Machines(num_workers=4, device_blocks=20, host_blocks=60, token_s=0.001, host_byte_s=1e-9)


def conversations(seed: int, num_sessions: int = 30, every_s: float = 0.2) -> list[Read]:
    """Sessions of up to eight turns, each turn a few blocks longer, in random order."""
    random = Random(seed)
    order = [session for session in range(num_sessions) for _ in range(random.randint(1, 8))]
    random.shuffle(order)
    lengths = [0] * num_sessions
    reads = []
    for number, session in enumerate(order):
        lengths[session] += random.randint(1, 6)
        reads.append(Read(number * every_s, range(1000 * session, 1000 * session + lengths[session])))
    return reads


def test_one_worker_hits_what_an_lru_of_its_host_memory_hits() -> None:
    trace = conversations(1, every_s=1e6)
    worker = Worker("worker", Machines(num_workers=1, device_blocks=10, host_blocks=80))
    turns = turns_of(trace)
    served = [worker.serve(turn.at_s, turn.chain) for turn in turns]
    backwards = [Read(at_s, blocks[::-1]) for at_s, blocks in trace]  # ends of conversations go first
    assert sum(each.device + each.host for each in served) == lru_hits(backwards, [Size(0, 1)], 80).total() > 0
    assert sum(each.device for each in served) == lru_hits(backwards, [Size(0, 1)], 10).total() > 0
    assert sum(each.device + each.host + each.computed for each in served) == sum(len(turn.chain) for turn in turns)


def test_a_worker_takes_turns_one_after_the_other() -> None:
    worker = Worker("worker", SLOW)
    one_s = 10 * 512 * 0.001
    chains = [[bytes([session, block]) * 8 for block in range(10)] for session in range(2)]
    assert worker.serve(0.0, chains[0]).done_s == pytest.approx(one_s)
    assert worker.serve(1.0, chains[1]).done_s == pytest.approx(2 * one_s)
    assert worker.queue_s(1.0) == pytest.approx(2 * one_s - 1)
    assert worker.queue_s(2 * one_s + 1) == 0.0
    assert (worker.in_flight(1.0), worker.in_flight(one_s)) == (2, 1)
    assert worker.busy_s == pytest.approx(2 * one_s)


def test_a_workers_events_tell_what_it_has() -> None:
    worker = Worker("worker", SLOW)
    index = RoutingIndex(block_tokens=512, block_bytes=1)
    index.resync(Snapshot("worker", 0))
    turns = turns_of(conversations(2))
    for turn in turns:
        for event in worker.serve(turn.at_s, turn.chain).changes:
            assert index.changed(event)
    for turn in turns:
        device, host = index.held(turn.chain).get("worker", (0, 0))
        served = worker_has(worker, turn.chain)
        assert (device, host) == served
    assert index.num_blocks == SLOW.host_blocks


def worker_has(worker: Worker, chain: Sequence[bytes]) -> tuple[int, int]:
    device = sum(block in worker._device for block in chain)
    return device, sum(block in worker._host and block not in worker._device for block in chain)


def test_a_sessions_next_turn_waits_for_its_last_and_events_come_after_their_turn() -> None:
    blocks = [b"%016d" % number for number in range(30)]
    turns = [Turn(0.0, "a", blocks[:10]), Turn(1.0, "a", blocks[:20]), Turn(2.0, "b", blocks[20:])]
    workers = [Worker("one", SLOW)]
    seen: list[tuple[float, str, int]] = []
    events: list[BlocksChanged] = []

    def route(turn: Turn) -> Worker:
        seen.append((turn.at_s, turn.session, len(events)))
        return workers[0]

    figures = simulate(turns, workers, route, SLOW, events.append)
    block_s = 512 * 0.001
    # The second turn of "a" comes when the first is done, and before its events do.
    assert seen == [(0.0, "a", 0), (2.0, "b", 0), (10 * block_s, "a", 0)]
    assert figures["hit rate"] == pytest.approx(10 / 40)


def test_the_index_finds_what_luck_does_not_and_waits_less_than_sticking() -> None:
    figures = measure_routing(turns_of(conversations(3, 60, every_s=2.0)), SLOW, seed=0)
    assert figures.keys() == {*WAYS, POOLED}
    ours = figures[INDEX]
    assert all(ours["hit rate"] > 1.5 * figures[way]["hit rate"] for way in ("random", "round-robin"))
    assert ours["wait mean, s"] < figures["session-sticky"]["wait mean, s"]
    assert figures == measure_routing(turns_of(conversations(3, 60, every_s=2.0)), SLOW, seed=0)


def test_a_shared_prefix_is_before_every_prompt_and_in_no_session() -> None:
    trace = conversations(4)
    plain, shared = turns_of(trace), turns_of(trace, shared_blocks=5)
    assert len({tuple(turn.chain[:5]) for turn in shared}) == 1
    assert [turn.chain[5:] for turn in shared] == [turn.chain for turn in plain]
    assert [turn.session for turn in shared] == [turn.session for turn in plain]


def test_routes_without_an_index_are_what_their_names_say() -> None:
    workers = [Worker(f"{number}", SLOW) for number in range(3)]
    turns = turns_of(conversations(5))
    turning, sticking = in_turn(workers), sticky(workers)
    assert [turning(turn).worker_id for turn in turns[:5]] == ["0", "1", "2", "0", "1"]
    homes: dict[str, str] = {}
    for turn in turns:
        worker = sticking(turn)
        worker.serve(turn.at_s, turn.chain)
        assert homes.setdefault(turn.session, worker.worker_id) == worker.worker_id
    assert set(homes.values()) == {"0", "1", "2"}
    by_index = RoutedByIndex(workers, SLOW)
    assert by_index.route(turns[0]) in workers


def test_a_small_index_is_measured_like_a_large_one() -> None:
    figures = measure_index(num_workers=20, num_blocks=5000, decisions=200, seed=1)
    assert 5000 < figures["distinct blocks"] <= 5000 + 20 * 64
    assert figures["went where the history is"] > 0.7
    assert figures["updates/s"] > 0
    assert figures["decision p50, us"] <= figures["decision p99, us"]


def test_bars_compare_with_the_best_of_the_others() -> None:
    row = {"hit rate": 0.5, "wait p99, s": 2.0, "first token mean, s": 1.0}
    figures = {way: dict(row) for way in (*WAYS, POOLED)}
    assert [bar.holds for bar in bars_of(figures)] == [True] * 3
    figures["session-sticky"] |= {"wait p99, s": 1.9}
    figures[POOLED] |= {"hit rate": 0.6}
    assert [bar.holds for bar in bars_of(figures)] == [False, False, True]


def test_the_benchmark_says_all_in_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.scale.read_trace", lambda: conversations(6))
    run(workers=10, blocks=1000, decisions=50, trace_workers=3, shared_blocks=2, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["benchmark"] == "scale"
    assert {f"trace, {way}" for way in WAYS} < said["figures"].keys()
    assert len(said["bars"]) == 4
