"""Hold dialogues through the real server, undisturbed or with a park and a full drop between turns.

Gathers what clients, Redis and the worker's metrics say. Judges nothing.
"""

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum

import redis.asyncio

from cache_store.codecs import fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.frame import HEADER_BYTES
from cache_store.ids import root_hash
from models.dialogues import Dialogue
from protos import rekindle_pb2 as pb
from rekindle.client import Client
from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses
from worker.app import WorkerApp
from worker.config import WorkerConfig
from worker.engine.prefix import wanted_by_history

_STOP_WITHIN_S = 10.0


class Parking(Enum):
    """When a session leaves the device and host memory for Redis."""

    NEVER = "undisturbed"
    EVERY_TURN = "before every turn"
    ONCE = "before the last turn"
    OFTEN = "before the last turn, and warmed, as often as there were turns"

    def times(self, turn: int, last: int) -> int:
        """How often in a row a session is parked before a turn. Turns count from 0."""
        if turn == 0 or self is Parking.NEVER:
            return 0
        if self is Parking.EVERY_TURN:
            return 1
        return 0 if turn < last else (1 if self is Parking.ONCE else last)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a turn gave, and where its prompt's KV came from."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token, in nats."""
    receipt: pb.Receipt
    resumes: int
    """How often the session had come back from Redis, this turn's time included."""
    parked_tokens: int | None = None
    """Tokens of KV that Redis alone held when this turn began; None where the session was not parked before it."""

    @property
    def is_from_redis_alone(self) -> bool:
        """Whether all that was parked, and nothing else, spared this turn its prefill."""
        receipt = self.receipt
        return receipt.redis_tokens == self.parked_tokens and not receipt.device_tokens and not receipt.host_tokens


@dataclass(frozen=True, slots=True)
class Stored:
    """What Redis holds of an arm's sessions at its end, in KV bytes as the device has them and in payload bytes."""

    full_blocks: int = 0
    full_kv_bytes: int = 0
    full_payload_bytes: int = 0
    kv_bytes: int = 0
    """With the unfull blocks: of the tokens that they hold, not of the room that they take."""
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Arm:
    """All dialogues, held one way."""

    codec: str
    parking: Parking
    conversations: tuple[tuple[Reply, ...], ...]
    stored: Stored
    metrics: dict[str, float]
    """The worker's, at the end, by name and labels as Prometheus writes them: labels in alphabetical order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every arm has in common."""

    model: str
    dialogues: Sequence[Dialogue]
    max_new_tokens: int
    block_tokens: int
    cache_bytes: int
    """Room on the device, and as much in host memory: for the longest dialogue."""

    @property
    def num_turns(self) -> int:
        return sum(len(dialogue.turns) for dialogue in self.dialogues)


async def hold_all(setup: Setup, codec: str, parking: Parking, on_turn: Callable[[], None]) -> Arm:
    """Hold every dialogue on a system of its own, one after the other: a batch's shape would touch the numerics.

    A system of its own, because unfull blocks of one arm, left behind in Redis, would be taken up by the next one.
    Raises RekindleError, ServingError, OSError.
    """
    async with system(_worker_config(setup)) as (client, redis_url, metrics_address):
        held = [await _hold(client, setup, dialogue, codec, parking, on_turn) for dialogue in setup.dialogues]
        stored = await _stored(client, redis_url, codec, [session_id for session_id, _ in held])
        metrics = await asyncio.to_thread(scrape, metrics_address)
    return Arm(codec, parking, tuple(replies for _, replies in held), stored, metrics)


def _worker_config(setup: Setup) -> WorkerConfig:
    return WorkerConfig(
        model=setup.model,
        block_tokens=setup.block_tokens,
        device_cache_bytes=setup.cache_bytes,
        host_cache_bytes=setup.cache_bytes,
        restore_plan="load",  # what is not restored proves nothing
    )


@asynccontextmanager
async def system(config: WorkerConfig, redis_url: str = "") -> AsyncIterator[tuple[Client, str, str]]:
    """Redis (its own one, unless it is given another), a worker on it and a front end; yields a client, Redis' URL and
    the address of the worker's metrics."""
    async with AsyncExitStack() as stack:
        redis_url = redis_url or stack.enter_context(RedisServer()).url
        worker_config = replace(config, redis_url=redis_url)
        worker = await WorkerApp.start("0", worker_config)
        stack.push_async_callback(worker.stop, within_s=_STOP_WITHIN_S)
        server_config = ServerConfig(port=0, metrics_port=0, redis_url=redis_url, drain_s=_STOP_WITHIN_S)
        front_end = Application.build(server_config, StaticAddresses({"0": worker.address}))
        stack.push_async_callback(front_end.aclose)
        await front_end.start()
        client = await stack.enter_async_context(Client(front_end.address))
        yield client, redis_url, worker.metrics_address


async def _hold(
    client: Client, setup: Setup, dialogue: Dialogue, codec: str, parking: Parking, on_turn: Callable[[], None]
) -> tuple[str, tuple[Reply, ...]]:
    """Hold one dialogue, greedily; return its session's id and the replies. At the end all of it is in Redis."""
    session_id = (await client.create_session(codec=codec)).session_id
    replies: list[Reply] = []
    resumes = 0
    last = len(dialogue.turns) - 1
    for number, turn in enumerate(dialogue.turns):
        parked_tokens = None
        for again in reversed(range(parking.times(number, last))):
            parked_tokens = (await client.park_session(session_id, drop_host=True)).redis_tokens
            resumes += 1
            if again:
                await client.warm_session(session_id)
        generation = client.generate(
            [{"role": "user", "content": turn.user}],
            session_id=session_id,
            audit=parked_tokens is not None,
            max_new_tokens=setup.max_new_tokens,
            logprobs=0,
        )
        text = await generation.read()
        assert generation.receipt is not None
        logprobs = tuple(token.logprob for token in generation.logprobs)
        replies.append(Reply(text, tuple(generation.token_ids), logprobs, generation.receipt, resumes, parked_tokens))
        on_turn()
    await client.park_session(session_id)
    return session_id, tuple(replies)


async def _stored(client: Client, redis_url: str, codec: str, session_ids: Sequence[str]) -> Stored:
    """Measure the values of these sessions' blocks. One that several of them share counts once."""
    (worker,) = (await client.stats()).workers
    tokens_of: dict[str, int] = {}
    for session_id in session_ids:
        session = await client.get_session(session_id, with_token_ids=True)
        root = root_hash(bytes.fromhex(session.model), "default", fidelity_of(codec))
        for block in wanted_by_history(root, session.token_ids, worker.block_tokens):
            tokens_of[f"rekindle:b:{block.name.hex()}"] = block.content_tokens
    async with redis.asyncio.from_url(redis_url) as connection:
        lengths = [await connection.strlen(key) for key in tokens_of]
    token_bytes = worker.device.capacity_bytes // (worker.device.capacity_blocks * worker.block_tokens)
    kept = [
        (tokens, length - HEADER_BYTES) for tokens, length in zip(tokens_of.values(), lengths, strict=True) if length
    ]
    full = [payload_bytes for tokens, payload_bytes in kept if tokens == worker.block_tokens]
    return Stored(
        full_blocks=len(full),
        full_kv_bytes=len(full) * worker.block_tokens * token_bytes,
        full_payload_bytes=sum(full),
        kv_bytes=sum(tokens for tokens, _ in kept) * token_bytes,
        payload_bytes=sum(payload_bytes for _, payload_bytes in kept),
    )


def scrape(address: str) -> dict[str, float]:
    """A worker's metrics, by name and labels as Prometheus writes them: labels in alphabetical order."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
