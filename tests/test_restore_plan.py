"""What the planner expects of a restore: learned costs, and where computing and loading meet."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.cost_model import CostModel
from worker.engine.fit import Fit
from worker.engine.plan import Span, joined
from worker.engine.restore_plan import Coming, meet
from worker.tiers.moves import Tier
from worker.tiers.transfer_costs import TransferCosts

MIB = 1 << 20


def test_coefficients_are_found_from_noisy_observations() -> None:
    numbers = random.Random(1)
    fit = Fit((1.0, 1.0), newest=0.2)
    for _ in range(300):
        size = numbers.uniform(1, 200)
        fit.observe(int(size).bit_length(), (1.0, size), (3 + 0.5 * size) * numbers.uniform(0.9, 1.1))
    step, slope = fit.coefficients
    assert slope == pytest.approx(0.5, rel=0.1)
    assert step == pytest.approx(3, rel=0.3)


def test_no_coefficient_is_negative_and_the_others_are_the_best_without_it() -> None:
    fit = Fit((1.0, 1.0), newest=0.5)
    sizes = (10.0, 20.0, 30.0, 40.0)
    for size in sizes:
        fit.observe(size, (1.0, size), 2 * size - 10)
    step, slope = fit.coefficients
    rows = [(0.98**age, size / (2 * size - 10)) for age, size in enumerate(reversed(sizes))]
    assert step == 0
    assert slope == pytest.approx(sum(w * row for w, row in rows) / sum(w * row * row for w, row in rows), rel=0.01)


def test_what_nothing_was_seen_of_stays_as_it_was_at_the_start() -> None:
    fit = Fit((5.0, 7.0), newest=0.2)
    assert list(fit.coefficients) == [5, 7]
    for _ in range(50):
        fit.observe("one", (1.0, 0.0), 2.0)
    assert list(fit.coefficients) == pytest.approx([2, 7], rel=0.01)


def test_many_small_steps_do_not_make_it_forget_what_large_ones_take() -> None:
    fit = Fit((1.0, 1.0), newest=0.2)
    for size in (16.0, 1024.0):
        fit.observe(size, (1.0, size), 10 + 0.2 * size)
    for _ in range(1000):
        fit.observe(16.0, (1.0, 16.0), 13.2)
    assert fit.predict((1.0, 1024.0)) == pytest.approx(10 + 0.2 * 1024, rel=0.05)


def test_one_stall_moves_an_estimate_little_and_many_move_it_wholly() -> None:
    fit = Fit((1.0,), newest=0.15)
    for _ in range(20):
        fit.observe("one", (1.0,), 1.0)
    fit.observe("one", (1.0,), 1000.0)
    assert 1 < fit.predict((1.0,)) < 2.5
    for _ in range(40):
        fit.observe("one", (1.0,), 1000.0)
    assert fit.predict((1.0,)) == pytest.approx(1000, rel=0.05)


def test_recovery_is_believed_within_a_few_observations() -> None:
    fit = Fit((1.0,), newest=0.15)
    for _ in range(20):
        fit.observe("one", (1.0,), 100.0)
    for _ in range(8):
        fit.observe("one", (1.0,), 1.0)
    assert fit.predict((1.0,)) < 3


def seconds(span: Span, *, chunk: int = 2048) -> float:
    return (
        0.01 * math.ceil(span.tokens / chunk) + 4e-4 * span.tokens + 2e-7 * span.tokens * (span.start + span.tokens / 2)
    )


def test_prefill_is_predicted_for_shapes_that_were_never_run() -> None:
    model = CostModel(max_prefill_tokens=2048)
    numbers = random.Random(2)
    for _ in range(60):
        spans = [Span(start, start + numbers.randrange(1, 600)) for start in (0, numbers.randrange(0, 2000))]
        cost = sum(seconds(span) for span in spans) - 0.01 * (len(spans) - 1)
        model.ran(spans, cost * numbers.uniform(0.95, 1.05))
    for span in (Span(0, 128), Span(0, 2048), Span(4000, 4032), Span(0, 8192)):
        assert model.prefill_s(span) == pytest.approx(seconds(span), rel=0.2)
    assert model.prefill_s(Span(7, 7)) == 0
    assert 30 < model.worthwhile_tokens < 500


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def land(costs: TransferCosts, clock: Clock, block_s: list[float], num_bytes: int = MIB) -> None:
    """Blocks with two in flight, as a store reads them."""
    for place, pause_s in enumerate(block_s):
        if place == 0:
            costs.asked(Tier.REDIS)
        if place + 1 < len(block_s):
            costs.asked(Tier.REDIS)
        clock.now_s += pause_s
        costs.ended(Tier.REDIS, num_bytes)


def test_latency_and_rate_are_told_apart() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    for _ in range(12):
        land(costs, clock, [0.025, *[0.005] * 7])
    assert costs.latency_s(Tier.REDIS) == pytest.approx(0.02, rel=0.1)
    assert costs.block_s(Tier.REDIS, "raw") == pytest.approx(0.005, rel=0.1)


def test_bursts_are_seen_at_their_mean_rate() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    for _ in range(6):
        land(costs, clock, [0.001, *([0.040] + [1e-5] * 9) * 3])
    assert costs.block_s(Tier.REDIS, "raw") == pytest.approx(0.004, rel=0.5)


def test_a_link_that_becomes_faster_or_slower_is_noticed_within_one_restore() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    land(costs, clock, [0.001] * 100)
    land(costs, clock, [0.020] * 40)
    assert costs.block_s(Tier.REDIS, "raw") == pytest.approx(0.020, rel=0.3)
    land(costs, clock, [0.001] * 100)
    assert costs.block_s(Tier.REDIS, "raw") == pytest.approx(0.001, rel=0.5)


def test_a_codecs_decoding_counts_where_it_takes_longer_than_the_transfer() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    land(costs, clock, [0.004] * 20, num_bytes=MIB // 2)
    costs.decoded("int8", MIB // 2, 0.010)
    costs.decoded("raw", MIB, 0.001)
    assert costs.block_s(Tier.REDIS, "int8") == pytest.approx(0.010)
    assert costs.block_s(Tier.REDIS, "raw") == pytest.approx(0.008, rel=0.2)
    assert costs.block_s(Tier.HOST, "raw") == pytest.approx(0.001)
    assert costs.latency_s(Tier.HOST) == 0


def test_one_slow_write_to_the_device_is_only_one() -> None:
    costs = TransferCosts(MIB, now=Clock())
    for _ in range(50):
        costs.decoded("raw", MIB, 2e-4)
    costs.decoded("raw", MIB, 0.3)
    assert costs.block_s(Tier.HOST, "raw") < 5e-4
    for _ in range(4):
        costs.decoded("raw", MIB, 2e-4)
    assert costs.block_s(Tier.HOST, "raw") < 2.6e-4


def test_a_device_that_was_slow_is_given_a_new_chance_though_nothing_was_loaded_since() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    for _ in range(20):
        costs.decoded("raw", MIB, 0.3)
    assert costs.block_s(Tier.HOST, "raw") == pytest.approx(0.3)
    clock.now_s += 300
    assert costs.block_s(Tier.HOST, "raw") < 1e-3


def test_a_tier_that_was_not_heard_of_for_long_is_due_for_a_probe_once() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    land(costs, clock, [0.001])
    assert not costs.is_due_for_probe(Tier.REDIS)
    clock.now_s += 11
    assert costs.is_due_for_probe(Tier.REDIS)
    assert not costs.is_due_for_probe(Tier.REDIS)
    clock.now_s += 11
    costs.asked(Tier.REDIS)
    assert not costs.is_due_for_probe(Tier.REDIS), "it is being heard of"


def test_an_answer_that_says_nothing_of_the_rate_changes_none() -> None:
    clock = Clock()
    costs = TransferCosts(MIB, now=clock)
    land(costs, clock, [0.001] * 20)
    before = costs.block_s(Tier.REDIS, "raw")
    costs.asked(Tier.REDIS)
    clock.now_s += 50
    costs.ended(Tier.REDIS, None)
    assert costs.block_s(Tier.REDIS, "raw") == before


def blocks(count: int, load_s: float, size: int = 16) -> list[Coming]:
    return [Coming(Span(index * size, (index + 1) * size), load_s) for index in range(count)]


def linear(span: Span) -> float:
    return max(0, span.tokens) * 1e-3


LAST = Span(64 * 16, 64 * 16 + 10)


def test_what_loads_fast_is_loaded_alone() -> None:
    plan = meet(blocks(64, 1e-5), LAST, linear, busy_s=0, wait_s=1e-3)
    assert plan.num_computed == 0
    assert plan.predicted_s == pytest.approx(64e-5 + 1e-3 + 0.010)


def test_what_loads_too_slowly_is_computed_in_one_piece() -> None:
    plan = meet(blocks(64, 5.0), LAST, linear, busy_s=0, wait_s=0)
    assert plan.num_computed == 64
    assert plan.predicted_s == pytest.approx(linear(Span(0, LAST.end)))


def test_where_both_take_equally_long_they_meet_in_the_middle_in_half_the_time() -> None:
    plan = meet(blocks(64, 0.016), LAST, linear, busy_s=0, wait_s=0)
    assert plan.num_computed == 32
    assert plan.predicted_s == pytest.approx(0.512 + 0.010)


def test_a_busy_accelerator_moves_the_meeting_point_to_the_front() -> None:
    idle = meet(blocks(64, 0.016), LAST, linear, busy_s=0, wait_s=0).num_computed
    busy = meet(blocks(64, 0.016), LAST, linear, busy_s=0.2, wait_s=0).num_computed
    assert 0 < busy < idle


def test_the_longer_blocks_are_waited_for_the_more_is_computed() -> None:
    computed = [
        meet(blocks(64, 0.004), LAST, linear, busy_s=0, wait_s=wait_s).num_computed for wait_s in (0, 0.1, 0.4, 2)
    ]
    assert computed == sorted(computed)
    assert computed[-1] == 64


@given(
    count=st.integers(1, 40),
    load_s=st.floats(1e-5, 1.0),
    token_s=st.floats(1e-5, 0.1),
    busy_s=st.floats(0, 1),
    wait_s=st.floats(0, 1),
)
def test_no_other_meeting_point_is_much_better(
    count: int, load_s: float, token_s: float, busy_s: float, wait_s: float
) -> None:
    def prefill_s(span: Span) -> float:
        return 1e-3 + token_s * span.tokens if span.tokens > 0 else 0.0

    coming, last = blocks(count, load_s), Span(count * 16, count * 16 + 5)

    def total(num: int) -> float:
        if num == count:
            return busy_s + prefill_s(Span(0, last.end))
        return max(busy_s + prefill_s(Span(0, num * 16)), wait_s + (count - num) * load_s) + prefill_s(last)

    plan = meet(coming, last, prefill_s, busy_s=busy_s, wait_s=wait_s)
    assert plan.predicted_s == pytest.approx(total(plan.num_computed))
    assert plan.predicted_s <= min(total(0), total(count)) + 1e-9
    assert plan.predicted_s <= min(map(total, range(count + 1))) / 0.8 + 1e-9


def test_spans_that_touch_become_one() -> None:
    assert joined([Span(0, 3), Span(3, 5), Span(7, 9)]) == [Span(0, 5), Span(7, 9)]
    assert joined([]) == []
