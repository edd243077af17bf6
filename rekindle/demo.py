"""The main job, end to end, on this machine: a conversation outlives its worker and goes on as if nothing had been.

Everything is real: a redis-server, Ray with two workers in processes of their own, gRPC, and SIGKILL. Beside it, a
third worker without any tier below its device holds the same conversation undisturbed: every reply must be equal.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cache_store.errors import ServingError
from protos import rekindle_pb2 as pb
from rekindle.client import Client
from rekindle.display import size, to_dict
from rekindle.errors import RekindleError
from rekindle.serve import System, running_system
from rekindle.settings import Settings
from rekindle.signals import StopSignals
from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses
from server.errors import WorkerFault
from server.logs import set_up_logs
from worker.config import WorkerConfig

_BEFORE: Final = (
    "Hello, I am Ana.",
    "My sister's dog is called Biscuit.",
    "By the way, my flight is on Thursday.",
    "No, it's Friday.",
)
_AFTER: Final = (
    ("What is my sister's dog called?", "Biscuit"),
    ("When is my flight?", "Friday"),
    ("Do you remember my name?", "Ana"),
)
"""Questions, and what a reply must have in it."""
_SESSION: Final = "demo"
_SAMPLING: Final[dict[str, Any]] = {"max_new_tokens": 48}
_STOP_WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said, the reply, and what its prompt cost."""

    said: str
    reply: str
    token_ids: list[int]
    usage: pb.Usage
    receipt: pb.Receipt


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened, and whether it is what Rekindle promises."""

    turns: list[Turn]
    undisturbed: list[Turn]
    parked: pb.ParkSessionResponse
    killed_worker: str
    seconds: float

    @property
    def problems(self) -> list[str]:
        resumed = self.turns[len(_BEFORE)].receipt
        found = [
            f"the reply of turn {number} differs from the undisturbed one"
            for number, (turn, other) in enumerate(zip(self.turns, self.undisturbed, strict=True), start=1)
            if (turn.reply, turn.token_ids) != (other.reply, other.token_ids)
        ]
        found += [
            f"the answer to {question!r} is {turn.reply!r}, without {answer!r}"
            for turn, (question, answer) in zip(self.turns[len(_BEFORE) :], _AFTER, strict=True)
            if answer not in turn.reply
        ]
        if resumed.redis_tokens == 0:
            found.append("the resumed turn took nothing from Redis")
        if resumed.worker_id == self.killed_worker:
            found.append("the resumed turn ran on the worker that was killed")
        return found


def demo(*, as_json: bool) -> int:
    """Run it and print it. Returns the exit status: 0 if all holds, 1 if not, 130 if it was stopped."""
    set_up_logs("auto", "error")
    console = Console(stderr=True, quiet=as_json)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # where Ray deplores the killed worker
            outcome = asyncio.run(_until_stopped(console))
    except (ServingError, RekindleError, OSError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    if outcome is None:
        return 130
    if as_json:
        print(json.dumps(_as_dict(outcome)))
    else:
        _print(outcome, Console())
    return 1 if outcome.problems else 0


async def _until_stopped(console: Console) -> Outcome | None:
    with StopSignals() as signals:
        return await _run(console, signals)
    return None


async def _run(console: Console, signals: StopSignals) -> Outcome:
    """Start both sides, hold the conversation on each, and stop them."""
    start = time.monotonic()
    settings = Settings(
        server=ServerConfig(port=0, metrics_port=0, worker_poll_s=0.2, drain_s=5.0),
        worker=WorkerConfig(
            cpu_threads=1,
            device_cache_bytes=64 << 20,
            host_cache_bytes=64 << 20,
            device="cpu",
            restore_plan="load",  # so small a model computes a prompt as fast as Redis brings it back
        ),
        system=replace(Settings.from_values({}).system, num_workers=2, embedded_redis=True),
    )
    async with AsyncExitStack() as stack:
        alone = await stack.enter_async_context(_worker_alone(settings.worker))
        system = await stack.enter_async_context(running_system(settings, console, signals))
        undisturbed = await stack.enter_async_context(_front_end_of(await alone.address()))
        client = await stack.enter_async_context(Client(system.front_end.address))
        await client.create_session(_SESSION)
        turns = [await _say(client, text) for text in _BEFORE]
        parked = await client.park_session(_SESSION, drop_host=True)
        killed_worker = turns[-1].receipt.worker_id
        await _kill(system, killed_worker)
        turns += [await _say(client, text) for text, _ in _AFTER]
        await undisturbed.create_session(_SESSION)
        others = [await _say(undisturbed, turn.said) for turn in turns]
        return Outcome(turns, others, parked, killed_worker, time.monotonic() - start)


async def _say(client: Client, text: str) -> Turn:
    generation = client.generate([{"role": "user", "content": text}], session_id=_SESSION, **_SAMPLING)
    reply = await generation.read()
    assert generation.finished is not None
    return Turn(text, reply, generation.token_ids, generation.finished.usage, generation.finished.receipt)


async def _kill(system: System, worker_id: str) -> None:
    """End the worker's process as a crash would."""
    os.kill(await system.cluster.pid(worker_id), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _WorkerAlone:
    """A plain worker process, which says its address when it is up."""

    process: asyncio.subprocess.Process
    log: IO[bytes]

    async def address(self) -> str:
        """host:port of its gRPC server. Raises WorkerFault, with its last words, if it could not start."""
        assert self.process.stdout is not None
        said = await self.process.stdout.readline()
        if not said:
            self.log.seek(0)
            raise WorkerFault(f"the undisturbed worker could not start: {self.log.read().decode()[-500:]}")
        return str(json.loads(said)["address"])

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(_STOP_WITHIN_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def _worker_alone(config: WorkerConfig) -> AsyncIterator[_WorkerAlone]:
    """Start a worker of the same model without host tier, Redis and Ray."""
    alone = replace(config, redis_url="", host_cache_bytes=0)
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker", "--worker-id", "undisturbed", "--drain-s", "1"),
            *("--config", json.dumps(asdict(alone))),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
        worker = _WorkerAlone(process, log)
        try:
            yield worker
        finally:
            await worker.stop()


@asynccontextmanager
async def _front_end_of(worker_address: str) -> AsyncIterator[Client]:
    """A client of a front end of its own, over one worker, so that both conversations are held the same way."""
    config = ServerConfig(port=0, metrics_port=0, redis_url="memory://")
    front_end = Application.build(config, StaticAddresses({"undisturbed": worker_address}))
    try:
        await front_end.start()
        async with Client(front_end.address) as client:
            yield client
    finally:
        await front_end.aclose()


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "turns": [
            {"said": turn.said, "reply": turn.reply, "token_ids": turn.token_ids, "usage": to_dict(turn.usage)}
            | {"receipt": to_dict(turn.receipt), "undisturbed_token_ids": other.token_ids}
            for turn, other in zip(outcome.turns, outcome.undisturbed, strict=True)
        ],
        "parked": to_dict(outcome.parked),
        "killed_worker": outcome.killed_worker,
        "problems": outcome.problems,
        "holds": not outcome.problems,
        "seconds": round(outcome.seconds, 1),
    }


def _print(outcome: Outcome, console: Console) -> None:
    """The conversation, the receipts as a table, what happened between the turns, and the verdict."""
    for number, turn in enumerate(outcome.turns):
        if number == len(_BEFORE):
            console.print("[dim](parked; its worker killed)[/dim]")
        console.print(f"[bold]{escape(turn.said)}[/bold]\n  {escape(turn.reply)}", highlight=False)
    table = Table(title="What each turn's prompt cost", box=SIMPLE_HEAD, padding=0)
    for heading in ("turn", "worker", "prompt\ntokens", "from\ndevice", "from\nhost", "from\nredis", "computed"):
        table.add_column(heading, justify="right")
    for heading in ("restored", "restore\nms", "prefill\nms", "first\ntoken\nms"):
        table.add_column(heading, justify="right")
    for number, turn in enumerate(outcome.turns, start=1):
        receipt = turn.receipt
        sources = (receipt.device_tokens, receipt.host_tokens, receipt.redis_tokens, receipt.computed_tokens)
        times = (receipt.restore_ms, receipt.prefill_ms, receipt.ttft_ms)
        table.add_row(
            str(number),
            receipt.worker_id,
            str(turn.usage.prompt_tokens),
            *map(str, sources),
            size(receipt.restored_bytes),
            *(f"{milliseconds:.1f}" for milliseconds in times),
            end_section=number == len(_BEFORE),
        )
    console.print(table)
    parked = outcome.parked
    console.print(
        f"After turn {len(_BEFORE)} the session was parked ({parked.redis_tokens} tokens in Redis, nothing left on "
        f"device or host), and worker {outcome.killed_worker} was killed (SIGKILL)."
    )
    if outcome.problems:
        console.print(*(f"[red]{escape(problem)}[/red]" for problem in outcome.problems), sep="\n")
    else:
        console.print(
            f"All {len(outcome.turns)} replies are equal, token for token, to those of the same conversation held "
            f"undisturbed. ({outcome.seconds:.0f} s)"
        )
