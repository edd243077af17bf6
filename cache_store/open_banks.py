"""From a URL to the place that keeps banks."""

from cache_store.banks import BankStore
from cache_store.errors import InvalidRequest
from cache_store.memory_banks import MemoryBanks
from cache_store.sealing import Keyring


def open_banks(url: str, *, timeout_s: float = 2.0, keyring: Keyring | None = None) -> BankStore:
    """As `open_records`: memory:// (or nothing) keeps banks in this process. Raises InvalidRequest for another URL."""
    if url in ("", "memory://"):
        return MemoryBanks()
    raise InvalidRequest("redis_url", "banks are kept in memory:// alone")
