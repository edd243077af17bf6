"""From a URL to the place that keeps session records."""

from cache_store.memory_records import MemoryRecords
from cache_store.record_format import SealedFormat
from cache_store.records import RecordStore
from cache_store.redis_client import open_client
from cache_store.redis_records import RedisRecords
from cache_store.sealing import Keyring, Purpose


def open_records(url: str, *, timeout_s: float = 2.0, keyring: Keyring | None = None) -> RecordStore:
    """Open the store that `url` names; nothing is connected yet. Raises InvalidRequest for a URL that can't be used.

    What it may be, `redis_client` says; memory:// (or nothing) keeps records in this process. With a `keyring`, what
    leaves it is sealed.
    """
    if url in ("", "memory://"):
        return MemoryRecords()
    record_format = None
    if keyring is not None:
        record_format = SealedFormat(keyring.sealer(Purpose.RECORDS), takes_plain=keyring.takes_plain)
    client = open_client(url, timeout_s=timeout_s)
    return RedisRecords(client.redis, timeout_s=2 * timeout_s, asked=client.asked, record_format=record_format)
