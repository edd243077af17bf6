"""The proxy that tests put before Redis: each fault is what it says, and nothing of it stays."""

import time
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from benchmarks.fault_proxy import FaultProxy
from cache_store.embedded_redis import RedisServer
from tests.redis_servers import flush

VALUE = bytes(range(256)) * 1024


@pytest.fixture(scope="module")
def running(redis_server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(redis_server.port, seed=1) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy, redis_server: RedisServer) -> Iterator[FaultProxy]:
    flush(redis_server)
    yield running
    running.heal()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[redis.Redis]:
    with redis.Redis(port=proxy.port, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
        client.set("key", VALUE)
        yield client


def test_what_passes_is_as_it_was(client: redis.Redis) -> None:
    assert client.get("key") == VALUE


def test_an_answer_that_is_delayed_comes_whole(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(delay_s=0.1)
    began = time.monotonic()
    assert client.ping()
    assert time.monotonic() - began > 0.1
    proxy.set(delay_s=30)
    with pytest.raises(redis.TimeoutError):
        client.ping()
    proxy.heal()
    assert client.get("key") == VALUE


def test_what_was_stalled_arrives_when_the_stall_ends(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(stalled=True)
    with pytest.raises(redis.TimeoutError):
        client.set("late", "said")
    proxy.heal()
    give_up = time.monotonic() + 5
    while client.get("late") != b"said":
        assert time.monotonic() < give_up


def test_what_a_black_hole_swallowed_never_arrives(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(swallowed=True)
    with pytest.raises(redis.TimeoutError):
        client.set("lost", "said")
    proxy.heal()
    assert client.get("lost") is None


def test_a_reset_falls_within_the_value(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(reset_within_bytes=len(VALUE) // 2)
    client.connection_pool.disconnect()  # that connection's next answer was let through already
    for _ in range(5):
        with pytest.raises(redis.ConnectionError):
            client.get("key")
    proxy.heal()
    assert client.get("key") == VALUE


def test_a_port_that_refuses_is_open_again_afterwards(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(refused=True)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.ping()
    proxy.heal()
    assert client.get("key") == VALUE


def test_a_rate_is_kept(proxy: FaultProxy, client: redis.Redis) -> None:
    proxy.set(bytes_per_s=2 * len(VALUE))
    began = time.monotonic()
    with redis.Redis(port=proxy.port, socket_timeout=5.0) as patient:
        assert patient.get("key") == VALUE
    assert 0.3 < time.monotonic() - began < 2.0
