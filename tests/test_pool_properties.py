"""Whatever is asked of the pool, in whatever order: no block is lost, given twice, or found under a wrong name."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_store.ids import BlockHash
from worker.engine.pool import BlockPool
from worker.ids import BlockId

NUM_BLOCKS = 12
Name = tuple[int, ...]
"""What a chain of blocks holds; a block's name says what all before it hold too."""


def hashed(name: Name) -> BlockHash:
    return BlockHash(bytes(name).rjust(16, b"\0"))


class Requests(RuleBasedStateMachine):
    """Requests that find, take, fill and let go of chains, as the engine's do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[BlockId]] = []
        """The chain of each request."""
        self.wrote: dict[BlockId, Name] = {}
        """What was last written into a block."""
        self.names: list[list[Name]] = []
        """What each request's blocks hold: fewer than it has blocks, while it has not filled all of them."""

    @initialize()
    def start(self) -> None:
        self.pool.check()

    @rule(words=st.lists(st.integers(1, 3), min_size=1, max_size=5), room=st.integers(0, 6))
    def admit(self, words: list[int], room: int) -> None:
        """Find the longest prefix that is there, and take blocks for the rest: all or nothing."""
        wanted = [tuple(words[: end + 1]) for end in range(len(words))]
        found: list[BlockId] = []
        for name in wanted:
            block = self.pool.find(hashed(name))
            if block is None:
                self.pool.need(hashed(name))
                break
            assert self.wrote[block] == name, "found under a wrong name"
            found.append(block)
        self.pool.acquire(found)
        missing = len(wanted) - len(found)
        before = self.pool.available
        taken = self.pool.take(missing, after=found[-1] if found else None, room=room)
        assert (taken is None) == (missing > before)
        if taken is None:
            self.pool.release(found)
            return
        assert len(taken) == len(set(taken)) == missing
        assert not set(taken) & {block for chain in self.held for block in chain}, "taken from under another request"
        for block, name in zip(taken, wanted[len(found) :], strict=True):
            self.wrote[block] = name
        self.held.append(found + taken)
        self.names.append(wanted)
        for block, name in zip(taken, wanted[len(found) :], strict=True):
            self.pool.name(block, hashed(name))

    @precondition(lambda self: self.held)
    @rule(which=st.randoms(use_true_random=False))
    def grow(self, which: object) -> None:
        """A request decodes into one more block, which has no name yet."""
        number = which.randrange(len(self.held))  # type: ignore[attr-defined]
        taken = self.pool.take(1, after=self.held[number][-1])
        if taken is not None:
            self.held[number] += taken
            self.wrote.pop(taken[0], None)

    @precondition(lambda self: self.held)
    @rule(which=st.randoms(use_true_random=False))
    def end(self, which: object) -> None:
        number = which.randrange(len(self.held))  # type: ignore[attr-defined]
        self.names.pop(number)
        self.pool.release(self.held.pop(number))

    @precondition(lambda self: self.held)
    @rule(which=st.randoms(use_true_random=False))
    def mark(self, which: object) -> None:
        chain = which.choice(self.held)  # type: ignore[attr-defined]
        self.pool.mark_lossy(chain[-1])
        assert self.pool.is_lossy(chain[-1])

    @rule(words=st.lists(st.integers(1, 3), min_size=1, max_size=5))
    def drop(self, words: list[int]) -> None:
        """A conversation is deleted."""
        names = [hashed(tuple(words[: end + 1])) for end in range(len(words))]
        free = self.pool.stats().free
        dropped = self.pool.drop(names)
        assert self.pool.stats().free == free + dropped
        assert all(self.pool.find(name) is None for name in names)

    @invariant()
    def blocks_balance(self) -> None:
        self.pool.check()
        assert self.pool.stats().used == len({block for chain in self.held for block in chain})

    def teardown(self) -> None:
        for chain in self.held:
            self.pool.release(chain)
        assert self.pool.stats().used == 0
        self.pool.check()


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
