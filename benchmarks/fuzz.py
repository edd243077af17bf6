"""Random and mutated messages to every method: each gets a status that means something, and nothing of them stays."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from benchmarks.chaos_parts import Deployment, deployment
from benchmarks.fuzz_messages import Messages
from benchmarks.harness import at_least, at_most, finish
from protos import rekindle_memory_pb2 as mpb
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from protos.status import DETAILS_KEY

_BUGS = ("UNKNOWN", "INTERNAL")
_ANSWER_WITHIN_S = 20.0
_AT_ONCE = 8
_READ = 4
"""Responses of a stream that are waited for; then the caller hangs up."""
_KEPT = 20
_OFTEN, _OFTEN_TIMES = ("CreateSession", "Generate", "CreateBank", "Remember"), 3
"""So that there are sessions with turns, and banks with entries, that the other methods can find."""
_SPARE_DESCRIPTORS = 16
_SPARE_BYTES = 64 << 20


@dataclass(slots=True)
class Answers:
    """What came of the messages."""

    by_status: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    problems: list[str] = field(default_factory=list)
    """The first messages that met a bug, or whose answer was none: method, what came, and the message in hex."""
    num_problems: int = 0

    def with_these(self, others: "Answers") -> "Answers":
        return Answers(
            self.by_status + others.by_status,
            self.hung + others.hung,
            (self.problems + others.problems)[:_KEPT],
            self.num_problems + others.num_problems,
        )

    def problem(self, method: str, what: str, message: bytes) -> None:
        self.num_problems += 1
        if len(self.problems) < _KEPT:
            self.problems.append(f"{method}: {what}: {message[:500].hex()}")


def run(*, messages: int = 100_000, worker_messages: int = 10_000, seed: int = 1, as_json: bool = False) -> int:
    """Send messages to a front end with two workers, and some to a worker itself.

    Args:
        messages: To the front end: half of them well-formed with strange values, the others broken.
        worker_messages: To a worker, all well-formed: nobody but a front end calls it.
        seed: Of the messages.
        as_json: Print one JSON object.
    """
    with deployment(seed=seed) as system:
        front, worker, growth, unbalanced = asyncio.run(_bombard(system, messages, worker_messages, seed))
    figures = {
        "front_end": dict(sorted(front.by_status.items())),
        "worker": dict(sorted(worker.by_status.items())),
        "problems": front.problems + worker.problems,
        "unbalanced": unbalanced,
        **growth,
    }
    bars = [
        at_least("messages answered", front.by_status.total() + worker.by_status.total(), messages + worker_messages),
        at_most("bugs met", front.num_problems + worker.num_problems, 0),
        at_most("calls that hung", front.hung + worker.hung, 0),
        at_most("workers whose blocks don't balance", len(unbalanced), 0),
        at_most("descriptors more than before", growth["grown_descriptors"], _SPARE_DESCRIPTORS),
        at_most("MiB more than before", growth["grown_mib"], _SPARE_BYTES / 2**20),
    ]
    return finish("fuzz", figures, bars, as_json=as_json)


async def _bombard(
    system: Deployment, messages: int, worker_messages: int, seed: int
) -> tuple[Answers, Answers, dict[str, float], list[str]]:
    await system.wait_until_up()
    await fuzz(system.fronts[0].address, pb.DESCRIPTOR, messages=messages // 10, seed=seed + 1)  # warms what is lazy
    await fuzz(system.workers[0].address, wpb.DESCRIPTOR, messages=worker_messages // 10, seed=seed + 1, broken=False)
    before = {part.name: part.use() for part in system.parts}
    front = await fuzz(system.fronts[0].address, pb.DESCRIPTOR, messages=messages * 4 // 5, seed=seed)
    banks = await fuzz(system.fronts[0].address, mpb.DESCRIPTOR, messages=messages // 5, seed=seed)
    front = front.with_these(banks)
    worker = await fuzz(system.workers[0].address, wpb.DESCRIPTOR, messages=worker_messages, seed=seed, broken=False)
    await asyncio.sleep(1.0)  # what was hung up on ends
    after = {part.name: part.use() for part in system.parts}
    growth = {
        "grown_descriptors": max(after[name].descriptors - before[name].descriptors for name in after),
        "grown_mib": max(after[name].memory_bytes - before[name].memory_bytes for name in after) / 2**20,
    }
    problems = [await asyncio.to_thread(worker_part.check) for worker_part in system.workers]
    return front, worker, growth, [problem for problem in problems if problem]


async def fuzz(address: str, api: FileDescriptor, *, messages: int, seed: int, broken: bool = True) -> Answers:
    """Send so many to the methods of all services of `api`; with `broken`, not only well-formed ones."""
    chance = random.Random(seed)
    made = Messages(chance, [f"fuzz-{number}" for number in range(6)])
    methods = [method for service in api.services_by_name.values() for method in service.methods]
    methods += [method for method in methods if method.name in _OFTEN] * _OFTEN_TIMES
    answers = Answers()
    left = iter(range(messages))

    async def send(channel: grpc.aio.Channel) -> None:
        for _ in left:
            method = chance.choice(methods)
            kind = GetMessageClass(method.input_type)
            message = made.wire(kind) if broken else made.well_formed(kind).SerializeToString()
            await _call(channel, method, message, answers)

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(send(channel) for _ in range(_AT_ONCE)))
    return answers


async def _call(channel: grpc.aio.Channel, method: MethodDescriptor, message: bytes, answers: Answers) -> None:
    assert method.containing_service is not None
    name = f"{method.containing_service.name}/{method.name}"
    path = f"/{method.containing_service.full_name}/{method.name}"
    status = "OK"
    try:
        for reply in await _replies(channel, path, message, streams=method.server_streaming):
            GetMessageClass(method.output_type).FromString(reply)
    except grpc.aio.AioRpcError as error:
        status = error.code().name
        trailing: Any = error.trailing_metadata() or ()
        hung = status == "DEADLINE_EXCEEDED"
        answers.hung += hung
        if status in _BUGS or not (hung or DETAILS_KEY in dict(trailing)):  # without details it is gRPC's own
            answers.problem(name, f"{status} {error.details()}", message)
    except DecodeError as error:
        answers.problem(name, f"an answer that is none: {error}", message)
    answers.by_status[f"{name} {status}"] += 1


async def _replies(channel: grpc.aio.Channel, path: str, message: bytes, *, streams: bool) -> Sequence[bytes]:
    if not streams:
        return [await channel.unary_unary(path, None, None)(message, timeout=_ANSWER_WITHIN_S)]
    stream = channel.unary_stream(path, None, None)(message, timeout=_ANSWER_WITHIN_S)
    replies: list[bytes] = []
    async for reply in stream:
        replies.append(reply)
        if len(replies) == _READ:
            break
    stream.cancel()
    return replies
