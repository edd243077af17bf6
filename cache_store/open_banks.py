"""From a URL to the place that keeps banks."""

from cache_store.bank_format import BankFormat, PlainEnvelope, SealedEnvelope
from cache_store.bank_store import BankStore
from cache_store.memory_banks import MemoryBanks
from cache_store.redis_banks import RedisBanks
from cache_store.redis_client import open_client
from cache_store.sealing import Keyring


def open_banks(
    url: str, *, timeout_s: float = 2.0, keyring: Keyring | None = None, vector_sets: bool = False
) -> BankStore:
    """Open the store that `url` names; nothing is connected yet. Raises InvalidRequest for a URL that can't be used.

    What it may be, `redis_client` says; memory:// (or nothing) keeps banks in this process. With a `keyring`, what
    leaves it is sealed; without, and with `vector_sets`, new banks have one where the server is a Redis 8.
    """
    if url in ("", "memory://"):
        return MemoryBanks()
    bank_format = BankFormat(PlainEnvelope() if keyring is None else SealedEnvelope(keyring))
    return RedisBanks(
        open_client(url, timeout_s=timeout_s),
        timeout_s=2 * timeout_s,
        bank_format=bank_format,
        vector_sets=vector_sets and keyring is None,
    )
