"""Forget, of what earlier workers left on this machine, what was deleted while nobody held it.

The store knows what was deleted, and is asked for all blocks that were found at the start: before any turn, and once
more when every front end must know of this worker, which has then been told itself of what was deleted since. What is
deleted and computed anew in between is forgotten too, and that is only a miss.
"""

import threading
from collections.abc import Callable, Sequence

import structlog

from cache_store.errors import StoreError
from cache_store.ids import BlockHash
from cache_store.store import BlockStore

log = structlog.get_logger(__name__)

_AGAIN_S = 60.0
_RETRY_S = 5.0
"""Where the store does not answer."""


class Adopted:
    """Runs until both looks were answered, or `close`."""

    def __init__(
        self, blocks: Sequence[BlockHash], store: BlockStore, forget: Callable[[Sequence[BlockHash]], int]
    ) -> None:
        """Looks at once, on the calling thread: as long as the store's timeouts let it. `forget` is called on any."""
        self._blocks = blocks
        self._store = store
        self._forget = forget
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._look(),), name="adopted", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self, has_looked: bool) -> None:
        if not has_looked and not self._look_until_answered(_RETRY_S):
            return
        self._look_until_answered(_AGAIN_S)

    def _look_until_answered(self, wait_s: float) -> bool:
        """False where it was closed before."""
        while not self._closing.wait(wait_s):
            if self._look():
                return True
            wait_s = _RETRY_S
        return False

    def _look(self) -> bool:
        """False where the store did not answer."""
        try:
            deleted = self._store.deleted(self._blocks)
        except StoreError as error:
            log.warning("whether found blocks were deleted is not known yet", error=str(error))
            return False
        gone = [block for block, is_deleted in zip(self._blocks, deleted, strict=True) if is_deleted]
        if self._forget(gone):
            log.info("found blocks were deleted meanwhile", blocks=len(gone))
        return True
