"""Puts KV that was computed by itself where it stands in a request: a document's, say, in the midst of a question.

Such KV lies in the tiers as that of any conversation, one that has the insert's tokens alone; here it is only read.
What no tier has is not computed by itself in a turn's way: the request is told, and computes it where it stands. Used
by the engine's thread alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache_store.inserts import Insert
from worker.attention.placing import Placer
from worker.engine.gather import Gatherer, Gathering
from worker.engine.plan import Span, overlaps
from worker.engine.prefix import Wanted, full_names, tail_of
from worker.engine.request import Request
from worker.ids import BlockId
from worker.tiers.moves import Content, Tier, content_of

Parts = Sequence[tuple[Insert, Span]]
"""Positions that are to be inserted, each with the insert that it is a part of."""


class _Piece(NamedTuple):
    """What one block of an insert has for a request."""

    insert: Insert
    content: Content
    first: int
    """Where the block's first token stands."""
    span: Span


class Inserter:
    def __init__(self, gatherer: Gatherer, placer: Placer, *, block_tokens: int) -> None:
        self._gatherer = gatherer
        self._placer = placer
        self._block_tokens = block_tokens

    def fill(
        self,
        request: Request,
        parts: Parts,
        ready: Callable[[list[tuple[Span, Tier]], int], None],
        lost: Callable[[list[Insert], bool], None],
    ) -> None:
        """Insert these parts, then tell `ready` what came from where, and how many bytes were restored for it.

        `lost` is told instead what can't be had: that of which no tier has a block, or all where the device has no room
        to read any; and whether that is so.
        """
        pieces = dict(enumerate(self._pieces(request, parts)))

        def use(held: Mapping[int, BlockId]) -> None:
            for number, block in held.items():
                self._copy(request, block, pieces[number])

        def done(gathering: Gathering) -> None:
            missing = pieces if gathering.has_no_room else gathering.missing
            if missing:
                lost(sorted({pieces[number].insert for number in missing}), gathering.has_no_room)
            else:
                found = [(pieces[number].span, tier) for number, tier in sorted(gathering.found.items())]
                ready(found, gathering.restored_bytes)

        wanted = {number: piece.content for number, piece in pieces.items()}
        request.relies_on |= {content.name for content in wanted.values()}
        gathering = self._gatherer.gather(wanted, use, done)
        if not gathering.is_over:
            request.gathering = gathering

    def expected_tokens(self, request: Request, gaps: Sequence[Span]) -> int:
        """What of these parts of a request need not be computed if the tiers have what they may have."""
        inserts = [] if request.inserts is None else request.inserts.all
        parts = [(insert, part) for insert in inserts for part in overlaps(Span(insert.linked, insert.end), gaps)]
        lost = {piece.insert for piece in self._pieces(request, parts) if not self._gatherer.may_have(piece.content)}
        return sum(part.tokens for insert, part in parts if insert not in lost)

    def _pieces(self, request: Request, parts: Parts) -> list[_Piece]:
        call, size = request.call, self._block_tokens
        pieces = []
        for insert, part in parts:
            for want in self._blocks(request, insert):
                first = insert.start + want.index * size
                for span in overlaps(Span(first, first + want.content_tokens), [part]):
                    content = content_of(want, size, call.codec, call.tenant)
                    pieces.append(_Piece(insert, content, first, span))
        return pieces

    def _blocks(self, request: Request, insert: Insert) -> list[Wanted]:
        """Of a conversation that has its tokens alone."""
        root, size = request.root, self._block_tokens
        tokens = request.tokens[insert.start : insert.end]
        names = full_names(root, tokens, size)
        tail = tail_of(root, names, tokens, len(tokens), size)
        full = [Wanted(index, name, size, size) for index, name in enumerate(names)]
        return full if tail is None else [*full, tail]

    def _copy(self, request: Request, block: BlockId, piece: _Piece) -> None:
        size, positions = self._block_tokens, np.arange(*piece.span)
        source = block * size + positions - piece.first
        blocks = np.array([request.block_of(index) for index in (positions // size).tolist()])
        self._placer.place(source, blocks * size + positions % size, piece.insert.start)
        if self._gatherer.pool.is_lossy(block):
            for target in np.unique(blocks).tolist():
                self._gatherer.pool.mark_lossy(target)
