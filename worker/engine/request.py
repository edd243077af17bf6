"""One request inside the engine: its tokens and blocks, what is still to be computed, and what it has cost."""

import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from itertools import pairwise

from cache_store.ids import BlockHash, chain
from worker.calls import Event, GenerateCall, MissReason, Receipt, RestorePlan
from worker.engine.admission import Ticket
from worker.engine.audit import Recording
from worker.engine.plan import Span, joined, subtract
from worker.engine.restoring import Restoring
from worker.engine.sampler import RowState
from worker.ids import BlockId
from worker.tiers.moves import Tier


class Phase(Enum):
    """WAITING, RESTORING, PREFILL, DECODE, OVER, in this order; preemption leads from DECODE back to WAITING."""

    WAITING = auto()
    RESTORING = auto()
    PREFILL = auto()
    DECODE = auto()
    OVER = auto()


class Request:
    """Used by the engine's thread alone."""

    def __init__(
        self,
        call: GenerateCall,
        listener: Callable[[Event], None],
        *,
        root: BlockHash,
        block_tokens: int,
        max_new_tokens: int,
        row: RowState,
        ticket: Ticket,
    ) -> None:
        self.call = call
        self.listener = listener
        self.root = root
        self.row = row
        self.ticket = ticket
        self.max_new_tokens = max_new_tokens
        self.phase = Phase.WAITING
        self.tokens: list[int] = [*call.history, *call.input, *call.begun]
        self.num_prompt = len(call.history) + len(call.input)
        self.num_target = len(self.tokens)
        """Prefill computes up to here: the prompt, and what was generated here before a preemption, or elsewhere."""
        self.names: list[BlockHash] = []
        self.table: list[BlockId] = []
        self.gaps: list[Span] = []
        """What may be computed now: of a request that is being restored, only what needs nothing that is to come."""
        self.restoring: Restoring | None = None
        self.receipt: Receipt | None = None
        self.spared: list[Span] = []
        """Of the prompt, what came from a tier: on the receipt by its tokens."""
        self.relies_on: frozenset[BlockHash] = frozenset()
        """The blocks it asked for: what it did not find, it computed itself."""
        self.restored: set[BlockHash] = set()
        """Those that came from the host tier or the store."""
        self.recording: Recording | None = None
        """Of a turn that will be audited."""
        self.prefetched = False
        """While it waits, its blocks are being brought to the host tier, or have been."""
        self.distrusted = False
        """A block that is being restored for it was found wrong meanwhile."""
        self.cancelled = False
        self.evicted = False
        """Its tenant was erased: nothing that is restored for it is to be found."""
        self.expected_tokens = self.num_target
        """Of its tokens, what is computed even if every tier has all that it may have."""
        self.on_over: Callable[[], None] = lambda: None
        """Called once, when the request has left the engine."""
        self.arrived_s = time.monotonic()
        self.admitted_s = self.restored_s = self.first_token_s = 0.0
        self._block_tokens = block_tokens

    @property
    def tenant(self) -> str:
        return self.call.tenant

    @property
    def has_begun(self) -> bool:
        """Here or elsewhere: it has, also where it waits again."""
        return self.admitted_s > 0 or bool(self.call.begun)

    @property
    def is_waiting(self) -> bool:
        """Any thread may ask."""
        return self.phase is Phase.WAITING

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_blocks(self) -> int:
        """Blocks that positions [0, num_target) take."""
        return -(-self.num_target // self._block_tokens)

    @property
    def num_blocks_at_most(self) -> int:
        return -(-(self.num_prompt + self.max_new_tokens) // self._block_tokens)

    def name_of(self, index: int) -> BlockHash:
        """The name of the `index`-th full block of the tokens so far."""
        size = self._block_tokens
        while len(self.names) <= index:
            start = len(self.names) * size
            assert start + size <= len(self.tokens), f"block {index} is not full"
            parent = self.names[-1] if self.names else self.root
            self.names.append(chain(parent, self.tokens[start : start + size]))
        return self.names[index]

    def ran(self, spans: Sequence[Span]) -> list[int]:
        """Note that spans of the gaps were computed. Returns the blocks that became full by it."""
        self.gaps = subtract(self.gaps, spans)
        size = self._block_tokens
        touched = {index for span in spans for index in range(span.start // size, -(-span.end // size))}
        open_blocks = {index for gap in self.gaps for index in range(gap.start // size, -(-gap.end // size))}
        return sorted(index for index in touched - open_blocks if (index + 1) * size <= self.num_target)

    def may_compute(self, gaps: Sequence[Span]) -> None:
        """Positions, behind all gaps there are, that need nothing any more but each other."""
        self.gaps = joined([*self.gaps, *gaps])

    def account(self, restoring: Restoring) -> None:
        """Turn what was found for each wanted block into the gaps to compute and, the first time, the receipt."""
        lookup, passed = restoring.lookup, restoring.passed
        covered = [
            (restoring.span_of(want), tier)
            for want in lookup.wanted
            if isinstance(tier := lookup.found[want.index], Tier)
        ]
        gaps = complement([span for span, _ in covered], self.num_target)
        self.may_compute([Span(max(gap.start, passed), gap.end) for gap in gaps if gap.end > passed])
        if self.receipt is not None:
            return
        # The receipt is the prompt's, also where a part of the reply was generated elsewhere.
        covered = [(cut, tier) for span, tier in covered if (cut := _upto(span, self.num_prompt)).tokens > 0]
        gaps = [cut for gap in gaps if (cut := _upto(gap, self.num_prompt)).tokens > 0]
        tokens = dict.fromkeys(Tier, 0)
        for span, tier in covered:
            tokens[tier] += span.tokens
        self.spared = joined([span for span, _ in covered])
        self.receipt = Receipt(
            device_tokens=tokens[Tier.DEVICE],
            host_tokens=tokens[Tier.HOST],
            disk_tokens=tokens[Tier.DISK],
            redis_tokens=tokens[Tier.REDIS],
            computed_tokens=sum(gap.tokens for gap in gaps),
            misses=self._misses(gaps, lookup.found),
            restored_bytes=lookup.restored_bytes,
            queue_ms=(self.admitted_s - self.arrived_s) * 1e3,
            restore_ms=(self.restored_s - self.admitted_s) * 1e3,
            plan=_planned(restoring),
        )
        self.receipt.check(self.num_prompt)

    def _misses(self, gaps: Sequence[Span], found: dict[int, Tier | MissReason]) -> dict[MissReason, int]:
        size, num_history = self._block_tokens, len(self.call.history)
        misses: dict[MissReason, int] = {}
        for gap in gaps:
            cuts = {gap.start, gap.end, num_history - 1, num_history}
            cuts.update(range(-(-gap.start // size) * size, gap.end, size))
            edges = sorted(cut for cut in cuts if gap.start <= cut <= gap.end)
            for start, end in pairwise(edges):
                reason = why_missed(found.get(start // size, MissReason.ABSENT), start, num_history)
                misses[reason] = misses.get(reason, 0) + end - start
        return misses


def _planned(restoring: Restoring) -> RestorePlan | None:
    """As far as it is known before the first token is there."""
    first = restoring.plan
    if first is None:
        return None
    return RestorePlan(
        kind=first.kind,
        predicted_ms=first.predicted_s * 1e3,
        actual_ms=0.0,
        computed_instead_tokens=restoring.num_computed_instead(),
    )


def why_missed(found: Tier | MissReason, position: int, num_history: int) -> MissReason:
    """Say why a position had to be computed, given what became of its block.

    Past a session's history everything is new. The history's last token was sampled and never run, so it has no KV
    anywhere, and in a block that was found what is left over is the part that the block does not reach.
    """
    if num_history and position >= num_history:
        return MissReason.NEW
    if isinstance(found, Tier) or (num_history and position == num_history - 1):
        return MissReason.TAIL
    if not num_history and found is MissReason.ABSENT:
        return MissReason.NEW
    return found


def _upto(span: Span, end: int) -> Span:
    """What of a span lies before `end`; empty where nothing does."""
    return Span(span.start, max(span.start, min(span.end, end)))


def complement(covered: Sequence[Span], end: int) -> list[Span]:
    """The gaps between sorted spans, up to `end`."""
    gaps: list[Span] = []
    at = 0
    for span in covered:
        if span.start > at:
            gaps.append(Span(at, span.start))
        at = max(at, span.end)
    if at < end:
        gaps.append(Span(at, end))
    return gaps
