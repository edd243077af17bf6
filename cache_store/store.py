"""What a worker asks of the shared cold tier. No Redis here, and no tensors: names, buffers and outcomes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from cache_store.codecs import EXACT, RAW, CodecInfo
from cache_store.ids import BlockHash, TenantMark


class Fetched(Enum):
    """How the fetch of one block ended. All but HIT are misses: what is needed of them is computed."""

    HIT = auto()
    ABSENT = auto()
    CORRUPT = auto()
    FOREIGN = auto()
    LATE = auto()
    UNAVAILABLE = auto()
    SKIPPED = auto()
    """Nobody wanted it any more when its turn came: it was not asked for."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One block wanted, and what is known of it: anything else under its name is a miss."""

    block: BlockHash
    num_tokens: int
    into: memoryview
    """layout.block_bytes, of which the payload fills the front."""
    first_position: int = 0
    """Index in the conversation of the block's first token."""
    fidelity: str = EXACT
    """Part of the name: what the payload may have lost, and so which codecs are believed."""
    tenant: str = ""
    """Part of the name: under whose key the payload is sealed, where payloads are."""
    wanted: Callable[[], bool] | None = None
    """Asked right before the block is asked for, on any of the store's threads: where it says no, nothing is sent."""


class Encoding(NamedTuple):
    """How a payload is to be read."""

    codec: CodecInfo
    num_bytes: int
    checksum: int | None = None
    """The payload's xxh3_64, where somebody has computed it already: it is kept with the payload from then on."""


@dataclass(frozen=True, slots=True)
class Store:
    """One block to keep."""

    block: BlockHash
    num_tokens: int
    payload: memoryview
    """What `codec` wrote, at most layout.block_bytes. Read until `put` returns, and never changed meanwhile."""
    ttl_s: int
    """Seconds; 0 keeps it for ever."""
    codec: CodecInfo = RAW
    first_position: int = 0
    fidelity: str = EXACT
    checksum: int | None = None
    """The payload's xxh3_64; None has it computed."""
    tenant: str = ""
    """Under whose key the payload is sealed, where payloads are."""


Landed = Callable[[int, Fetched, Encoding | None], None]
"""Told the index of a fetch, how it ended, and how to read what lies in its buffer (None unless it is a HIT)."""


class Idle(NamedTuple):
    """A ladder session's block that nobody has read for a while."""

    block: BlockHash
    idle_s: float
    """Seconds when it was looked at, `at_s` of `time.monotonic()`."""
    at_s: float


class Held(NamedTuple):
    """What the shared tier holds of a ladder session's block, checked."""

    block: BlockHash
    codec: CodecInfo
    num_tokens: int
    first_position: int
    payload: memoryview


class Payload(NamedTuple):
    """A block's bytes as a codec wrote them."""

    codec: CodecInfo
    content: memoryview


class Exchanged(NamedTuple):
    """What was in a block's place, and what is now."""

    held: Held
    now: Payload


class StoreStats(NamedTuple):
    """Counters since the store was opened."""

    blocks_put: int
    bytes_put: int
    put_s: float
    blocks_got: int
    bytes_got: int
    get_s: float
    corrupt: int
    foreign: int


class ServerInfo(NamedTuple):
    """What the shared tier says of itself (summed over a cluster's nodes)."""

    used_bytes: int
    max_bytes: int
    evicted_keys: int
    eviction_policy: str


class AgeingStore(Protocol):
    """Where ladder sessions' blocks lie while they age. Blocking calls; all raise StoreError.

    No call hangs: each is bounded by the store's own timeouts.
    """

    def lead(self, *, for_s: float) -> bool:
        """Become, or stay, the one worker that ages this model's blocks for the next `for_s` seconds."""
        ...

    def resign(self) -> None:
        """Let another worker lead now. Nothing happens where another one does."""
        ...

    def idle(self) -> Iterator[Sequence[Idle]]:
        """Every ladder session's block once at least, those that stay there all the time, a few hundred at once.

        Leaves them as idle as they are.
        """
        ...

    def exchange(self, idle: Idle, smaller: Callable[[Held], Payload]) -> Exchanged | None:
        """Put in a block's place what `smaller` makes of it, which may be what it is; TTL and idle time stay.

        None where the block is gone, or was read or put again since it was looked at: it is then left alone. Raises
        BlockCorrupt or BlockForeign, besides, where it can't be read here, by us or by `smaller`: it stays as it is.
        """
        ...


DELETIONS_KNOWN_S = 172_800
"""So long a store knows what was deleted. What a machine keeps untouched for longer may have been, and is not used."""


class BlockStore(Protocol):
    """Blocks by hash, in batches; blocking calls, made from the worker's I/O threads, several at once.

    No call hangs: each is bounded by `deadline_s` (of `time.monotonic()`) or by the store's own timeouts.
    """

    def get(self, wanted: Sequence[Fetch], landed: Landed, *, deadline_s: float) -> None:
        """Fetch every block, calling `landed` exactly once for each, as soon as its payload lies checked in its
        buffer (on the calling thread or one of the store's). The store is then done with it.

        Never raises for a miss or for the server's failures: those are outcomes. Hits' TTLs are refreshed behind.
        """
        ...

    def put(self, blocks: Sequence[Store]) -> None:
        """Keep every block. Raises StoreUnavailable or StoreFull: some may then be kept, none is promised."""
        ...

    def which(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """Say which blocks are there now (raises StoreUnavailable)."""
        ...

    def delete(self, blocks: Sequence[BlockHash]) -> int:
        """Forget the blocks; say how many were there (raises StoreUnavailable). `deleted` knows all of them for
        `DELETIONS_KNOWN_S`, but those that a full store has no room to note."""
        ...

    def deleted(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """Say which blocks were deleted or erased, also where they were put again since (raises StoreUnavailable)."""
        ...

    def erase(self, tenant: TenantMark) -> int:
        """Forget a tenant's blocks, of every model and fidelity; say how many were there (raises StoreUnavailable:
        then some may be left). What is put meanwhile may be. `deleted` says of all of them that they were."""
        ...

    def retain(self, blocks: Sequence[BlockHash], *, ttl_s: int) -> int:
        """Set how long the blocks are kept (0: for ever); say how many were there (raises StoreUnavailable)."""
        ...

    def ageing(self) -> AgeingStore | None:
        """The same blocks by their age; None where they don't outlive the worker."""
        ...

    def available(self) -> bool:
        """False while the breaker is open. Costs nothing."""
        ...

    def info(self) -> ServerInfo:
        """Ask the server (raises StoreUnavailable)."""
        ...

    def stats(self) -> StoreStats: ...

    def close(self) -> None: ...
