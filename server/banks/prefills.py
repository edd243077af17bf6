"""What a bank asks of whoever computes KV of its entries ahead."""

from collections.abc import Sequence
from typing import Protocol

from cache_store.banks import BankRecord, Entry


class Prefills(Protocol):
    """A server.prefilling.Prefilling."""

    async def prefill(self, bank: BankRecord, entries: Sequence[Entry]) -> int:
        """Prefill entries of a bank that asks for it. How many of them were; it never fails."""
        ...

    async def forget(self, bank: BankRecord, entries: Sequence[Entry]) -> None:
        """Entries of a bank are deleted: so is their KV, as far as workers can be asked. It never fails."""
        ...
