"""A bank's values by the batch, written and read: many of them beside the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from cache_store.bank_format import BankFormat
from cache_store.banks import BankRecord, Entry, Kept, Vector

_Result = TypeVar("_Result")
_FEW: Final = 16
"""Values that are not worth a thread."""


class BankValues:
    """What reads raises RecordUnreadable."""

    def __init__(self, bank_format: BankFormat) -> None:
        self._format = bank_format

    async def written(self, bank: BankRecord, embedder: str, kept: Sequence[Kept]) -> list[str | bytes]:
        """Id, entry and vector of each, one behind the other."""

        def write() -> list[str | bytes]:
            values: list[str | bytes] = []
            for entry, vector in kept:
                values += (
                    entry.id,
                    self._format.entry(bank, entry),
                    self._format.vector(bank, embedder, entry.id, vector),
                )
            return values

        return await _worked(len(kept), write)

    async def written_vectors(
        self, bank: BankRecord, embedder: str, vectors: Mapping[str, Vector]
    ) -> list[str | bytes]:
        """Id and vector of each, one behind the other."""

        def write() -> list[str | bytes]:
            values: list[str | bytes] = []
            for entry_id, vector in vectors.items():
                values += entry_id, self._format.vector(bank, embedder, entry_id, vector)
            return values

        return await _worked(len(vectors), write)

    async def kept(self, bank: BankRecord, rows: Sequence[Sequence[bytes]]) -> list[Kept]:
        """Each row is id, entry, vector, who it lost to, recalls, and when the last was."""

        def read() -> list[Kept]:
            return [self._kept(bank, *row) for row in rows]

        return await _worked(len(rows), read)

    async def entries(
        self, bank: BankRecord, rows: Sequence[tuple[str, bytes, bytes, bytes, bytes]]
    ) -> list[Entry | None]:
        """As `kept`, without vectors; None for an entry that is empty."""

        def read() -> list[Entry | None]:
            return [self._entry(bank, *row) if row[1] else None for row in rows]

        return await _worked(len(rows), read)

    async def vectors(self, bank: BankRecord, pairs: Sequence[tuple[str, bytes]]) -> list[Vector | None]:
        """Of ids and values; None for one that is empty."""

        def read() -> list[Vector | None]:
            return [self._format.read_vector(bank, one, value) if value else None for one, value in pairs]

        return await _worked(len(pairs), read)

    def _kept(self, bank: BankRecord, entry_id: bytes, entry: bytes, vector: bytes, *state: bytes) -> Kept:
        name = entry_id.decode()
        return Kept(self._entry(bank, name, entry, *state), self._format.read_vector(bank, name, vector))

    def _entry(
        self, bank: BankRecord, entry_id: str, value: bytes, superseded_by: bytes, recalls: bytes, last_ms: bytes
    ) -> Entry:
        return self._format.read_entry(
            bank, entry_id, value, superseded_by=superseded_by, recalls=recalls, last_ms=last_ms
        )


async def _worked(num_values: int, work: Callable[[], _Result]) -> _Result:
    """What `work` returns."""
    return work() if num_values <= _FEW else await asyncio.to_thread(work)
