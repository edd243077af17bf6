"""One request's restore, as the engine sees it: which blocks are there, which are coming, and how far the prompt can be
computed meanwhile. Used by the engine's thread alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cache_store.store import Encoding
from worker.calls import MissReason, PlanKind
from worker.engine.plan import Span
from worker.engine.prefix import Wanted
from worker.tiers.claims import Claims, Restored, State
from worker.tiers.moves import Tier


@dataclass(slots=True)
class Lookup:
    """The blocks that could spare a request its prefill, and by index what became of them."""

    wanted: list[Wanted]
    found: dict[int, Tier | MissReason] = field(default_factory=dict)
    restored: dict[int, Encoding] = field(default_factory=dict)
    """Those that a tier below the device had, as what payload."""
    carried: dict[int, Tier] = field(default_factory=dict)
    """Of an epoch before, which was copied to stand in front of the request's own."""
    inserted: list[tuple[Span, Tier]] = field(default_factory=list)
    """What came from KV that was computed by itself, and from where."""
    copied_bytes: int = 0
    """Restored to be copied from."""

    @property
    def restored_bytes(self) -> int:
        return self.copied_bytes + sum(encoding.num_bytes for encoding in self.restored.values())


@dataclass(frozen=True, slots=True)
class Asked:
    """A block that the device lacks."""

    want: Wanted
    tier: Tier
    """Where it may be."""
    is_believed: bool
    """It is known to be there, or was when its history was committed: not only hoped for."""


@dataclass(slots=True)
class FirstPlan:
    """What was planned when the request was admitted."""

    kind: PlanKind
    predicted_s: float


class Restoring:
    def __init__(
        self,
        lookup: Lookup,
        asked: Sequence[Asked],
        *,
        block_tokens: int,
        num_target: int,
        deadline_s: float,
        settled: Callable[[], None],
    ) -> None:
        """`settled` as in `Claims`. `num_target` is the prompt's end."""
        self.lookup = lookup
        self.asked = asked
        self.deadline_s = deadline_s
        self.claims = Claims(len(asked), settled)
        self.plan: FirstPlan | None = None
        self.front = 0
        """Index of the first block that is still to come: before it, all is there or was given to compute."""
        self._block_tokens = block_tokens
        self._num_target = num_target
        self._number_of = {block.want.index: number for number, block in enumerate(asked)}
        self._wanted = {want.index: want for want in lookup.wanted}

    def span_of(self, want: Wanted) -> Span:
        """The positions that a block would serve."""
        start = want.index * self._block_tokens
        return Span(start, start + want.offers)

    def coming(self) -> Iterator[tuple[int, State]]:
        """Number and state of the asked blocks that are not settled, first to last."""
        return ((number, state) for number, state in enumerate(self.claims.states()) if state.is_open)

    def advance(self) -> list[Span]:
        """Go on to the first block that is still to come. Returns the positions passed that must be computed."""
        states, gaps = self.claims.states(), list[Span]()
        while (start := self.front * self._block_tokens) < self._num_target:
            number = self._number_of.get(self.front)
            if number is not None and states[number].is_open:
                break
            offers = self._offers(states[number] if number is not None else None)
            end = min(start + self._block_tokens, self._num_target)
            if start + offers < end:
                gaps.append(Span(start + offers, end))
            self.front += 1
        return gaps

    def _offers(self, state: State | None) -> int:
        """How many tokens of the front's block are there. `state` is None where it was not asked for."""
        is_there = state is State.LANDED if state is not None else self.lookup.found.get(self.front) is Tier.DEVICE
        return self._wanted[self.front].offers if is_there else 0

    @property
    def passed(self) -> int:
        """Position up to which all is there or was given to compute."""
        return min(self.front * self._block_tokens, self._num_target)

    def settle(self) -> None:
        """Note in the lookup what became of each block."""
        for block, state, outcome in zip(self.asked, self.claims.states(), self.claims.outcomes(), strict=True):
            if isinstance(outcome, Restored):
                self.lookup.found[block.want.index], self.lookup.restored[block.want.index] = outcome
            elif state is State.TAKEN and not block.is_believed:
                self.lookup.found[block.want.index] = MissReason.ABSENT  # nobody knows better
            else:
                self.lookup.found[block.want.index] = outcome

    def num_computed_instead(self) -> int:
        """Tokens that a tier was believed to have and that were computed all the same."""
        return sum(
            block.want.offers
            for block, state in zip(self.asked, self.claims.states(), strict=True)
            if state is State.TAKEN and block.is_believed
        )
