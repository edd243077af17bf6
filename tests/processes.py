"""What tests start as people do: the `rekindle` command, and a Ray of its own. Nothing of them outlives its test."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_MARK = "REKINDLE_TEST_RUN"


@contextmanager
def command(tmp_path: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `rekindle`, and see that no process of it is left at the end."""
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "rekindle", *words],
            env={
                **os.environ,
                _MARK: str(tmp_path),
                "TMPDIR": str(tmp_path),
                "RAY_TMPDIR": "/tmp",
            },  # Ray's paths are long
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield process
        assert processes_of(tmp_path) == []
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        for pid in processes_of(tmp_path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(tmp_path: Path) -> list[int]:
    """Living processes that this test's commands have started, however they call themselves now."""
    mark = f"{_MARK}={tmp_path}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # A server that has set its title has lost its environment, but Redis works in a folder in TMPDIR.
                ours = mark in (entry / "environ").read_bytes() or (entry / "cwd").readlink().is_relative_to(tmp_path)
            except OSError:  # it has ended meanwhile
                continue
            if ours:
                found.append(int(entry.name))
    return found


def workers_of(tmp_path: Path) -> set[int]:
    """Those of them that Ray runs this test's workers in."""
    found = set()
    for pid in processes_of(tmp_path):
        with suppress(OSError):  # it has ended meanwhile
            if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


@pytest.fixture(scope="module")
def running_ray() -> Iterator[str]:
    """Address of a Ray that outlives its drivers, for the tests of a file: each takes its workers away again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("ray", "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"),
        *("--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={80 << 20}"),
    ]
    executable = Path(sys.executable).parent / command[0]
    process = subprocess.Popen(
        [executable, *command[1:]],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # else it depends on whether this user has a token
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    give_up = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, "ray start failed"
        assert time.monotonic() < give_up, "ray did not start"
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    process.terminate()
    try:
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
