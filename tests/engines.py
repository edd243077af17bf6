"""Engines for tests: small models, real tiers, and a way to run a turn and see all that came of it."""

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest

from worker.calls import PLAIN, Context, Event, Failed, Finished, GenerateCall, Receipt, Sampling, Token
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine as build_real_engine
from worker.engine.engine import Engine
from worker.ids import BlockId

TENANT = "tests"
_numbers = count()


@dataclass
class Stream:
    """The events of one request, as they come."""

    request_id: str
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)

    def next(self, timeout_s: float = 60.0) -> Event:
        return self.events.get(timeout=timeout_s)

    def result(self) -> "Turn":
        tokens: list[Token] = []
        while isinstance(event := self.next(), Token):
            tokens.append(event)
        if isinstance(event, Failed):
            raise event.error
        return Turn(tuple(token.token_id for token in tokens), tokens, event)


@dataclass(frozen=True)
class Turn:
    reply: tuple[int, ...]
    tokens: list[Token]
    finished: Finished

    @property
    def receipt(self) -> Receipt:
        return self.finished.receipt


def start(
    engine: Engine,
    history: Sequence[int],
    new: Sequence[int],
    *,
    max_new_tokens: int | None = 8,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
    begun: Sequence[int] = (),
    deadline_s: float | None = None,
    tenant: str = TENANT,
    codec: str = "raw",
    audit: bool = False,
    context: Context = PLAIN,
    insert_bounds: Sequence[int] = (),
    device_only: bool = False,
) -> Stream:
    stream = Stream(f"request-{next(_numbers)}")
    call = GenerateCall(
        request_id=stream.request_id,
        tenant=tenant,
        history=tuple(history),
        input=tuple(new),
        sampling=sampling or Sampling(),
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(stop_token_ids),
        eos_token_ids=frozenset(eos_token_ids),
        begun=tuple(begun),
        deadline_s=deadline_s,
        codec=codec,
        audit=audit,
        context=context,
        insert_bounds=tuple(insert_bounds),
        device_only=device_only,
    )
    engine.submit(call, stream.events.put)
    return stream


def generate(engine: Engine, history: Sequence[int], new: Sequence[int], **options: object) -> Turn:
    return start(engine, history, new, **options).result()  # type: ignore[arg-type]


def poison(engine: Engine) -> None:
    """Fill every block that nobody uses with NaN: a restore that did not happen must not pass by luck."""
    pool, kv_cache = engine._pool, engine._tiers.device
    free = [BlockId(block) for block in range(pool.num_blocks) if pool._free[block]]
    kv_cache.poison(free)


EngineFactory = Callable[..., Engine]


@pytest.fixture
def build_engine() -> Iterator[EngineFactory]:
    """Builds engines, and proves after the test that each one's blocks balance."""
    engines: list[Engine] = []

    def build(**settings: object) -> Engine:
        defaults: dict[str, object] = {
            "model": "preset:tiny",
            "block_tokens": 16,
            "device_cache_bytes": 16 << 20,
            "host_cache_bytes": 16 << 20,
            "redis_url": "",
            "cpu_threads": 1,
            "restore_plan": "load",  # what is computed is faster than any restore, in models as small as these
        }
        engine = build_real_engine(WorkerConfig(**{**defaults, **settings}))  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        if not engine._inbox.closed:  # by the test itself
            engine.check()
        engine.close()
