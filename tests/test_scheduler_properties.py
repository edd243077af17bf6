"""Whatever is asked of an engine that is too small for it, in whatever order: who is let in gets exactly its reply."""

from collections.abc import Sequence
from contextlib import suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.engines import EngineFactory, Stream, generate, poison, start
from worker.calls import FinishReason
from worker.engine.engine import Engine
from worker.errors import Overloaded

BLOCK_TOKENS = 16
NUM_BLOCKS = 9
"""One of the longest turns needs eight."""
LONGEST = 24
PROMPTS = [
    tuple((7 * place + first) % 300 + 5 for place in range(length)) for first in (0, 3) for length in (5, 40, 90)
]
"""Some begin as others do."""


class AnyLoad(RuleBasedStateMachine):
    """Turns of three tenants come, and hang up; some wait, some give way, some are preempted; blocks come and go."""

    def __init__(self, engine: Engine, replies: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.engine, self.replies = engine, replies
        self.open: list[tuple[Stream, tuple[int, ...]]] = []
        """With the reply that each should have."""

    @rule(which=st.integers(0, len(PROMPTS) - 1), length=st.integers(1, LONGEST), tenant=st.sampled_from("abc"))
    def come(self, which: int, length: int, tenant: str) -> None:
        with suppress(Overloaded):
            stream = start(self.engine, (), PROMPTS[which], max_new_tokens=length, tenant=tenant)
            self.open.append((stream, self.replies[which][:length]))

    @rule(which=st.integers(0, 99))
    def hang_up(self, which: int) -> None:
        if self.open:  # no precondition: that depends on time, and what is drawn must not
            stream, _ = self.open.pop(which % len(self.open))
            self.engine.cancel(stream.request_id)

    @rule(which=st.integers(0, 99))
    def hear_one_out(self, which: int) -> None:
        if self.open:
            self.hear_out(*self.open.pop(which % len(self.open)))

    @rule(which=st.integers(0, len(PROMPTS) - 1), tenant=st.sampled_from("abc"))
    def forget(self, which: int, tenant: str) -> None:
        """Also what a turn is running on."""
        self.engine.drop(tenant, PROMPTS[which], with_redis=False).result(30)

    @rule()
    def poison_what_nobody_uses(self) -> None:
        self.engine._inbox.do(lambda: poison(self.engine)).result(30)

    @invariant()
    def blocks_balance(self) -> None:
        self.engine._inbox.do(lambda: self.engine._check(settled=False)).result(30)

    def teardown(self) -> None:
        for stream, expected in self.open:  # nobody waits for ever
            self.hear_out(stream, expected)
        self.blocks_balance()  # and when all is quiet, after the test, that none is used

    def hear_out(self, stream: Stream, expected: tuple[int, ...]) -> None:
        with suppress(Overloaded):  # another tenant's turn has its place
            turn = stream.result()
            assert turn.reply == expected
            assert turn.finished.reason is FinishReason.LENGTH


def test_any_load_on_an_engine_that_is_too_small_for_it(build_engine: EngineFactory) -> None:
    roomy = build_engine()
    replies = [generate(roomy, (), prompt, max_new_tokens=LONGEST).reply for prompt in PROMPTS]
    block_bytes = roomy.layout.block_bytes
    small = build_engine(
        device_cache_bytes=NUM_BLOCKS * block_bytes,
        host_cache_bytes=2 * NUM_BLOCKS * block_bytes,
        block_tokens=BLOCK_TOKENS,
        max_running=3,
        max_waiting=3,
        max_step_tokens=32,
        max_prefill_tokens=48,
    )
    assert small.stats().device.capacity_blocks == NUM_BLOCKS
    run_state_machine_as_test(
        lambda: AnyLoad(small, replies),  # type: ignore[arg-type]  # any factory does
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
