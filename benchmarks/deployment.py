"""A whole deployment to measure: `rekindle serve` as anyone would start it, in processes of its own."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rekindle.errors import RekindleError
from rekindle.sync_client import Client

_START_WITHIN_S = 180.0
_STOP_WITHIN_S = 60.0


@contextmanager
def deployment(*, model: str, redis_url: str, workers: int = 1, device_cache_bytes: int = 1 << 30) -> Iterator[str]:
    """Serve `model` from `workers` workers; yields the address of the front end once a worker answers."""
    port = _free_port()
    command = [
        *(sys.executable, "-m", "rekindle", "serve"),
        *("--port", str(port), "--num-workers", str(workers), "--model", model, "--redis-url", redis_url),
        *("--device-cache-bytes", str(device_cache_bytes), "--host-cache-bytes", str(device_cache_bytes)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_serves(f"127.0.0.1:{port}", workers, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_serves(address: str, workers: int, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + _START_WITHIN_S
    while process.poll() is None and time.monotonic() < give_up:
        with suppress(RekindleError), Client(address) as client:
            if len(client.stats(timeout_s=5).workers) == workers:
                return
        time.sleep(0.5)
    raise RuntimeError(f"`rekindle serve` did not come up (exit status {process.poll()})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
