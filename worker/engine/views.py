"""What requests beyond their window attend to: sinks, what is recalled, the epoch before, in blocks of their own.

Knows where KV is to stand and gets it there; when is said by `worker/engine/passages.py`. Every copy is made from a
block as it was computed, never from another copy. Used by the engine's thread alone.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from worker.attention.placing import Placer
from worker.attention.recall_choice import Look
from worker.engine.block_tables import BlockTables
from worker.engine.gather import Gatherer, Gathering
from worker.engine.plan import Span
from worker.engine.prefix import Wanted
from worker.engine.recollection import Choice, Recollection
from worker.engine.representatives import Representatives
from worker.engine.request import Request
from worker.ids import BlockId
from worker.tiers.moves import Tier, content_of

_Ints = npt.NDArray[np.int64]

Lost = Callable[[int | None], None]
"""Told the position from which on a request has to be computed again, what stood there being in no tier; None: the
device has no room for it now."""


class Views:
    def __init__(
        self,
        tables: BlockTables,
        gatherer: Gatherer,
        placer: Placer,
        representatives: Representatives,
        look: Look,
        *,
        block_tokens: int,
    ) -> None:
        self._tables = tables
        self._gatherer = gatherer
        self._placer = placer
        self._representatives = representatives
        self._look = look
        self._block_tokens = block_tokens

    def fill(self, request: Request, ready: Callable[[Mapping[int, Tier], int], None], lost: Lost) -> None:
        """Put the epoch before in front of a request's own, and get to know what is gone.

        `ready` is told which blocks were read and from where, and how many bytes were restored.
        """
        beyond = request.beyond
        assert beyond is not None
        carry = self._indices(beyond.epochs.carried(request.epoch))
        self._know(request, carry, ready, lost)

    def roll(self, request: Request) -> bool:
        """Go on to the next epoch: what was the request's own is carried from now on. False where there is no room."""
        beyond = request.beyond
        assert beyond is not None
        epochs, size = beyond.epochs, self._block_tokens
        num_sinks, first = epochs.sink_tokens // size, epochs.first_place // size
        was = request.table
        if request.epoch == 0:
            fresh = self._tables.take(first - num_sinks)
            if fresh is None:
                return False
            table = [*was[:num_sinks], *fresh]
        else:
            table = was[:first]
        own = {index: request.block_of(index) for index in self._indices(Span(*_own(request)))}
        leaving = was[num_sinks:] if request.epoch == 0 else was[first:]
        request.epoch += 1
        request.table = table
        for index, block in own.items():
            if index >= num_sinks:
                self._represent(request, index, block)
            if index in self._indices(epochs.carried(request.epoch)):
                self._carry(request, index, block)
        self._tables.let_go(leaving)
        return True

    def know(self, request: Request, ready: Callable[[], None], lost: Lost) -> None:
        """Get to know what is gone since the request went on to its epoch."""
        beyond = request.beyond
        assert beyond is not None

        def known(found: Mapping[int, Tier], num_bytes: int) -> None:
            request.restored_later_bytes += num_bytes
            ready()

        if beyond.chooses:
            self._know(request, range(0), known, lost)
        else:
            ready()

    def _know(
        self, request: Request, carry: range, ready: Callable[[Mapping[int, Tier], int], None], lost: Lost
    ) -> None:
        def use(held: Mapping[int, BlockId]) -> None:
            for index, block in held.items():
                if index in carry:
                    self._carry(request, index, block)
                self._represent(request, index, block)

        def done(gathering: Gathering) -> None:
            if self._has_lost(gathering, lost):
                return
            self._recollect(request)
            ready({index: tier for index, tier in gathering.found.items() if index in carry}, gathering.restored_bytes)

        self._gather(request, [*self._unknown(request), *carry], use, done)

    def recall(self, request: Request, choice: Choice, ready: Callable[[], None], lost: Lost) -> None:
        """Put what was chosen where it is attended to; what stands there already stays."""
        beyond, was = request.beyond, request.recalled
        assert beyond is not None
        layers, heads, slots = np.nonzero(np.ones(choice.shape, dtype=bool) if was is None else choice != was)
        units = choice[layers, heads, slots]
        blocks = units * beyond.epochs.unit_tokens // self._block_tokens
        request.recalled = None  # half of it, until all is there

        def use(held: Mapping[int, BlockId]) -> None:
            here = np.isin(blocks, list(held))
            self._place(request, held, layers[here], heads[here], slots[here], units[here])

        def done(gathering: Gathering) -> None:
            if self._has_lost(gathering, lost):
                return
            request.recalled = choice
            request.restored_later_bytes += gathering.restored_bytes
            ready()

        self._gather(request, np.unique(blocks).tolist(), use, done)

    def hear(self, request: Request, position: int, skipped: int = 0) -> Callable[[int, torch.Tensor], None]:
        """What the queries of a chunk are told to: those from `position` on, its first token but for `skipped`."""
        recollection, place = request.recollection, request.place_of(position)
        assert recollection is not None
        return lambda layer, queries: recollection.hear(layer, place, queries[:, skipped:])

    def _has_lost(self, gathering: Gathering, lost: Lost) -> bool:
        if not gathering.missing and not gathering.has_no_room:
            return False
        lost(min(gathering.missing) * self._block_tokens if gathering.missing else None)
        return True

    def _gather(
        self,
        request: Request,
        indices: Iterable[int],
        use: Callable[[Mapping[int, BlockId]], None],
        done: Callable[[Gathering], None],
    ) -> None:
        call, size = request.call, self._block_tokens
        wanted = {
            index: content_of(
                Wanted(index, request.name_of(index), size, size), size, call.codec, call.tenant, request.beyond
            )
            for index in indices
        }
        request.relies_on |= {content.name for content in wanted.values()}
        gathering = self._gatherer.gather(wanted, use, done)
        if not gathering.is_over:  # else the request may have begun to gather something else by now
            request.gathering = gathering

    def _unknown(self, request: Request) -> list[int]:
        """Blocks of what is gone whose representatives have to be made. The others are the request's from now on."""
        beyond = request.beyond
        assert beyond is not None
        if not beyond.chooses:
            return []
        if request.recollection is None:
            epochs = beyond.epochs
            first_unit = epochs.sink_tokens // epochs.unit_tokens
            request.recollection = Recollection(first_unit, epochs.num_slots, self._placer.undo, self._look)
        unknown = []
        for index in self._indices(Span(self._num_known(request), beyond.epochs.gone(request.epoch).end)):
            if index not in request.represented:
                found = self._representatives.find(request.name_of(index))
                if found is None:
                    unknown.append(index)
                else:
                    request.represented[index] = found
        return unknown

    def _num_known(self, request: Request) -> int:
        """Tokens up to which what is gone may be recalled already."""
        assert request.beyond is not None
        assert request.recollection is not None
        return request.recollection.next_unit * request.beyond.epochs.unit_tokens

    def _recollect(self, request: Request) -> None:
        """Add what is gone to what may be recalled."""
        beyond = request.beyond
        assert beyond is not None
        if not beyond.chooses:
            return
        assert request.recollection is not None
        for index in self._indices(Span(self._num_known(request), beyond.epochs.gone(request.epoch).end)):
            request.recollection.add(request.represented.pop(index))

    def _represent(self, request: Request, index: int, block: BlockId) -> None:
        beyond, size = request.beyond, self._block_tokens
        assert beyond is not None
        if beyond.chooses and index not in request.represented:
            name, places = request.name_of(index), beyond.epochs.place_of(index * size) + np.arange(size)
            made = self._representatives.find(name)
            if made is None:
                made = self._representatives.keep(name, self._placer.unturned(self._slots(block), places))
            request.represented[index] = made

    def _carry(self, request: Request, index: int, block: BlockId) -> None:
        beyond = request.beyond
        assert beyond is not None
        target = request.block_of(index)
        self._placer.place(self._slots(block), self._slots(target), -beyond.epochs.epoch_tokens)

    def _place(
        self, request: Request, held: Mapping[int, BlockId], layers: _Ints, heads: _Ints, slots: _Ints, units: _Ints
    ) -> None:
        """Copy each unit of one KV head of one layer to its slot."""
        beyond = request.beyond
        assert beyond is not None
        epochs, size, unit = beyond.epochs, self._block_tokens, beyond.epochs.unit_tokens
        within, table = np.arange(unit), np.array(request.table)
        place_of = {number: epochs.place_of(number * unit) for number in np.unique(units).tolist()}
        blocks = np.array([held[number * unit // size] for number in units.tolist()])
        source = blocks * size + units * unit % size
        places = epochs.sink_tokens + slots * unit
        target = table[places // size] * size + places % size
        by = places - np.array([place_of[number] for number in units.tolist()])
        self._placer.place_each(
            np.repeat(layers, unit),
            np.repeat(heads, unit),
            (source[:, None] + within).ravel(),
            (target[:, None] + within).ravel(),
            np.repeat(by, unit),
        )

    def _slots(self, block: BlockId) -> _Ints:
        return block * self._block_tokens + np.arange(self._block_tokens)

    def _indices(self, span: Span) -> range:
        return range(span.start // self._block_tokens, span.end // self._block_tokens)


def _own(request: Request) -> tuple[int, int]:
    """The tokens of a request's epoch, which are all there."""
    assert request.beyond is not None
    epochs = request.beyond.epochs
    return epochs.start_of(request.epoch), epochs.end_of(request.epoch)
