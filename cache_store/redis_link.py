"""Reach the Redis that a URL names: redis-py connects, authenticates and knows the cluster; the socket is then ours.

Knows redis-py. Knows no blocks: it is asked which node serves a key, and for a `Wire` to a node.
"""

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from redis import ConnectionPool, Redis, RedisCluster
from redis import exceptions as theirs
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from cache_store.errors import InvalidRequest, StoreUnavailable
from cache_store.redis_errors import DeadlinePassed, ours, refused_url
from cache_store.redis_sentinel import is_sentinel_url, parse_sentinel_url
from cache_store.resp import Wire

_CLUSTER_SCHEMES = {"redis+cluster://": "redis://", "rediss+cluster://": "rediss://"}
_LOOPBACK_SEND_BYTES = 4 << 20
_SCHEMES = ("redis://", "rediss://", "unix://")


class RedisLink:
    """One server. A node is named "host:port"; this one's name is empty."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        try:
            # RESP2: a socket that answers what was asked and nothing else. No retries: the caller has a breaker.
            settings = {"protocol": 2, "retry": Retry(NoBackoff(), 0), **self._timeouts(timeout_s)}
            self._pool = self._make_pool(url, settings)
            self._new_connection({})  # not connected: only to see that all of the URL is understood
        except (TypeError, ValueError) as error:
            raise refused_url(error) from None  # the other may quote a password
        if url.startswith("unix://") and not self._pool.connection_kwargs.get("path"):
            raise InvalidRequest("redis_url", "unix:// needs the path of a socket")

    def route(self, keys: Sequence[bytes]) -> dict[str, list[int]]:
        """The nodes that serve `keys`, each with the indices of its own. Raises StoreUnavailable."""
        return {"": list(range(len(keys)))}

    def nodes(self) -> set[str]:
        """The nodes known now, without asking."""
        return {""}

    def refresh(self) -> None:
        """Learn again which node serves what. Raises StoreUnavailable."""

    def servers(self) -> list[Redis]:
        """A redis-py client for each node, to be asked about itself. Raises StoreUnavailable."""
        return [Redis(connection_pool=self._pool)]

    def client(self) -> Redis | RedisCluster:
        """A redis-py client that finds the node of a key. Raises StoreUnavailable."""
        return Redis(connection_pool=self._pool)

    def connect(self, node: str, *, deadline_s: float) -> Wire:
        """Raises StoreUnavailable; as StoreStalled or DeadlinePassed where time ran out."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlinePassed("no time left to connect")
        connection = self._new_connection({**self._address(node), **self._timeouts(min(self.timeout_s, left_s))})
        with ours(f"connect to {node or 'redis'}"):
            try:
                connection.connect()
            except theirs.TimeoutError as error:
                if left_s < self.timeout_s:
                    raise DeadlinePassed(f"no connection to {node or 'redis'} before the deadline") from error
                raise
        # redis-py has no public name for this. Its parser has read every reply of the handshake and holds nothing back.
        sock = connection._sock
        if sock.family is socket.AF_INET and sock.getpeername()[0].startswith("127."):
            # A fixed buffer sends a quarter more on loopback; elsewhere it would cap the window of a long way.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOOPBACK_SEND_BYTES)
        return Wire(sock, stall_s=self.timeout_s, disconnect=connection.disconnect)

    def close(self) -> None:
        self._pool.disconnect()

    def _make_pool(self, url: str, settings: dict[str, Any]) -> ConnectionPool:
        pool: ConnectionPool = ConnectionPool.from_url(url, **settings)
        return pool

    def _new_connection(self, changes: dict[str, Any]) -> Any:  # a redis.Connection; half of it is untyped
        return self._pool.connection_class(**{**self._pool.connection_kwargs, **changes})

    def _address(self, node: str) -> dict[str, Any]:
        return {}

    @staticmethod
    def _timeouts(timeout_s: float) -> dict[str, float]:
        return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}


class SentinelLink(RedisLink):
    """One server at a time, which the Sentinels name at each connect. After a failover they close the old one's."""

    def _make_pool(self, url: str, settings: dict[str, Any]) -> ConnectionPool:
        named = parse_sentinel_url(url)
        asking = named.to_sentinels | self._timeouts(self.timeout_s)
        self._sentinel = Sentinel(named.sentinels, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        return SentinelConnectionPool(named.service, self._sentinel, **settings, **named.to_servers)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        super().close()
        for asked in self._sentinel.sentinels:
            asked.close()


class ClusterLink(RedisLink):
    """A Redis Cluster, found through any one of its nodes."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self._url = url
        self._lock = threading.Lock()  # one discovery at a time
        self._cluster: RedisCluster | None = None

    def route(self, keys: Sequence[bytes]) -> dict[str, list[int]]:
        slots = self._topology().nodes_manager
        routes: dict[str, list[int]] = {}
        with ours("find the node of a key"):
            for index, key in enumerate(keys):
                routes.setdefault(slots.get_node_from_slot(key_slot(key)).name, []).append(index)
        return routes

    def nodes(self) -> set[str]:
        return set() if self._cluster is None else {node.name for node in _primaries(self._cluster)}

    def refresh(self) -> None:
        cluster = self._topology()
        with self._lock, ours("ask the cluster who serves what"):
            cluster.nodes_manager.initialize()

    def servers(self) -> list[Redis]:
        cluster = self._topology()
        return [cluster.get_redis_connection(node) for node in _primaries(cluster)]

    def client(self) -> RedisCluster:
        return self._topology()

    def close(self) -> None:
        super().close()
        if self._cluster is not None:
            self._cluster.close()

    def _topology(self) -> RedisCluster:
        with self._lock:
            if self._cluster is None:
                with ours("find the cluster"):
                    self._cluster = RedisCluster.from_url(
                        self._url, protocol=2, retry=Retry(NoBackoff(), 0), **self._timeouts(self.timeout_s)
                    )
            return self._cluster

    def _address(self, node: str) -> dict[str, Any]:
        host, _, port = node.rpartition(":")
        if not host:
            raise StoreUnavailable(f"no address in {node!r}")
        return {"host": host, "port": int(port)}


def _primaries(cluster: RedisCluster) -> list[ClusterNode]:
    primaries: list[ClusterNode] = cluster.nodes_manager.get_nodes_by_server_type("primary")
    return primaries


def link_to(url: str, *, timeout_s: float) -> RedisLink:
    """Nothing is connected yet. Raises InvalidRequest for a URL that cannot work."""
    for scheme, plain in _CLUSTER_SCHEMES.items():
        if url.startswith(scheme):
            return ClusterLink(plain + url.removeprefix(scheme), timeout_s=timeout_s)
    if is_sentinel_url(url):
        return SentinelLink(url, timeout_s=timeout_s)
    if not url.startswith(_SCHEMES):
        known = ", ".join((*_SCHEMES, *_CLUSTER_SCHEMES, "redis+sentinel://", "rediss+sentinel://", "memory://"))
        scheme = url.partition(":")[0]  # the rest may have a password, before the host or as an option
        raise InvalidRequest("redis_url", f"must start with one of {known}, got {scheme!r}")
    return RedisLink(url, timeout_s=timeout_s)
