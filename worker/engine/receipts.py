"""What a receipt says of a prompt beside its tokens by source: what was planned, and why tokens were missed. Pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from worker.calls import MissReason, RestorePlan
from worker.engine.plan import Span
from worker.engine.restoring import Restoring
from worker.tiers.moves import Tier


def planned(restoring: Restoring) -> RestorePlan | None:
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


def misses_of(
    gaps: Sequence[Span], found: Mapping[int, Tier | MissReason], *, num_history: int, block_tokens: int
) -> dict[MissReason, int]:
    """Why the tokens of a prompt's gaps have to be computed, by reason. `found` says what became of its blocks."""
    misses: dict[MissReason, int] = {}
    for gap in gaps:
        cuts = {gap.start, gap.end, num_history - 1, num_history}
        cuts.update(range(-(-gap.start // block_tokens) * block_tokens, gap.end, block_tokens))
        edges = sorted(cut for cut in cuts if gap.start <= cut <= gap.end)
        for start, end in pairwise(edges):
            reason = why_missed(found.get(start // block_tokens, MissReason.ABSENT), start, num_history)
            misses[reason] = misses.get(reason, 0) + end - start
    return misses


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
