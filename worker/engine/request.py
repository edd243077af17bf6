"""One request inside the engine: its tokens and blocks, what is still to be computed, and what it has cost."""

import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

import numpy as np

from cache_store.ids import BlockHash
from cache_store.inserts import Insert, Inserts
from worker.attention.recall_choice import Represented
from worker.calls import ContextReceipt, Event, GenerateCall, Receipt
from worker.engine.admission import Ticket
from worker.engine.audit import Recording
from worker.engine.epochs import Beyond
from worker.engine.gather import Gathering
from worker.engine.plan import Span, complement, joined, overlaps, subtract, upto
from worker.engine.prefix import Salts, name_of
from worker.engine.receipts import misses_of, planned
from worker.engine.recollection import Choice, Recollection
from worker.engine.restoring import Lookup, Restoring
from worker.engine.sampler import RowState
from worker.engine.stages import Stage
from worker.ids import BlockId
from worker.tiers.moves import Tier


class Phase(Enum):
    """WAITING, RESTORING, PREFILL, DECODE, OVER, in this order; preemption leads from DECODE back to WAITING."""

    WAITING = auto()
    RESTORING = auto()
    PREFILL = auto()
    DECODE = auto()
    RECALLING = auto()
    """It would decode, but what it attends to next is still on its way."""
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
        beyond: Beyond | None = None,
        inserts: Inserts | None = None,
    ) -> None:
        """`beyond` says what becomes of it beyond the window; None where it may not reach there. `inserts`: None where
        there are none."""
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
        self.lost_at: list[int] = []
        """Beyond the window: positions of what was looked for and is in no tier."""
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
        self.beyond = beyond
        self.inserts = inserts
        self.waits_for_all = False
        """Nothing of it can be computed before all that is restored or inserted is there."""
        self.epoch = 0
        self.first = 0
        """Beyond the window: from here on all is computed, and before it is had from a tier or not needed."""
        self.stalled_at = -1
        """How many requests had ended when it found no room further on."""
        self.holes: list[Span] = []
        """Of what is had, what is in no tier and needs nothing that is not there."""
        self.stage: Stage | None = None
        """What is being computed beyond the window,"""
        self.stage_start = 0
        self.has_asked = False
        """and whether it is so for the second time."""
        self.gathering: Gathering | None = None
        self.represented: dict[int, Represented] = {}
        """Representatives of its blocks, by index, that are not gone yet."""
        self.recollection: Recollection | None = None
        self.recalled: Choice | None = None
        """What is in the slots for what is recalled,"""
        self.asked: Choice | None = None
        """and what is to be there, by what was asked for."""
        self.restored_later_bytes = 0
        """What came from below the device since it began to be computed."""
        self.set_out()

    @property
    def salts(self) -> Salts | None:
        return self.beyond or self.inserts

    # Inserted

    def to_insert(self, restoring: Restoring) -> list[tuple[Insert, Span]]:
        """Of the inserts, what has not been found as a part of this conversation."""
        if self.inserts is None:
            return []
        covered = [span for span, _ in self._covered(restoring)]
        missing = complement(covered, self.num_target)
        return [
            (insert, part) for insert in self.inserts.all for part in overlaps(Span(insert.linked, insert.end), missing)
        ]

    def lose_inserts(self, lost: Sequence[Insert]) -> None:
        """No tier has the KV of these: they are computed where they stand, under other names."""
        assert self.inserts is not None
        rest = self.inserts.without(lost)
        self.inserts = rest if rest.all else None
        self.names = []

    # Beyond the window

    def set_out(self) -> None:
        """(Re)turn to where it is to begin: nothing of a turn is taken as computed whose choices are to be made."""
        self.stop_gathering()
        self.stage = self.recollection = self.recalled = None
        self.holes = []
        self.represented = {}
        self.epoch = self.first = 0
        if self.beyond is None or self.num_target <= self.beyond.epochs.reach:
            return
        first = len(self.tokens) if self.num_generated and not self.beyond.chooses else len(self.call.history)
        self.first = min([max(0, first - 1), *self.lost_at])
        if self.beyond.chooses:
            self.first = self.beyond.turn_at(self.first).run
        self.epoch = self.beyond.epochs.epoch_of(self.first)

    @property
    def follows_from_tokens(self) -> bool:
        """Can it be computed again from its tokens alone?"""
        return self.inserts is None and not self._may_leave_window

    @property
    def _may_leave_window(self) -> bool:
        """Has it, or may its reply?"""
        return self.beyond is not None and self.num_prompt + self.max_new_tokens > self.beyond.epochs.reach

    def stop_gathering(self) -> None:
        """Harmless where nothing is gathered."""
        if self.gathering is not None:
            self.gathering.cancel()
            self.gathering = None

    @property
    def shift(self) -> int:
        """By how much its tokens stand below their numbers."""
        return 0 if self.beyond is None else self.beyond.epochs.shift_of(self.epoch)

    @property
    def limit(self) -> int:
        """Prefill computes up to here with the blocks that it has now."""
        return self.num_target if self.beyond is None else min(self.num_target, self.beyond.epochs.end_of(self.epoch))

    @property
    def num_sinks(self) -> int:
        """Blocks at the front that stand where they are, whatever the epoch."""
        return 0 if self.beyond is None or not self.epoch else self.beyond.epochs.sink_tokens // self._block_tokens

    def place_of(self, position: int) -> int:
        """Where a token of it stands for the model."""
        return position if position < self.num_sinks * self._block_tokens else position - self.shift

    def block_of(self, index: int) -> BlockId:
        """Which of its blocks has the tokens from index * block_tokens on."""
        return self.table[self.place_of(index * self._block_tokens) // self._block_tokens]

    def samples_after(self, span: Span) -> bool:
        """Do this span's last logits choose the next token?"""
        return span.end == len(self.tokens) and not self.only_asks

    @property
    def only_asks(self) -> bool:
        """What it computes now only chooses what it is to be computed with."""
        return self.stage is not None and self.stage.asks and not (self.stage.is_reply or self.has_asked)

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
        """Blocks that its prefill needs, as far as it is planned now; beyond the window those of its whole epoch."""
        if self.epoch:
            return self.num_blocks_at_most
        return -(-self.limit // self._block_tokens)

    @property
    def end_at_most(self) -> int:
        """Of its tokens in this epoch."""
        end = self.num_prompt + self.max_new_tokens
        return end if self.beyond is None else min(end, self.beyond.epochs.end_of(self.epoch))

    @property
    def num_blocks_at_most(self) -> int:
        return -(-(self.end_at_most - self.shift) // self._block_tokens)

    def name_of(self, index: int) -> BlockHash:
        """The name of the `index`-th full block of the tokens so far."""
        size = self._block_tokens
        while len(self.names) <= index:
            start = len(self.names) * size
            assert start + size <= len(self.tokens), f"block {index} is not full"
            parent = self.names[-1] if self.names else self.root
            self.names.append(name_of(parent, self.tokens, start, start + size, self.salts))
        return self.names[index]

    def ran(self, spans: Sequence[Span]) -> list[int]:
        """Note that spans of the gaps were computed. Returns the blocks that became full by it."""
        self.gaps = subtract(self.gaps, spans)
        size = self._block_tokens
        end = self.num_target if self.stage is None else self.stage.end  # behind it nothing is computed, nor a gap yet
        touched = {index for span in spans for index in range(span.start // size, -(-span.end // size))}
        open_blocks = {index for gap in self.gaps for index in range(gap.start // size, -(-gap.end // size))}
        return sorted(index for index in touched - open_blocks if (index + 1) * size <= end)

    def may_compute(self, gaps: Sequence[Span]) -> None:
        """Positions, behind all gaps there are, that need nothing any more but each other."""
        self.gaps = joined([*self.gaps, *gaps])

    def account(self, restoring: Restoring) -> None:
        """Turn what was found for each wanted block into the gaps to compute and, the first time, the receipt."""
        lookup, passed = restoring.lookup, restoring.passed
        covered = self._covered(restoring)
        if self.epoch:
            covered = sorted([*covered, *self._carried(lookup)])
        covered = sorted([*covered, *lookup.inserted])
        left = self._left()
        gaps = complement(sorted([*left, *(span for span, _ in covered)]), self.num_target)
        if self.epoch:
            self.holes = [upto(gap, self.first) for gap in gaps if gap.start < self.first]
        else:
            ahead = [Span(max(gap.start, passed), min(gap.end, self.limit)) for gap in gaps]
            self.may_compute([gap for gap in ahead if gap.tokens > 0])
        if self.receipt is not None:
            return
        # The receipt is the prompt's, also where a part of the reply was generated elsewhere.
        covered = [(cut, tier) for span, tier in covered if (cut := upto(span, self.num_prompt)).tokens > 0]
        gaps = [cut for gap in gaps if (cut := upto(gap, self.num_prompt)).tokens > 0]
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
            misses=misses_of(gaps, lookup.found, num_history=len(self.call.history), block_tokens=self._block_tokens),
            restored_bytes=lookup.restored_bytes,
            queue_ms=(self.admitted_s - self.arrived_s) * 1e3,
            restore_ms=(self.restored_s - self.admitted_s) * 1e3,
            plan=planned(restoring),
            context=self._context(sum(span.tokens for span in left)),
        )
        self.receipt.check(self.num_prompt)

    def _covered(self, restoring: Restoring) -> list[tuple[Span, Tier]]:
        """What was found under its names, and where, in order."""
        lookup = restoring.lookup
        return [
            (restoring.span_of(want), tier)
            for want in lookup.wanted
            if isinstance(tier := lookup.found[want.index], Tier)
        ]

    def _carried(self, lookup: Lookup) -> list[tuple[Span, Tier]]:
        """Of the epoch before, which came from where."""
        size = self._block_tokens
        return [(Span(index * size, (index + 1) * size), tier) for index, tier in lookup.carried.items()]

    def _left(self) -> list[Span]:
        """What had left the window before this turn."""
        return [self.beyond.epochs.gone(self.epoch)] if self.beyond is not None and self.epoch else []

    def _context(self, left_tokens: int) -> ContextReceipt | None:
        if self.beyond is None or not self.epoch:
            return None
        return ContextReceipt(policy=self.beyond.policy, left_tokens=left_tokens)

    def finished_context(self) -> ContextReceipt | None:
        """As it is at the turn's end."""
        if self.beyond is None or len(self.tokens) <= self.beyond.epochs.reach:
            return None
        known = self.receipt and self.receipt.context
        left_tokens = known.left_tokens if known else 0
        unit = self.beyond.epochs.unit_tokens
        units = [] if self.recalled is None else np.unique(self.recalled).tolist()
        return ContextReceipt(
            policy=self.beyond.policy,
            left_tokens=left_tokens,
            choices=self.recollection.choices if self.recollection is not None else 0,
            recalled_tokens=unit * len(units),
            recalled_starts=tuple(unit * number for number in units),
            unit_tokens=unit if self.beyond.chooses else 0,
        )
