"""An engine on a CPU has one team of kernel threads: a second one would put the first to sleep at every barrier."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")

SCRIPT = """
import os, threading
import torch
from cache_store.embedded_redis import RedisServer
from tests.engines import TENANT, generate
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine

def num_native():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

history = tuple(number % 97 for number in range(600))
with RedisServer() as redis:
    before = num_native()
    engine = build_engine(WorkerConfig(
        model="preset:tiny", redis_url=redis.url, restore_plan="load", self_measure_s=0.1,
        device_cache_bytes=64 << 20, host_cache_bytes=64 << 20,
    ))
    for codec in ("raw", "int8"):
        generate(engine, history, (5, 6), codec=codec)
        for drop_host in (False, True):
            engine.park(TENANT, history, codec=codec, drop_host=drop_host, ttl_s=60).result(30)
            receipt = generate(engine, history, (5, 6), codec=codec).receipt
            assert receipt.redis_tokens if drop_host else receipt.host_tokens, receipt
        print(codec, num_native() - before, torch.get_num_threads() - 1)
    engine.close()
"""


@pytest.mark.skipif(os.cpu_count() == 1, reason="a team of one is no threads")
def test_neither_loading_nor_moving_blocks_leaves_a_second_team() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = [line.split() for line in done.stdout.splitlines() if line.startswith(("raw ", "int8 "))]
    assert [codec for codec, *_ in counts] == ["raw", "int8"]
    for codec, num_threads, num_of_a_team in counts:
        assert num_threads == num_of_a_team, codec
