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
        self.again: Callable[[Request], None] = lambda request: None
        """Set by the scheduler: let go of a request's blocks and queue it, to begin at `first`."""
        self.decode: Callable[[Request], None] = lambda request: None
        """Set by the scheduler: all that was known of a request is computed."""
        self._tables = tables
        self._views = views

    @property
    def is_waiting(self) -> bool:
        return self._views.is_busy

    def advance(self, now_s: float) -> None:
        self._views.advance(now_s)

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
        if stage is None:  # epoch 0
            self._go_on(request, request.limit)
        elif stage.chooses:
            self._choose(request, lambda: self._chosen(request))
        else:
            self._go_on(request, stage.end)

    def _chosen(self, request: Request) -> None:
        stage = request.stage
        assert stage is not None
        if stage.is_asking and not request.has_asked:
            request.has_asked = True
            request.gaps = [Span(request.stage_start, stage.end)]
        else:
            self._go_on(request, stage.end)

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
        if not self._tables.grow_to(request, stage.end):
            self.again(request)
            return

        def compute() -> None:
            request.gaps = [Span(position, stage.end)]

        if stage.forgets:
            self._views.recall(request, self._views.latest(request), compute, partial(self._lost, request))
        else:
            compute()

    def _enter(self, request: Request, position: int, then: Callable[[], None]) -> None:
        """Go on to the epoch of `position`, if that is another one."""
        assert request.beyond is not None
        if request.beyond.epochs.epoch_of(position) == request.epoch:
            then()
        elif self._views.roll(request):
            self._views.know(request, then, partial(self._lost, request))
        else:
            self.again(request)

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
                self._views.recall(request, self._views.latest(request), ready, partial(self._lost, request))
            else:
                ready()

        def ready() -> None:
            request.phase = Phase.DECODE

        self._enter(request, position, enter)

    def after_token(self, request: Request) -> None:
        """A decoding request's token was run: it may have chosen."""
        stage = request.stage
        if stage is None or not stage.chooses or len(request.tokens) != stage.end:
            return
        request.phase = Phase.RECALLING

        def ready() -> None:
            request.phase = Phase.DECODE

        self._choose(request, ready)

    def _choose(self, request: Request, then: Callable[[], None]) -> None:
        assert request.beyond is not None
        assert request.stage is not None
        assert request.recollection is not None
        if request.stage.is_asking and request.has_asked:  # it was run with what it has chosen
            then()
            return
        choice = request.recollection.choose(request.beyond.epochs.num_slots, last_alone=not request.stage.is_asking)
        self._views.recall(request, choice, then, partial(self._lost, request))

    def hears(self, request: Request, span: Span) -> Callable[[int, object], None] | None:
        """Who is told the queries of this part of a request, if anybody."""
        stage = request.stage
        if stage is None or not stage.chooses or request.beyond is None or span.start < request.stage_start:
            return None
        if stage.is_asking and not request.has_asked:
            return self._views.hear(request, span.start)
        if not stage.is_asking and span.end == stage.end:
            return self._views.hear(request, span.start)
        return None

    def _lost(self, request: Request, position: int | None) -> None:
        if position is not None:
            request.lost_at.append(position)
        self.again(request)
