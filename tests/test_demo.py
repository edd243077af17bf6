"""The whole system as people start it: `rekindle demo` and `rekindle serve`, in processes of their own."""

import json
import signal
import time
from pathlib import Path

import pytest
import redis

from cache_store.embedded_redis import RedisServer
from rekindle.sync_client import Client
from tests.processes import command, workers_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


def test_the_demo_resumes_from_redis_on_the_other_worker_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with command(tmp_path, "demo", "--json") as process:
        said, _ = process.communicate()
        assert process.returncode == 0, (said, (tmp_path / "stderr").read_text())
    shown = json.loads(said)
    before, resumed = shown["turns"][3]["receipt"], shown["turns"][4]["receipt"]
    assert shown["holds"]
    assert (shown["problems"], shown["killed_worker"]) == ([], before["worker_id"])
    assert resumed["worker_id"] != before["worker_id"]
    assert resumed["redis_tokens"] == shown["parked"]["redis_tokens"] > 0
    assert resumed["device_tokens"] == resumed["host_tokens"] == 0
    assert all(turn["token_ids"] == turn["undisturbed_token_ids"] for turn in shown["turns"])
    assert shown["seconds"] < 120


def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    with command(tmp_path, "demo") as process:
        give_up = time.monotonic() + 60
        while len(workers_of(tmp_path)) < 2:  # until Ray is up and the workers load
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "stderr").read_text()


def test_serve_parks_what_is_hot_and_ends_well_on_sigterm(tmp_path: Path) -> None:
    def blocks() -> list[bytes]:
        with redis.Redis(port=server.port) as connection:
            return list(connection.scan_iter("rekindle:b:*"))

    rooms = ("--device-cache-bytes", "16777216", "--host-cache-bytes", "16777216")
    with (
        RedisServer() as server,
        command(tmp_path, "serve", "--redis-url", server.url, "--port", "0", "--metrics-port", "0", *rooms) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").partition(",")[0]
        with Client(address) as client:
            client.create_session("s")
            client.generate("hello", session_id="s", max_new_tokens=4).read()
        assert blocks() == []  # an unfull block is stored when its session is parked, and not before
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
        assert len(blocks()) == 1


def test_serve_says_in_one_line_why_it_cannot_start(tmp_path: Path) -> None:
    with command(tmp_path, "serve", "--model", "preset:nonsense", "--embedded-redis", "--port", "0") as process:
        assert process.wait(90) == 1
    assert "there is no preset 'nonsense'" in (tmp_path / "stderr").read_text().splitlines()[-1]
