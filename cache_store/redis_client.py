"""From a URL to a client of Redis for records and banks, and how it is asked: in time, and in our own errors."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from cache_store.errors import StoreUnavailable
from cache_store.redis_errors import ours, refused_url
from cache_store.redis_sentinel import is_sentinel_url, parse_sentinel_url

MOST_AT_ONCE: Final = 64
"""Calls that are made at the same time; more wait, as long as they may. Each takes a connection."""
_MAX_CONNECTIONS: Final = MOST_AT_ONCE + 8
"""To a server: some are asked by redis-py itself, who serves what. Beyond them a Cluster's client fails at once."""


class Client(NamedTuple):
    redis: "Redis | RedisCluster"
    asked: Sequence[Redis] = ()
    """Clients of the Sentinels that `redis` is found through, to be closed with it."""


def open_client(url: str, *, timeout_s: float) -> Client:
    """Nothing is connected yet. Raises InvalidRequest for a URL that can't be used.

    redis://, rediss:// and unix:// name one server, redis+cluster:// and rediss+cluster:// any node of a Redis
    Cluster; redis+sentinel:// and rediss+sentinel:// ask Sentinels for the server.
    """
    # One retry heals a connection that died while it lay idle; our scripts may be repeated.
    retry = Retry(ExponentialBackoff(cap=0.1, base=0.01), 1)
    sockets: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    scheme, separator, rest = url.partition("://")
    try:
        if scheme in ("redis+cluster", "rediss+cluster"):
            node = scheme.removesuffix("+cluster") + separator + rest
            return Client(RedisCluster.from_url(node, retry=retry, max_connections=_MAX_CONNECTIONS, **sockets))
        if is_sentinel_url(url):
            named = parse_sentinel_url(url)
            sentinel = Sentinel(named.sentinels, sentinel_kwargs=named.to_sentinels | sockets)  # type: ignore[no-untyped-call]
            primary = sentinel.master_for(named.service, retry=retry, **sockets, **named.to_servers)
            return Client(primary, sentinel.sentinels)
        pool = BlockingConnectionPool.from_url(
            url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, retry=retry, **sockets
        )
    except ValueError as error:
        raise refused_url(error) from None  # the other may quote a password
    return Client(Redis.from_pool(pool))


class Asking:
    """`async with asking("do this"):` around what is asked of Redis."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(MOST_AT_ONCE)

    @asynccontextmanager
    async def __call__(self, doing: str) -> AsyncGenerator[None, None]:
        """Ends in time, with StoreUnavailable if need be, and raises our errors for redis-py's."""
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        try:
            async with asyncio.timeout(self._timeout_s), self._places:
                with ours(doing):
                    yield
        except TimeoutError as error:
            raise StoreUnavailable(f"{doing}: no answer within {self._timeout_s} s") from error
        finally:
            if task.cancelling() > cancelled_before:  # redis-py was seen to swallow it
                raise asyncio.CancelledError
