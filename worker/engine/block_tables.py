"""The blocks that requests hold: found or taken for what they run on, named when they are full, offloaded, let go.

It knows nothing of turns: who runs, waits or gives way is decided by the scheduler. Used by the engine's thread alone.
What other threads finish comes back through `post`.
"""

import time
from collections.abc import Callable, Collection, Sequence

from cache_store.ids import BlockHash
from worker.calls import MissReason
from worker.engine.plan import Span, complement
from worker.engine.pool import BlockPool
from worker.engine.prefix import Wanted, tail_of, wanted_by_prompt
from worker.engine.request import Request
from worker.engine.restoring import Asked, Lookup, Restoring
from worker.ids import BlockId
from worker.tiers.landing import Restore
from worker.tiers.moves import Content, Tier, content_of
from worker.tiers.prefetch import Prefetcher
from worker.tiers.restore import Restorer
from worker.tiers.write_behind import Offload, WriteBehind


class BlockTables:
    def __init__(
        self,
        pool: BlockPool,
        write_behind: WriteBehind,
        restorer: Restorer,
        prefetcher: Prefetcher | None,
        *,
        block_tokens: int,
        restore_timeout_s: float,
        copy_tokens: Callable[[BlockId, BlockId, int], None],
        make_room: Callable[[], bool],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """`copy_tokens` copies a block's first tokens into another; `make_room` frees blocks, or says that it can't."""
        self.distrusted: set[BlockHash] = set()
        """Contents that were found wrong and are on their way out of every tier: not restored, not offloaded."""
        self._pool = pool
        self._write_behind = write_behind
        self._restorer = restorer
        self._prefetcher = prefetcher
        self._block_tokens = block_tokens
        self._restore_timeout_s = restore_timeout_s
        self._copy_tokens = copy_tokens
        self._make_room = make_room
        self._post = post

    # In

    def prefetch(self, request: Request) -> bool:
        """Have brought to the host tier, while a request waits, what only the store has. False: ask again later."""
        if self._prefetcher is None:
            return True
        if self._prefetcher.room <= 0:  # asked at each step while it is so: before blocks are named and looked for
            return False
        missing = [
            self._content(request, want)
            for want in self._wanted(request)
            if self._pool.find(want.name) is None
            and want.name not in self.distrusted
            and self._restorer.where(want.name) is Tier.REDIS
        ]
        return self._prefetcher.fetch(missing, lambda: request.is_waiting)

    def expected_gaps(self, request: Request) -> list[Span]:
        """What of a request is computed even if Redis has its history.

        Of a reply that was begun elsewhere, nothing of what was there.
        """
        if request.epoch:
            return [Span(request.first, request.num_target)]
        size = self._block_tokens
        num_history = request.num_target if request.call.begun else len(request.call.history)
        held = [
            Span(want.index * size, want.index * size + want.offers)
            for want in self._wanted(request)
            if want.index * size + want.offers <= num_history
            or self._pool.find(want.name) is not None
            or self._restorer.where(want.name) in (Tier.HOST, Tier.DISK)
        ]
        return complement(held, request.num_target)

    def open(self, request: Request) -> Lookup | None:
        """Give a request all blocks for its tokens up to `num_target`, those that the device has among them.

        None where there are too few: then it holds none.
        """
        size = self._block_tokens
        wanted = self._wanted(request)
        on_device = {want.index: block for want in wanted if (block := self._pool.find(want.name)) is not None}
        self._pool.acquire(on_device.values())
        shared = {
            want.index: on_device[want.index] for want in wanted if want.offers == size and want.index in on_device
        }
        fresh = self._take(
            request.num_blocks - len(shared),
            after=next(reversed(shared.values()), None),
            room=request.num_blocks_at_most - len(shared),
        )
        if fresh is None:
            self._pool.release(list(on_device.values()))
            return None
        rest = iter(fresh)
        indices = [request.place_of(index * size) // size for index in shared]
        shared_at = dict(zip(indices, shared.values(), strict=True))
        request.table = [shared_at[at] if at in shared_at else next(rest) for at in range(request.num_blocks)]
        request.relies_on = frozenset(want.name for want in wanted)
        for want in wanted:
            if want.content_tokens < size:
                self._write_behind.outgrown(want.name)
            if want.index not in on_device:
                self._pool.need(want.name)
            elif want.index not in shared:
                self._copy_on_write(on_device[want.index], request.block_of(want.index), want.offers)
        return Lookup(wanted, dict.fromkeys(on_device, Tier.DEVICE))

    def _wanted(self, request: Request) -> list[Wanted]:
        size = self._block_tokens
        if request.epoch:
            return self._wanted_beyond(request)
        end = min(request.num_target, request.limit + 1)  # behind the window's end the last token is not the turn's
        full = end // size
        if full:
            request.name_of(full - 1)
        tokens = request.tokens[:end]
        # Once a prompt was computed, here or where its reply was begun, the block that the history's last one became
        # is full: that one is worth more.
        num_history = len(request.call.history)
        if request.num_generated or num_history > end:
            num_history = 0
        return wanted_by_prompt(request.root, request.names[:full], tokens, num_history, size, request.salts)

    def _wanted_beyond(self, request: Request) -> list[Wanted]:
        """The sinks, and of the request's epoch what is not computed anew."""
        size, beyond = self._block_tokens, request.beyond
        assert beyond is not None
        full = request.first // size
        if full:
            request.name_of(full - 1)
        own = beyond.epochs.start_of(request.epoch) // size
        indices = (*range(request.num_sinks), *range(own, full))
        wanted = [Wanted(index, request.names[index], size, size) for index in indices]
        tail = tail_of(request.root, request.names, request.tokens, request.first, size, beyond)
        return [*wanted, tail] if tail is not None else wanted

    def _content(self, request: Request, want: Wanted) -> Content:
        return content_of(want, self._block_tokens, request.call.codec, request.call.tenant, request.beyond)

    def _copy_on_write(self, source: BlockId, target: BlockId, num_tokens: int) -> None:
        """Copy what was found into a request's own block, as it goes on writing behind these tokens."""
        self._copy_tokens(source, target, num_tokens)
        if self._pool.is_lossy(source):
            self._pool.mark_lossy(target)
        self._pool.release([source])

    def ask(self, request: Request, lookup: Lookup, settled: Callable[[], None]) -> Restoring:
        """What a request's blocks that the device has not may come from. `settled` is called, once nobody writes any
        of them any more, unless the engine itself settles the last one."""
        missing = [want for want in lookup.wanted if want.index not in lookup.found]
        lookup.found.update({want.index: MissReason.ABSENT for want in missing})
        num_history = len(request.call.history)
        asked = [
            Asked(want, tier, tier is not Tier.REDIS or want.index * self._block_tokens + want.offers <= num_history)
            for want in missing
            if want.name not in self.distrusted and (tier := self._restorer.where(want.name)) is not None
        ]
        deadline_s = time.monotonic() + self._restore_timeout_s
        if request.call.deadline_s is not None:
            deadline_s = min(deadline_s, request.call.deadline_s)
        return Restoring(
            lookup,
            asked,
            block_tokens=self._block_tokens,
            num_target=request.limit,
            deadline_s=deadline_s,
            settled=lambda: self._post(settled),
        )

    def restore(self, request: Request, restoring: Restoring) -> None:
        """Ask the tiers below for what the engine has not taken yet."""
        if restoring.asked:
            blocks = [
                Restore(self._content(request, want), request.block_of(want.index))
                for want in (block.want for block in restoring.asked)
            ]
            self._restorer.restore(blocks, restoring.claims, deadline_s=restoring.deadline_s)

    def publish_restored(self, request: Request, lookup: Lookup) -> None:
        """Make findable on the device what came from below."""
        for index, encoding in lookup.restored.items():
            if encoding.codec.lossy:
                self._pool.mark_lossy(request.block_of(index))
        for want in lookup.wanted:
            if want.index in lookup.restored:
                request.restored.add(want.name)
                if want.offers == self._block_tokens:
                    self._pool.name(request.block_of(want.index), want.name)

    # On

    def grow(self, request: Request) -> bool:
        """Give a request the blocks for its tokens so far. False where there are too few."""
        return self.grow_to(request, len(request.tokens))

    def grow_to(self, request: Request, end: int) -> bool:
        """Give a request the blocks for tokens up to `end`."""
        missing = -(-(end - request.shift) // self._block_tokens) - len(request.table)
        if missing <= 0:
            return True
        fresh = self._take(missing, after=request.table[-1])
        if fresh is None:
            return False
        request.table += fresh
        return True

    def take(self, count: int) -> list[BlockId] | None:
        """Blocks to copy into, or to read from once. None where there are too few."""
        return self._take(count, after=None)

    def let_go(self, blocks: Sequence[BlockId]) -> None:
        """Of a request's first blocks, or of others that were taken; given first to last."""
        self._pool.release(blocks)

    def _take(self, count: int, *, after: BlockId | None, room: int = 0) -> list[BlockId] | None:
        """As the pool's, making room where it has too few."""
        fresh = self._pool.take(count, after=after, room=room)
        if fresh is None and self._make_room():
            fresh = self._pool.take(count, after=after, room=room)
        return fresh

    def seal(self, request: Request, index: int) -> None:
        """A request's block is full: others may find it, and it goes down the tiers."""
        name = request.name_of(index)
        if self._pool.name(request.block_of(index), name) and name not in self.distrusted:
            self._offload(request, index, name, self._block_tokens, to_store=True)

    def keep_tail(self, request: Request, num_kv: int) -> None:
        """Make the unfull last block findable by the next turn, on the device and in the host tier."""
        size = self._block_tokens
        full = num_kv // size
        if full:
            request.name_of(full - 1)
        tail = tail_of(request.root, request.names, request.tokens, num_kv, size, request.salts)
        if tail is None or tail.name in self.distrusted or self._pool.find(tail.name) is not None:
            return
        block = request.block_of(tail.index)
        if not self._pool.is_named(block):  # it is when tokens behind a stop string filled it
            self._pool.name(block, tail.name)
        self._offload(request, tail.index, tail.name, tail.content_tokens, to_store=False)

    def _offload(self, request: Request, index: int, name: BlockHash, num_tokens: int, *, to_store: bool) -> None:
        block = request.block_of(index)
        if request.call.device_only or self._pool.is_lossy(block):  # what is lossy would be encoded twice
            return
        self._pool.acquire([block])
        release = [block]
        self._write_behind.offload(
            Offload(
                block=block,
                content=Content(
                    name,
                    num_tokens,
                    request.place_of(index * self._block_tokens),
                    request.call.codec,
                    request.call.tenant,
                ),
                ttl_s=request.call.block_ttl_s,
                to_store=to_store,
                done=lambda: self._post(lambda: self._pool.release(release)),
            )
        )

    # Out

    def close(self, request: Request) -> None:
        """Let go of a request's blocks. What is named stays cached as long as there is room."""
        self._pool.release(request.table)
        request.table = []
        request.stop_gathering()

    def distrust(self, names: Collection[BlockHash]) -> None:
        """Forget contents on the device. Nothing restores or offloads them until `trust`."""
        self.distrusted.update(names)
        self._pool.drop(names)
        if self._prefetcher is not None:
            self._prefetcher.disown()

    def trust(self, names: Collection[BlockHash]) -> None:
        """No tier has the wrong contents any more."""
        self.distrusted.difference_update(names)

    def forget_restored(self, request: Request) -> None:
        """Drop from this machine what was distrusted while it was on its way there."""
        self._write_behind.forget(request.relies_on)
