"""A front end as a plain process: `python -m benchmarks.chaos_front CONFIG PLACES`. Stops cleanly on SIGTERM.

CONFIG is ServerConfig as a JSON object; PLACES a JSON file with each worker's address by id, read again and again.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog

from server.app import Application
from server.config import ServerConfig
from worker.collector import look_past_what_is_there


class _Places:
    """A `WorkerAddresses`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def addresses(self) -> Mapping[str, str]:
        return {number: place["address"] for number, place in json.loads(self._file.read_text()).items()}


async def _serve(config: ServerConfig, places: Path) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    front_end = Application.build(config, _Places(places))
    try:
        await front_end.start()
        look_past_what_is_there()  # as `rekindle serve` does
        print(json.dumps({"address": front_end.address, "metrics_address": front_end.metrics_address}), flush=True)
        await stopped.wait()
        await front_end.drain()
    finally:
        await front_end.aclose()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout has the one line
    asyncio.run(_serve(ServerConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])))
