"""Fixtures that start real Redis servers: a shared one, a private one to break, a cluster of three, a pair under a
Sentinel, one behind TLS."""

import socket
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from cache_store.embedded_redis import RedisServer, redis_server_binary
from tests.tls_front import TlsFront

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
                command(client, "CLUSTER SET-CONFIG-EPOCH", number + 1)
                command(client, "CLUSTER ADDSLOTS", *mine)
                command(client, "CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
        give_up = time.monotonic() + 20
        while not all(_agrees(node, len(self.nodes)) for node in self.nodes):
            assert time.monotonic() < give_up, "the cluster did not form"
            time.sleep(0.05)

    @contextmanager
    def moving(self, key: str) -> Generator["SlotMove", None, None]:
        """Begin to move the slot of `key` from its node to another; afterwards it is back."""
        slot = key_slot(key.encode())
        share = -(-_SLOTS // len(self.nodes))
        source = self.nodes[slot // share]
        target = next(node for node in self.nodes if node is not source)
        with redis.Redis.from_url(source.url) as sender, redis.Redis.from_url(target.url) as receiver:
            move = SlotMove(slot, sender, receiver, target.port)
            move.begin()
            try:
                yield move
            finally:
                for node in self.nodes:
                    with redis.Redis.from_url(node.url) as client:
                        command(client, "CLUSTER SETSLOT", slot, "NODE", move.source_id)

    def flush(self) -> None:
        for node in self.nodes:
            flush(node)


class Watched:
    """A primary and its replica, and one Sentinel that makes the second the first when that dies."""

    SERVICE = "conversations"

    def __init__(self, primary: RedisServer, replica: RedisServer, sentinel_port: int) -> None:
        self.primary, self.replica = primary, replica
        self.url = f"redis+sentinel://127.0.0.1:{sentinel_port}/{self.SERVICE}"

    def wait_for_replica(self) -> None:
        """Return when the replica has all that was written."""
        with redis.Redis.from_url(self.primary.url) as client:
            client.incr("written")  # WAIT is about what its own connection has written
            assert client.wait(1, 5000) == 1


class SlotMove:
    """A slot on its way, step by step as redis-cli does it."""

    def __init__(self, slot: int, source: redis.Redis, target: redis.Redis, target_port: int) -> None:
        self._slot, self._source, self._target, self._target_port = slot, source, target, target_port
        self.source_id, self._target_id = (_text(command(node, "CLUSTER MYID")) for node in (source, target))

    def begin(self) -> None:
        command(self._target, "CLUSTER SETSLOT", self._slot, "IMPORTING", self.source_id)
        command(self._source, "CLUSTER SETSLOT", self._slot, "MIGRATING", self._target_id)

    def keys(self) -> None:
        """Move what is in the slot: from now on the source says ASK."""
        keys = command(self._source, "CLUSTER GETKEYSINSLOT", self._slot, 100)
        command(self._source, "MIGRATE", "127.0.0.1", self._target_port, "", 0, 5000, "KEYS", *keys)

    def slot(self) -> None:
        """Hand over: from now on the source says MOVED."""
        for node in (self._target, self._source):
            command(node, "CLUSTER SETSLOT", self._slot, "NODE", self._target_id)


def command(client: redis.Redis, *words: str | int) -> Any:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


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
def _acl_server() -> Iterator[RedisServer]:
    with RedisServer(user=("worker", "secret")) as server:
        yield server


@pytest.fixture
def acl_redis(_acl_server: RedisServer) -> RedisServer:
    """A server that knows no user but one, emptied."""
    flush(_acl_server)
    return _acl_server


@pytest.fixture
def watched_redis(tmp_path: Path) -> Iterator[Watched]:
    """Two servers under a Sentinel, the first to be killed."""
    with RedisServer() as primary, RedisServer() as replica, socket.socket() as probe:
        with redis.Redis.from_url(replica.url) as client:
            command(client, "REPLICAOF", "127.0.0.1", primary.port)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        settings = tmp_path / "sentinel.conf"  # which it writes to
        settings.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {tmp_path}\n"
            f"sentinel monitor {Watched.SERVICE} 127.0.0.1 {primary.port} 1\n"
            f"sentinel known-replica {Watched.SERVICE} 127.0.0.1 {replica.port}\n"  # else it looks after ten seconds
            f"sentinel down-after-milliseconds {Watched.SERVICE} 300\n"
            f"sentinel failover-timeout {Watched.SERVICE} 3000\n"
        )
        probe.close()
        with (tmp_path / "log").open("wb") as log:
            sentinel = subprocess.Popen([redis_server_binary(), settings, "--sentinel"], stdout=log, stderr=log)
        try:
            _wait_for_sentinel(port)
            yield Watched(primary, replica, port)
        finally:
            sentinel.terminate()
            sentinel.wait(10)


@pytest.fixture(scope="session")
def tls_front(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFront]:
    """TLS in front of the shared server."""
    with TlsFront(redis_server, tmp_path_factory.mktemp("tls")) as front:
        yield front


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


def _wait_for_sentinel(port: int) -> None:
    """Until it knows the replica: before that it has nothing to fail over to."""
    give_up = time.monotonic() + 20
    with redis.Redis(port=port) as client:
        while True:
            try:
                if client.sentinel_master(Watched.SERVICE)["num-slaves"] == 1:
                    return
            except redis.ConnectionError:
                pass  # not up yet
            assert time.monotonic() < give_up, "the sentinel knows no replica"
            time.sleep(0.05)


def _agrees(node: RedisServer, num_nodes: int) -> bool:
    with redis.Redis.from_url(node.url) as client:
        info = command(client, "CLUSTER INFO")
    state: dict[str, str] = (
        info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.decode().split())
    )
    return state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(num_nodes)


def _text(reply: object) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)
