"""Hold a conversation whose blocks are kept in a codec, and ask for what was told once Redis alone has it.

What is asked for is recalled by another worker than the one that was told: nothing of it is left on a device or in host
memory, and what represents it there is made from what comes back. Judges nothing.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import redis.asyncio

from benchmarks.fidelity_arms import scrape, system
from benchmarks.recall_holding import Held, Holder, Setup
from cache_store.codecs import LADDER, fidelity_of
from cache_store.embedded_redis import RedisServer
from cache_store.ids import BlockHash, root_hash
from cache_store.ladder import parse_ladder
from cache_store.open_records import open_records
from cache_store.records import SessionRecord
from rekindle.client import Client
from worker.calls import ContextPolicy
from worker.config import WorkerConfig
from worker.engine.context_policies import policy_epochs
from worker.engine.epochs import Beyond
from worker.engine.prefix import full_names

_AGED_WITHIN_S: Final = 600.0
_LOOK_EVERY_S: Final = 0.5
_TENANT: Final = "default"
_RESTORED: Final = re.compile(r'rekindle_moved_raw_bytes_total\{codec="(\w+)",source="redis",target="host"\}')
_AGED: Final = re.compile(r'rekindle_aged_blocks_total\{source="\w+",target="(\w+)"\}')
_MAKE_IDLE: Final = """
local ttl_ms = math.max(redis.call('PTTL', KEYS[1]), 0)
redis.call('RESTORE', KEYS[1], ttl_ms, redis.call('DUMP', KEYS[1]), 'REPLACE', 'IDLETIME', ARGV[1])"""


@dataclass(slots=True)
class Kept:
    """A conversation that was told, parked, and asked for elsewhere."""

    codec: str
    """The session's."""
    at: dict[int, str]
    """The codec that blocks are in when they are asked for, by how many windows they are back."""
    held: Held = field(default_factory=Held)
    restored: Counter[str] = field(default_factory=Counter)
    """Bytes of KV, as a device has it, that came from Redis while it was asked, by the codec that they came in."""


async def keep(setup: Setup, config: WorkerConfig, codec: str, *, window_s: int, on_turn: Callable[[], None]) -> Kept:
    """Hold `setup`'s conversation in a session of this codec. A window of it is said to have taken `window_s`: a ladder
    session's blocks are as old as that makes them, and have moved down, before anything is asked.

    Raises RekindleError, ServingError, OSError, TimeoutError.
    """
    ladder = parse_ladder(config.codec_ladder)
    kept = Kept(codec, {one: ladder.due(one * window_s).name if codec == LADDER else codec for one in setup.windows})
    holder = Holder(setup, setup.beyond(), kept.held, on_turn)
    with RedisServer() as server:
        config = replace(config, restore_plan="load")
        born = replace(config, codec_ladder=ladder.first.name)  # leaves ageing to the other worker
        async with system(born, server.url) as (client, _, _):
            session_id = (await client.create_session(context_policy="recall", codec=codec)).session_id
            await holder.tell(client, session_id)
            await _park(client, session_id)
        due = await _make_old(server.url, config, session_id, window_s) if codec == LADDER else Counter[str]()
        async with system(config, server.url) as (client, _, metrics_address):
            await _aged(metrics_address, due)
            await holder.ask(client, session_id)
            kept.restored = await _counted(metrics_address, _RESTORED)
    return kept


async def _park(client: Client, session_id: str) -> None:
    parked = await client.park_session(session_id, drop_host=True)
    num_tokens = (await client.get_session(session_id)).num_tokens
    if parked.redis_tokens != num_tokens - 1:  # the last one was never run
        raise RuntimeError(f"Redis has {parked.redis_tokens} of {num_tokens} tokens")


async def _make_old(redis_url: str, config: WorkerConfig, session_id: str, window_s: int) -> Counter[str]:
    """As if nobody had read a block since its window was talked of. Returns how many blocks each codec is due."""
    ladder = parse_ladder(config.codec_ladder)
    records = open_records(redis_url)
    try:
        record = await records.get(_TENANT, session_id)
    finally:
        await records.aclose()
    names = _names(record, config)
    due: Counter[str] = Counter()
    async with redis.asyncio.from_url(redis_url) as connection:
        for index, name in enumerate(names):
            windows_back = (record.num_tokens - index * config.block_tokens) // config.context_tokens
            idle_s = windows_back * window_s
            await connection.eval(_MAKE_IDLE, 1, f"rekindle:b:{name.hex()}", str(idle_s))
            due[ladder.due(idle_s).name] += 1
    del due[ladder.first.name]
    return due


def _names(record: SessionRecord, config: WorkerConfig) -> Sequence[BlockHash]:
    """Of a session's full blocks."""
    epochs = policy_epochs(config.context_tokens, config.block_tokens, config.recall_tokens)[ContextPolicy.RECALL]
    bounds = tuple(bound for turn in record.turns for bound in (turn.start, turn.reply_start))
    root = root_hash(bytes.fromhex(record.model), record.tenant, fidelity_of(record.codec))
    names = full_names(root, record.token_ids, config.block_tokens, Beyond(epochs, bounds))
    return names[: (record.num_tokens - 1) // config.block_tokens]


async def _aged(metrics_address: str, due: Counter[str]) -> None:
    """Wait until as many blocks as are due have moved to each codec."""
    give_up_s = time.monotonic() + _AGED_WITHIN_S
    while (aged := await _counted(metrics_address, _AGED)) != due:
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"blocks moved to {dict(aged)} within {_AGED_WITHIN_S:g} s, not to {dict(due)}")
        await asyncio.sleep(_LOOK_EVERY_S)


async def _counted(metrics_address: str, pattern: re.Pattern[str]) -> Counter[str]:
    """A worker's metric, by the codec that `pattern` names, over all its other labels."""
    counted: Counter[str] = Counter()
    for name, value in (await asyncio.to_thread(scrape, metrics_address)).items():
        if found := pattern.fullmatch(name):
            counted[found[1]] += int(value)
    return counted
