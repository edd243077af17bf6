"""A process that can be broken: started, killed, frozen, measured, and asked whether its blocks balance."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_STOP_WITHIN_S = 30.0


class Use(NamedTuple):
    """What a process holds."""

    memory_bytes: int
    descriptors: int


def use_of(pid: int) -> Use:
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Use(pages * 4096, sum(1 for _ in (process / "fd").iterdir()))


class Worker(Protocol):
    """A worker that can be broken: a process of ours, or of Ray's."""

    name: str

    @property
    def address(self) -> str:
        """host:port of its gRPC server, while it is up."""
        ...

    def start(self) -> None: ...
    def line(self) -> Any:
        """Return when it is up, after `start`."""
        ...

    def kill(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def stop(self) -> None: ...
    def use(self) -> Use: ...
    def check(self) -> str: ...


class Part:
    """A process that says one line of JSON when it is up, and can be killed and started again on its port."""

    def __init__(self, name: str, command: Sequence[str], log: Path, *, port: int = 0) -> None:
        self.name = name
        self.address = f"127.0.0.1:{port}"
        self._command = [sys.executable, "-m", *command]
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin; `line` then says when it is up."""
        assert self._process is None, f"{self.name} runs"
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)

    def line(self) -> Any:
        """The next line that the process says. Raises RuntimeError, with its last words, where it ends instead."""
        output = self._running.stdout
        assert output is not None
        said = output.readline()
        if not said:
            raise RuntimeError(f"{self.name} ended ({self._running.wait()}): {self._log.read_text()[-2000:]}")
        return json.loads(said)

    def kill(self) -> None:
        """End it as a crash would."""
        process, self._process = self._running, None
        process.kill()
        process.communicate()

    def freeze(self) -> None:
        """Let it neither run nor die, until `thaw`."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in good order, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)  # what is frozen does not hear SIGTERM
        process.terminate()
        try:
            process.communicate(timeout=_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def use(self) -> Use:
        return use_of(self._running.pid)

    def check(self) -> str:
        """Ask an idle worker to prove that its blocks balance. Empty, or what is wrong."""
        self._running.send_signal(signal.SIGUSR1)
        return str(self.line()["check"])

    @property
    def _running(self) -> "subprocess.Popen[str]":
        assert self._process is not None, f"{self.name} does not run"
        return self._process
