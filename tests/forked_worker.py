"""`python -m worker` for tests, forked from a process that has its imports: they would cost each one seconds of CPU."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Final, TextIO

_FORKS: Final = multiprocessing.get_context("forkserver")
# pytest, because the child of a script imports that script's module.
_FORKS.set_forkserver_preload(["worker.__main__", "worker.engine.build_engine", "worker.text", "pytest"])


def fork_worker(*words: str) -> tuple[ForkServerProcess, TextIO]:
    """Start it with these words of a command line, in this process's environment; also, what it says."""
    reader, writer = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_run, args=(words, dict(os.environ), writer), daemon=True)
    process.start()
    writer.close()
    with reader:
        return process, os.fdopen(os.dup(reader.fileno()))


def _run(words: Sequence[str], environment: Mapping[str, str], output: Connection) -> None:
    from worker.__main__ import main

    os.environ.clear()  # it was of the day when the forking began
    os.environ.update(environment)
    os.dup2(output.fileno(), sys.stdout.fileno())
    output.close()
    sys.argv = ["worker", *words]
    sys.exit(main())
