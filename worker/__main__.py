"""A worker as a plain process, without Ray: `python -m worker --config JSON`. Stops cleanly on SIGTERM and SIGINT.

On SIGUSR1 it proves that its blocks balance, and says so on standard output: `{"check": ""}`, or what is wrong.
"""

import argparse
import asyncio
import json
import signal
import sys

from cache_store.errors import ServingError
from worker.app import WorkerApp
from worker.collector import look_past_what_is_there
from worker.config import ConfigError, WorkerConfig
from worker.logs import set_up_logs


async def _serve(worker_id: str, config: WorkerConfig, port: int, drain_s: float) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    app = await WorkerApp.start(worker_id, config, port=port)
    checks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    def check() -> None:
        task = asyncio.create_task(_say_check(app))
        checks.add(task)
        task.add_done_callback(checks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, check)
    look_past_what_is_there()
    # One line for whoever started this process and waits for it to be up.
    _say({"address": app.address, "metrics_address": app.metrics_address})
    await stopped.wait()
    await app.stop(within_s=drain_s)


async def _say_check(app: WorkerApp) -> None:
    _say({"check": await app.check()})


def _say(line: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker", description="Serve one model as one Rekindle worker.")
    parser.add_argument("--worker-id", default="0", help="names the worker in receipts, logs and metrics")
    parser.add_argument("--port", type=int, default=0, help="of the gRPC server; 0 takes a free one")
    parser.add_argument("--drain-s", type=float, default=30.0, help="how long running turns may take when it stops")
    parser.add_argument("--config", default="{}", help="WorkerConfig as a JSON object; what is missing has its default")
    arguments = parser.parse_args()
    set_up_logs(sys.stderr)  # stdout has the one line
    try:
        config = WorkerConfig(**json.loads(arguments.config))
        asyncio.run(_serve(arguments.worker_id, config, arguments.port, arguments.drain_s))
    except (ConfigError, TypeError, json.JSONDecodeError) as error:
        parser.error(f"--config: {error}")
    except (ServingError, OSError) as error:
        sys.stderr.write(f"worker: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
