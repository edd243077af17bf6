"""From a URL to the place that keeps session records."""

from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from cache_store.memory_records import MemoryRecords
from cache_store.record_format import SealedFormat
from cache_store.records import RecordStore
from cache_store.redis_errors import refused_url
from cache_store.redis_records import MOST_AT_ONCE, RedisRecords
from cache_store.redis_sentinel import is_sentinel_url, parse_sentinel_url
from cache_store.sealing import Keyring, Purpose

_MAX_CONNECTIONS = MOST_AT_ONCE + 8
"""To a server: some are asked by redis-py itself, who serves what. Beyond them a Cluster's client fails at once."""


def open_records(url: str, *, timeout_s: float = 2.0, keyring: Keyring | None = None) -> RecordStore:
    """Open the store that `url` names; nothing is connected yet. Raises InvalidRequest for a URL that can't be used.

    redis://, rediss:// and unix:// name one server, redis+cluster:// and rediss+cluster:// any node of a Redis
    Cluster; redis+sentinel:// and rediss+sentinel:// ask Sentinels for the server; memory:// (or nothing) keeps records
    in this process. With a `keyring`, what leaves it is sealed.
    """
    if url in ("", "memory://"):
        return MemoryRecords()
    record_format = None
    if keyring is not None:
        record_format = SealedFormat(keyring.sealer(Purpose.RECORDS), takes_plain=keyring.takes_plain)
    # One retry heals a connection that died while it lay idle; our scripts may be repeated.
    retry = Retry(ExponentialBackoff(cap=0.1, base=0.01), 1)
    sockets: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    scheme, separator, rest = url.partition("://")
    try:
        if scheme in ("redis+cluster", "rediss+cluster"):
            node = scheme.removesuffix("+cluster") + separator + rest
            cluster = RedisCluster.from_url(node, retry=retry, max_connections=_MAX_CONNECTIONS, **sockets)
            return RedisRecords(cluster, timeout_s=2 * timeout_s, record_format=record_format)
        if is_sentinel_url(url):
            named = parse_sentinel_url(url)
            sentinel = Sentinel(named.sentinels, sentinel_kwargs=named.to_sentinels | sockets)  # type: ignore[no-untyped-call]
            primary = sentinel.master_for(named.service, retry=retry, **sockets, **named.to_servers)
            return RedisRecords(primary, timeout_s=2 * timeout_s, asked=sentinel.sentinels, record_format=record_format)
        pool = BlockingConnectionPool.from_url(
            url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, retry=retry, **sockets
        )
    except ValueError as error:
        raise refused_url(error) from None  # the other may quote a password
    return RedisRecords(Redis.from_pool(pool), timeout_s=2 * timeout_s, record_format=record_format)
