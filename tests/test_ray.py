"""`rekindle serve` on a real Ray: what dies is found again, what is stopped leaves nothing behind but its memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import redis
from ray.util import list_named_actors

from cache_store.embedded_redis import RedisServer
from rekindle.sync_client import Client
from tests.processes import command, workers_of
from tests.systems import BLOCK_TOKENS, block_keys, session_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

_SERVE = (
    *("serve", "--num-workers", "2", "--port", "0", "--metrics-port", "0", "--block-tokens", str(BLOCK_TOKENS)),
    *("--device-cache-bytes", "16777216", "--host-cache-bytes", "16777216", "--worker-poll-s", "0.2"),
    *("--restore-plan", "load"),  # so short histories would be computed sooner
)
_LONG = "A sentence that is long enough to fill more than one block. "


def address_of(serving: "subprocess.Popen[str]", tmp_path: Path) -> str:
    """Wait until the front end listens."""
    assert serving.stdout is not None
    line = serving.stdout.readline()
    assert line.startswith("listening on "), (tmp_path / "stderr").read_text()
    return line.removeprefix("listening on ").partition(",")[0]


def say(client: Client, session_id: str, text: str) -> Any:
    """Run a turn; return its receipt."""
    generation = client.generate(text, session_id=session_id, max_new_tokens=8, ignore_eos=True)
    generation.read()
    return generation.receipt


def eventually(check: Callable[[], bool], *, within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < give_up, f"did not happen within {within_s:g} s"
        time.sleep(0.1)


def test_a_killed_worker_is_restarted_and_served_on_and_sigterm_ends_it_all(tmp_path: Path) -> None:
    with command(tmp_path, *_SERVE, "--embedded-redis") as serving, Client(address_of(serving, tmp_path)) as client:
        sessions = {session_for(worker_id, ["0", "1"]): worker_id for worker_id in ("0", "1")}
        for session_id, worker_id in sessions.items():
            client.create_session(session_id)
            assert say(client, session_id, worker_id + _LONG).worker_id == worker_id
        before = workers_of(tmp_path)
        assert len(before) == 2
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(client.stats().workers) == 1, within_s=10)
        (survivor,) = (worker.worker_id for worker in client.stats().workers)
        for session_id, worker_id in sessions.items():
            receipt = say(client, session_id, "And on it goes.")
            assert receipt.worker_id == survivor
            assert (receipt.device_tokens if worker_id == survivor else receipt.redis_tokens) >= BLOCK_TOKENS
        eventually(lambda: len(client.stats().workers) == 2, within_s=40)
        after = workers_of(tmp_path)
        assert len(after) == 2
        assert before & after == before - {victim}
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0


def test_workers_are_added_and_drained_by_command_and_sessions_follow(tmp_path: Path, running_ray: str) -> None:
    def scale(count: int) -> str:
        words = ("scale", str(count), "--ray-address", running_ray, "--timeout-s", "60")
        return subprocess.run(
            [sys.executable, "-m", "rekindle", *words], capture_output=True, text=True, check=True, timeout=90
        ).stdout

    with RedisServer() as server:
        serve = (*_SERVE, "--redis-url", server.url, "--ray-address", running_ray, "--cpus-per-worker", "0.5")
        with command(tmp_path, *serve) as serving, Client(address_of(serving, tmp_path)) as client:
            session_id = session_for("1", ["0", "1"])
            client.create_session(session_id)
            assert say(client, session_id, _LONG).worker_id == "1"
            num_tokens = client.get_session(session_id).num_tokens
            assert scale(3) == "3 workers serve, 2 did\n"
            eventually(lambda: len(client.stats().workers) == 3, within_s=10)
            assert scale(1) == "1 workers serve, 3 did\n"
            eventually(lambda: [worker.worker_id for worker in client.stats().workers] == ["0"], within_s=10)
            receipt = say(client, session_id, "And on it goes.")
            assert (receipt.worker_id, receipt.redis_tokens) == ("0", num_tokens - 1)
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0, (tmp_path / "stderr").read_text()


@pytest.fixture
def ray_driver(running_ray: str) -> Iterator[str]:
    """This process as one more driver of the running Ray, to see what it sees."""
    ray.init(address=running_ray, namespace="rekindle", log_to_driver=False, logging_level="error")
    yield running_ray
    ray.shutdown()


def test_a_killed_front_end_finds_its_workers_alive_and_what_sigterm_parks_resumes_in_the_next_deployment(
    tmp_path: Path, ray_driver: str
) -> None:
    def pids() -> list[int]:
        return [ray.get(ray.get_actor(f"worker-{number}").pid.remote(), timeout=30) for number in range(2)]

    with RedisServer() as server, redis.Redis(port=server.port) as records:
        serve = (*_SERVE, "--redis-url", server.url, "--ray-address", ray_driver, "--cpus-per-worker", "0.5")
        with command(tmp_path, *serve) as serving, Client(address_of(serving, tmp_path)) as client:
            client.create_session("s")
            first = say(client, "s", _LONG)
            before = pids()
            serving.kill()
            serving.wait()
        with command(tmp_path, *serve) as serving, Client(address_of(serving, tmp_path)) as client:
            assert pids() == before
            second = say(client, "s", "And on it goes.")
            assert second.worker_id == first.worker_id
            session = client.get_session("s", with_token_ids=True)
            assert second.device_tokens == session.turns[0].end - 1
            keys = block_keys(session)
            assert not records.exists(keys[-1])  # an unfull block is stored when its session is parked
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0, (tmp_path / "stderr").read_text()
        assert records.exists(*keys) == len(keys)
        assert list_named_actors(all_namespaces=True) == []
        assert ray.cluster_resources()["CPU"] == 2
        with command(tmp_path, *serve) as serving, Client(address_of(serving, tmp_path)) as client:
            assert not set(pids()) & set(before)
            assert say(client, "s", "And on it goes.").redis_tokens == len(session.token_ids) - 1
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0, (tmp_path / "stderr").read_text()
