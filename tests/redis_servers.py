"""Fixtures that start real Redis servers: a shared one, a private one to break, a cluster of three, one behind TLS."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
import redis

from cache_store.embedded_redis import RedisServer

_SLOTS = 16_384


class RedisCluster:
    """Three nodes that share the slots."""

    def __init__(self, nodes: Sequence[RedisServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        return self.nodes[0].url.replace("redis://", "redis+cluster://", 1)

    def join(self) -> None:
        """Give each node its share of the slots, and wait until all agree."""
        share = -(-_SLOTS // len(self.nodes))
        for number, node in enumerate(self.nodes):
            with redis.Redis.from_url(node.url) as client:
                mine = range(number * share, min((number + 1) * share, _SLOTS))
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER ADDSLOTS", *mine)
                client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
        give_up = time.monotonic() + 20
        while not all(_agrees(node, len(self.nodes)) for node in self.nodes):
            assert time.monotonic() < give_up, "the cluster did not form"
            time.sleep(0.05)

    def flush(self) -> None:
        for node in self.nodes:
            flush(node)


def flush(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests that leave it as it was. Its data is nobody's: see `redis_url`."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The shared server, emptied."""
    flush(redis_server)
    return redis_server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A private server, to be killed, paused and restarted at will."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def _three_nodes() -> Iterator[RedisCluster]:
    with ExitStack() as stack:
        cluster = RedisCluster([stack.enter_context(RedisServer(cluster=True)) for _ in range(3)])
        cluster.join()
        yield cluster


@pytest.fixture
def redis_cluster(_three_nodes: RedisCluster) -> RedisCluster:
    """A Redis Cluster of three nodes, emptied."""
    _three_nodes.flush()
    return _three_nodes


def _agrees(node: RedisServer, num_nodes: int) -> bool:
    with redis.Redis.from_url(node.url) as client:
        info = client.execute_command("CLUSTER INFO")
    state: dict[str, str] = (
        info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.decode().split())
    )
    return state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(num_nodes)
