"""The way of requests beyond their window: from epoch to epoch, and from one choice of what is recalled to the next.

Says what is to be computed next, and waits for what that needs. Whatever turns out to be lost is computed again from
where its turn began: `again` starts the request anew there. Used by the engine's thread alone.
"""

from collections.abc import Callable, Mapping
from functools import partial

from worker.engine.block_tables import BlockTables
from worker.engine.plan import Span
from worker.engine.request import Phase, Request
from worker.engine.stages import Stage, next_stage
from worker.engine.views import Views
from worker.tiers.moves import Tier

_ENDLESS = 1 << 62


class Passages:
    def __init__(self, tables: BlockTables, views: Views) -> None:
        self.again: Callable[[Request, bool], None] = lambda request, needs_room: None
        """Set by the scheduler: let go of a request's blocks and queue it, to begin where it is to: at once, or when
        there is more room."""
        self.decode: Callable[[Request], None] = lambda request: None
        """Set by the scheduler: all that was known of a request is computed."""
        self._tables = tables
        self._views = views

    def fill(self, request: Request, ready: Callable[[Mapping[int, Tier], int], None]) -> None:
        """Bring what a request that begins beyond the window attends to."""
        self._views.fill(request, ready, partial(self._lost, request))

    def begin(self, request: Request) -> None:
        """What there was of a request's epoch is there: compute what is not, and go on from `first`."""
        assert request.beyond is not None
        if not request.epoch:  # it is all there, and the turn's end is in another one
            self._go_on(request, request.limit)
            return
        own = [hole for hole in request.holes if hole.start >= request.beyond.epochs.sink_tokens]
        if own and request.beyond.chooses:  # what it had seen is to be chosen again
            self._lost(request, own[0].start)
        elif request.holes:
            request.stage, request.stage_start = Stage(request.first), request.first
            request.gaps = request.holes
        else:
            self._open(request, request.first)

    def computed(self, request: Request) -> None:
        """A prompt's gaps are computed: go on behind them."""
        stage = request.stage
        if stage is None or not stage.hears:
            self._go_on(request, request.limit if stage is None else stage.end)
            return
        assert request.recollection is not None
        choice = request.recollection.choose()
        self._views.recall(request, choice, lambda: self._go_on(request, stage.end), partial(self._lost, request))

    def asks(self, request: Request, span: Span) -> bool:
        """A part of a request was run. Does it ask for something that was not there? Then nothing has come of it: it is
        to be run again."""
        stage, recollection = request.stage, request.recollection
        if stage is None or not stage.asks or request.has_asked or span.end != stage.end:
            return False
        assert recollection is not None
        assert request.recalled is not None
        request.asked = recollection.amend(request.recalled) if stage.is_reply else recollection.choose()
        return request.asked is not None

    def run_again(self, request: Request) -> None:
        """What a request has asked for is recalled; then it is run again from its stage's beginning."""
        stage, choice = request.stage, request.asked
        assert stage is not None
        assert choice is not None
        request.has_asked, request.asked, request.gaps = True, None, []
        decodes = request.phase is Phase.DECODE
        if decodes:
            request.phase = Phase.RECALLING

        def ready() -> None:
            if decodes:
                request.phase = Phase.DECODE
            else:
                request.gaps = [Span(request.stage_start, stage.end)]

        self._views.recall(request, choice, ready, partial(self._lost, request))

    def _go_on(self, request: Request, position: int) -> None:
        if position == request.num_target:
            request.stage = None
            self.decode(request)
            return
        self._enter(request, position, lambda: self._open(request, position))

    def _open(self, request: Request, position: int) -> None:
        """Begin the stage at `position`, with all that it needs."""
        assert request.beyond is not None
        request.stage_start, request.has_asked = position, False
        request.stage = stage = next_stage(request.beyond, position, request.num_target)

        def compute() -> None:
            request.gaps = [Span(position, stage.end)]

        if stage.forgets:
            self._forget(request, compute)
        else:
            compute()

    def _enter(self, request: Request, position: int, then: Callable[[], None]) -> None:
        """Go on to the epoch of `position`, if that is another one."""
        assert request.beyond is not None
        if request.beyond.epochs.epoch_of(position) == request.epoch:
            then()
        elif self._views.roll(request) and self._tables.grow_to(request, request.end_at_most):
            self._views.know(request, then, partial(self._lost, request))
        else:
            self.again(request, True)

    def before_token(self, request: Request) -> None:
        """A decoding request's last token is to be run: it may be the first of an epoch or of a stage."""
        beyond, position = request.beyond, len(request.tokens) - 1
        assert beyond is not None
        if position < beyond.epochs.reach or (request.stage is not None and position < request.stage.end):
            return
        request.phase = Phase.RECALLING

        def enter() -> None:
            request.stage_start, request.has_asked = position, False
            request.stage = stage = next_stage(beyond, position, _ENDLESS)
            if stage.forgets:
                self._forget(request, ready)
            else:
                ready()

        def ready() -> None:
            request.phase = Phase.DECODE

        self._enter(request, position, enter)

    def _forget(self, request: Request, then: Callable[[], None]) -> None:
        assert request.recollection is not None
        self._views.recall(request, request.recollection.latest(), then, partial(self._lost, request))

    def hears(self, request: Request, span: Span) -> Callable[[int, object], None] | None:
        """Who is told the queries of this part of a request, if anybody."""
        stage = request.stage
        if stage is None or span.start < request.stage_start:
            return None
        if stage.hears:
            assert request.beyond is not None
            first = max(span.start, stage.end - request.beyond.epochs.asking_tokens)
            return self._views.hear(request, first, first - span.start) if first < span.end else None
        return self._views.hear(request, span.start) if stage.asks and not request.has_asked else None

    def _lost(self, request: Request, position: int | None) -> None:
        if position is not None:
            request.lost_at.append(position)
        self.again(request, position is None)
