"""Every architecture, over several turns: the same tokens as transformers' own `generate`, parked in between or not,
alone and in a busy batch."""

from itertools import count
from pathlib import Path

import pytest

from tests import tiny_models
from tests.engines import TENANT, EngineFactory, generate, poison, start
from worker.engine.engine import Engine

TURNS = 3
NEW_TOKENS = 14


def inputs() -> list[list[int]]:
    """Of odd lengths, so that turns begin and end inside blocks, and longer together than any tiny sliding window."""
    return [[(7 * turn + 3 * place) % 300 + 5 for place in range(length)] for turn, length in enumerate((37, 11, 22))]


def expected(architecture: str) -> list[tuple[int, ...]]:
    model = tiny_models.tiny_model(architecture)
    history: list[int] = []
    replies = []
    for new in inputs():
        history += new
        reply = tiny_models.generate(model, history, NEW_TOKENS)
        history += reply
        replies.append(tuple(reply))
    return replies


@pytest.fixture(params=tiny_models.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def converse(engine: Engine, *, park: str = "", tenant: str = TENANT) -> list[tuple[int, ...]]:
    history: tuple[int, ...] = ()
    replies = []
    for number, new in enumerate(inputs()):
        turn = generate(engine, history, new, max_new_tokens=NEW_TOKENS, tenant=tenant)
        if number and park:
            source = turn.receipt.redis_tokens if park == "redis" else turn.receipt.host_tokens
            assert source == len(history) - 1
        history = (*history, *new, *turn.reply)
        replies.append(turn.reply)
        if park:
            engine.park(tenant, history, drop_host=park == "redis", ttl_s=60).result(30)
            poison(engine)
    return replies


def test_turns_give_what_transformers_generates(
    architecture: str, tmp_path: Path, build_engine: EngineFactory, redis_url: str
) -> None:
    checkpoint = tiny_models.save_tiny_model(tmp_path / architecture, architecture)
    wanted = expected(architecture)
    engine = build_engine(
        model=str(checkpoint), redis_url=redis_url, max_step_tokens=24, max_prefill_tokens=24, max_running=16
    )
    assert converse(engine, tenant="hot") == wanted
    assert converse(engine, park="host", tenant="to host") == wanted
    assert converse(engine, park="redis", tenant="to redis") == wanted
    numbers = count(5)
    noise = [
        start(engine, (), [next(numbers) % 300 for _ in range(20 + 9 * n)], max_new_tokens=40 + 20 * n)
        for n in range(5)
    ]
    assert converse(engine, tenant="in a busy batch") == wanted
    for stream in noise:
        stream.result()
