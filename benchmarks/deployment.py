"""A whole deployment to measure: `rekindle serve` as anyone would start it, in processes of its own."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from rekindle.errors import RekindleError
from rekindle.sync_client import Client

_START_WITHIN_S = 180.0
_STOP_WITHIN_S = 60.0
_LAST_WORDS = 2000


@contextmanager
def deployment(
    *,
    model: str,
    redis_url: str,
    workers: int = 1,
    device_cache_bytes: int = 1 << 30,
    host_cache_bytes: int | None = None,
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Serve `model` from `workers` workers; yields the address of the front end once all workers answer.

    `host_cache_bytes` None: as many as the device's. `flags` are passed on to `rekindle serve`.
    """
    port = free_port()
    host_bytes = device_cache_bytes if host_cache_bytes is None else host_cache_bytes
    command = [
        *(sys.executable, "-m", "rekindle", "serve"),
        *("--port", str(port), "--metrics-port", "0", "--num-workers", str(workers)),
        *("--model", model, "--redis-url", redis_url),
        *("--device-cache-bytes", str(device_cache_bytes), "--host-cache-bytes", str(host_bytes)),
        *flags,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_it_serves(f"127.0.0.1:{port}", workers, process, log)
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_serves(address: str, workers: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    give_up = time.monotonic() + _START_WITHIN_S
    while process.poll() is None and time.monotonic() < give_up:
        with suppress(RekindleError), Client(address) as client:
            if len(client.stats(timeout_s=5).workers) == workers:
                return
        time.sleep(0.5)
    log.seek(0)
    said = log.read().decode(errors="replace")[-_LAST_WORDS:]
    raise RuntimeError(f"`rekindle serve` did not come up (exit status {process.poll()}): {said}")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
