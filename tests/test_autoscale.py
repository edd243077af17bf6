"""How many workers a load needs, over time; and that who scales does what is asked for, and no more than it knows."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.autoscale import Autoscaler, Load
from server.errors import WorkerFault
from server.scaling import Scaling
from tests.fake_worker import front_end

IDLE, BUSY = Load(0, 0, 0.0), Load(20, 64, 0.95)


def autoscaler(*, low: int = 1, high: int = 8) -> Autoscaler:
    return Autoscaler(low, high, up_after_s=10, down_after_s=300)


def over_time(scaler: Autoscaler, num_workers: int, load: Load, seconds: Sequence[float]) -> list[int]:
    """What it decides at these times, each decision carried out at once."""
    decided = []
    for now_s in seconds:
        num_workers = scaler.decide(num_workers, [load] * num_workers, now_s)
        decided.append(num_workers)
    return decided


def test_a_queue_adds_workers_only_once_it_has_lasted() -> None:
    assert over_time(autoscaler(), 1, Load(9, 64, 0.5), [0, 5, 9, 10, 15, 19, 26]) == [1, 1, 1, 2, 2, 2, 4]


def test_full_pools_add_a_worker_without_any_queue() -> None:
    assert over_time(autoscaler(), 2, Load(0, 10, 0.95), [0, 10]) == [2, 3]


def test_a_queue_that_was_gone_in_between_starts_anew() -> None:
    scaler = autoscaler()
    assert over_time(scaler, 1, BUSY, [0, 9]) == [1, 1]
    assert over_time(scaler, 1, Load(0, 1, 0.1), [9.5]) == [1]
    assert over_time(scaler, 1, BUSY, [10, 19]) == [1, 1]


def test_workers_go_one_by_one_and_only_after_long_rest() -> None:
    assert over_time(autoscaler(), 3, IDLE, [0, 299, 300, 301, 600, 601]) == [3, 3, 2, 2, 2, 1]


def test_a_worker_stays_whose_load_the_others_could_not_carry() -> None:
    assert over_time(autoscaler(), 2, Load(0, 10, 0.35), [0, 1000]) == [2, 2]
    assert over_time(autoscaler(), 2, Load(0, 10, 0.25), [0, 1000]) == [2, 1]


def test_while_workers_start_nothing_more_is_decided() -> None:
    scaler = autoscaler()
    assert scaler.decide(4, [BUSY, BUSY], 0) == 4
    assert scaler.decide(4, [BUSY, BUSY], 100) == 4


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1), st.floats(0, 500)), max_size=40), st.integers(0, 12))
def test_it_never_leaves_its_bounds_and_never_more_than_doubles(
    steps: list[tuple[int, float, float]], num_workers: int
) -> None:
    scaler, now_s = autoscaler(low=2, high=7), 0.0
    for waiting, share, passed_s in steps:
        now_s += passed_s
        before = min(max(num_workers, 2), 7)
        num_workers = scaler.decide(num_workers, [Load(waiting, 1, share)] * num_workers, now_s)
        assert 2 <= num_workers <= 7
        assert before - 1 <= num_workers <= 2 * before


class Cluster:
    """What a RayCluster is asked by who scales."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.asked: int | None = None
        self.reserved: list[int] = []
        self.fails = 0

    async def wanted(self) -> int | None:
        return self.asked

    async def reserve(self, count: int) -> None:
        self.reserved.append(count)

    async def scale_to(self, count: int, *, drain_s: float) -> None:
        self.fails -= 1
        if self.fails >= 0:
            raise WorkerFault("Ray is away")
        self.num_workers = count


async def scaled(cluster: Cluster, count: int) -> None:
    async with asyncio.timeout(5):
        while cluster.num_workers != count:  # noqa: ASYNC110  # a plain number
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("fails", [0, 2])
async def test_what_is_asked_for_is_done_and_tried_again_where_it_fails(fails: int) -> None:
    async with front_end() as front:
        cluster = Cluster(2)
        cluster.fails = fails
        task = asyncio.create_task(Scaling(cluster, front.app.directory, None, drain_s=1, period_s=0.01).run())
        for count in (4, 1):
            cluster.asked = count
            await scaled(cluster, count)
        task.cancel()
        assert cluster.reserved[-1] == 1


async def test_the_load_of_real_workers_decides_and_what_is_asked_for_is_where_it_goes_on_from() -> None:
    async with front_end(num_workers=2) as front:
        cluster = Cluster(2)
        scaler = Autoscaler(1, 8, up_after_s=0.05, down_after_s=0.05)
        scaling: Any = Scaling(cluster, front.app.directory, scaler, drain_s=1, period_s=0.01)
        task = asyncio.create_task(scaling.run())
        await scaled(cluster, 1)  # the fake workers say that they are idle
        cluster.num_workers = 2
        for worker in front.workers.values():
            worker.waiting = 9
        await scaled(cluster, 4)
        cluster.asked = 5
        await scaled(cluster, 5)
        task.cancel()
