"""Decide, step by step, which blocks of a restore the engine computes rather than waits for.

It weighs estimates and takes claims; it runs nothing. Used by the engine's thread alone.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from worker.calls import MissReason, PlanKind
from worker.engine.cost_model import CostModel
from worker.engine.plan import Span
from worker.engine.request import Request
from worker.engine.restore_plan import Coming, Meeting, meet
from worker.engine.restoring import FirstPlan, Restoring
from worker.tiers.claims import Claims, State
from worker.tiers.transfer_costs import TransferCosts

_PARTS = 4
"""What is to be computed from the front is begun in so many parts: a step that was begun is run to its end."""
_OVERDUE = 4.0
"""Blocks are late when they take so many times as long as those before them,"""
_PATIENCE_S = 0.05
"""and at least this long: a thread may have been kept waiting for a core."""


_WORTH_LEAVING = 0.5
"""A plan to load everything is left in mid-load only where blocks are late, or this share of the time would be left:
what has begun to come mostly comes, and the estimates of a short load are the noisiest."""


class Planner(Protocol):
    """Takes from a restore what is to be computed instead. Called before the restore begins, and before each step."""

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        """`ahead` are the requests whose prompts are computed first."""
        ...


class LoadAll:
    """Wait for everything."""

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        return None


class ComputeAll:
    """Wait for nothing."""

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        restoring.claims.take_all(MissReason.FASTER)


class CostPlanner:
    """Take from the front what is computed before the rest has landed, a part of it at a time.

    Blocks that are late are expected to take as long again as they have been waited for: so the longer nothing comes,
    the more is computed.
    """

    def __init__(
        self,
        cost_model: CostModel,
        transfers: TransferCosts,
        num_queued: Callable[[Claims], int],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_queued` says how many blocks are to come before those of a restore."""
        self._cost_model = cost_model
        self._transfers = transfers
        self._num_queued = num_queued
        self._now = now

    def plan(self, request: Request, restoring: Restoring, ahead: Iterable[Request]) -> None:
        if request.gaps:  # what was taken is still to be computed: look again when more is known
            return
        coming = list(restoring.coming())
        if not coming:
            return
        wait_s, is_late = self._wait_s(request, restoring, coming)
        meeting = self._meet(request, restoring, [number for number, _ in coming], ahead, wait_s)
        if restoring.plan is None:
            restoring.plan = FirstPlan(_kind(meeting, len(coming)), meeting.predicted_s)
        elif (
            restoring.plan.kind is PlanKind.LOAD
            and not is_late
            and meeting.predicted_s > _WORTH_LEAVING * meeting.loading_s
        ):
            return
        self._take(restoring, coming, meeting.num_computed, is_late=is_late)

    def _meet(
        self, request: Request, restoring: Restoring, numbers: list[int], ahead: Iterable[Request], wait_s: float
    ) -> Meeting:
        blocks = [restoring.asked[number] for number in numbers]
        block_s = {tier: self._transfers.block_s(tier, request.call.codec) for tier in {block.tier for block in blocks}}
        has_hit = any(state is State.LANDED for state in restoring.claims.states())
        coming = [
            Coming(
                restoring.span_of(block.want),
                # What is only hoped for is most likely nowhere, and that is answered at once.
                block_s[block.tier] if block.is_believed or has_hit else 0.0,
            )
            for block in blocks
        ]
        return meet(
            coming,
            Span(coming[-1].span.end, request.num_target),
            self._cost_model.prefill_s,
            busy_s=sum(self._cost_model.prefill_s(gap) for other in ahead for gap in other.gaps),
            wait_s=wait_s,
        )

    def _wait_s(self, request: Request, restoring: Restoring, coming: list[tuple[int, State]]) -> tuple[float, bool]:
        """Seconds until the blocks begin to come, and whether they are late already."""
        tier = max((restoring.asked[number].tier for number, _ in coming), key=self._transfers.latency_s)
        block_s = self._transfers.block_s(tier, request.call.codec)
        queued_s = self._num_queued(restoring.claims) * block_s
        first_s = self._transfers.latency_s(tier) + queued_s
        waited_s = self._now() - restoring.claims.progress_s
        is_late = waited_s > max(_OVERDUE * (first_s + block_s), _PATIENCE_S)
        if is_late:
            return waited_s, True
        has_begun = any(state is not State.PENDING for _, state in coming)
        return (0.0 if has_begun else first_s), False

    def _take(self, restoring: Restoring, coming: list[tuple[int, State]], num: int, *, is_late: bool) -> None:
        """Take the first `num` blocks that come, or a part of them where that is enough for a step: by the next one
        more is known of when the others come."""
        spans = [restoring.span_of(restoring.asked[number].want) for number, _ in coming]
        tokens = sum(span.tokens for span in spans[:num])
        enough = tokens if num == len(coming) else max(tokens // _PARTS, self._cost_model.worthwhile_tokens)
        taken = 0
        for (number, _), span in list(zip(coming, spans, strict=True))[:num]:
            reason = MissReason.LATE if is_late else MissReason.FASTER
            if taken >= enough or not restoring.claims.take(number, reason, in_flight=is_late):
                return
            taken += span.tokens


def _kind(meeting: Meeting, count: int) -> PlanKind:
    if meeting.num_computed == 0:
        return PlanKind.LOAD
    return PlanKind.COMPUTE if meeting.num_computed == count else PlanKind.BOTH_ENDS
