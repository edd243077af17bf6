"""What a cache could spare the prompts of a trace: without limit, at best in so many blocks, and by LRU. Simulated.

Blocks are the server's own: named by their tokens and all before them. Requests are served in the order they come in.

The best is Belady's: it knows the future, keeps what is needed soonest, and need not keep what nobody needs again. No
tiers of these sizes can do better, however blocks move between them: together they hold as many blocks at the most,
and what lies in two of them counts twice. (All blocks are of equal size, so that Belady's has the most hits there are.)
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache_store.ids import BlockHash, full_block_hashes, root_hash


class Access(NamedTuple):
    """A prompt's full blocks, in order, and what else it writes."""

    names: Sequence[BlockHash]
    last_offers: int
    """Tokens of the last full block that the prompt could use: all, or all but the one that is computed always."""
    num_own: int
    """Blocks of the reply, which no other prompt has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ideal:
    """Prompt tokens that a cache would have had."""

    prompt_tokens: int
    infinite: int
    best: int
    """At the most, in blocks as many as the tiers have together."""
    lru: int
    """What one LRU cache of as many blocks would have; replies take room in it."""


def access(prompt: Sequence[int], output_tokens: int, block_tokens: int) -> Access:
    """The blocks that a prompt could find, and those that its reply (whose last token is never run) adds."""
    names = list(full_block_hashes(root_hash(b"trace", "", ""), prompt, block_tokens))
    offers = min(block_tokens, len(prompt) - 1 - (len(names) - 1) * block_tokens)
    return Access(names, offers, -(-(len(prompt) + output_tokens - 1) // block_tokens) - len(names))


def ideal(accesses: Sequence[Access], *, prompt_tokens: int, block_tokens: int, capacity_blocks: int) -> Ideal:
    infinite = _tokens(accesses, _infinite(accesses), block_tokens)
    return Ideal(
        prompt_tokens=prompt_tokens,
        infinite=infinite,
        best=min(infinite, block_tokens * belady_hits(accesses, capacity_blocks)),
        lru=_tokens(accesses, lru_hits(accesses, capacity_blocks), block_tokens),
    )


def distinct_blocks(accesses: Sequence[Access]) -> int:
    """Blocks of prompts, each counted once."""
    return len({name for one in accesses for name in one.names})


def belady_hits(accesses: Sequence[Access], capacity_blocks: int) -> int:
    """Blocks found in a cache that always keeps those which are needed soonest."""
    order = [name for one in accesses for name in one.names]
    following: list[int] = []
    last_use: dict[BlockHash, int] = {}
    for at in range(len(order) - 1, -1, -1):
        following.append(last_use.get(order[at], len(order)))
        last_use[order[at]] = at
    following.reverse()
    kept: dict[BlockHash, int] = {}  # with the next use
    furthest: list[tuple[int, BlockHash]] = []
    hits = 0
    for name, next_use in zip(order, following, strict=True):
        hits += kept.pop(name, None) is not None
        if next_use == len(order):
            continue
        kept[name] = next_use
        heapq.heappush(furthest, (-next_use, name))
        while len(kept) > capacity_blocks:
            use, gone = heapq.heappop(furthest)
            if kept.get(gone) == -use:  # else it was used since
                del kept[gone]
    return hits


def lru_hits(accesses: Sequence[Access], capacity_blocks: int) -> list[list[bool]]:
    """Which blocks of each prompt one LRU cache has; a chain's last block is its least recently used one."""
    kept: OrderedDict[BlockHash | tuple[int, int], None] = OrderedDict()
    hits: list[list[bool]] = []
    for number, one in enumerate(accesses):
        hits.append([name in kept for name in one.names])
        written: list[BlockHash | tuple[int, int]] = [*one.names, *((number, own) for own in range(one.num_own))]
        for block in reversed(written):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity_blocks:
            kept.popitem(last=False)
    return hits


def _infinite(accesses: Sequence[Access]) -> list[list[bool]]:
    seen: set[BlockHash] = set()
    hits = []
    for one in accesses:
        hits.append([name in seen for name in one.names])
        seen.update(one.names)
    return hits


def _tokens(accesses: Sequence[Access], hits: Sequence[Sequence[bool]], block_tokens: int) -> int:
    return sum(
        sum(found) * block_tokens - (block_tokens - one.last_offers) * (bool(found) and found[-1])
        for one, found in zip(accesses, hits, strict=True)
    )
