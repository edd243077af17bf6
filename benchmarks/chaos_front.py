"""A front end as a plain process, for workers at places that don't change: `python -m benchmarks.chaos_front A B`.

A is ServerConfig as a JSON object, B the workers' host:port by id. Stops cleanly on SIGTERM.
"""

import asyncio
import json
import signal
import sys

import structlog

from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses


async def _serve(config: ServerConfig, workers: dict[str, str]) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    front_end = Application.build(config, StaticAddresses(workers))
    try:
        await front_end.start()
        print(json.dumps({"address": front_end.address, "metrics_address": front_end.metrics_address}), flush=True)
        await stopped.wait()
        await front_end.drain()
    finally:
        await front_end.aclose()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout has the one line
    asyncio.run(_serve(ServerConfig(**json.loads(sys.argv[1])), json.loads(sys.argv[2])))
