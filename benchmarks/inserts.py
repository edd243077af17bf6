"""What inserting KV that was computed by itself is worth: time to the first token, and whether answers are as right."""

import queue
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks.harness import at_least, at_most, finish, interleaved, medians
from cache_store.embedded_redis import RedisServer
from models.dialogues import Act, Dialogue, exact, held_out
from models.encoding import encode
from worker.calls import Event, Failed, Finished, GenerateCall, Receipt, Sampling, Token
from worker.config import WorkerConfig
from worker.engine.build_engine import build_engine
from worker.engine.engine import Engine
from worker.model.shipped import locate

_TENANT: Final = "bench"
_TTL_S: Final = 3600
_UNLIKE: Final = 16
"""Tokens that each round begins with, so that it finds nothing of the rounds before."""
_ANSWER_TOKENS: Final = 40
_DIALOGUE_TOKENS: Final = 1900


def run(
    *,
    preset: str = "qwen3-0.6b",
    inserts: int = 8,
    insert_tokens: int = 250,
    question_tokens: int = 32,
    rounds: int = 5,
    dialogues: int = 40,
    piece_tokens: int = 180,
    as_json: bool = False,
) -> int:
    """Time the first token of a question behind recalled texts whose KV is inserted, and of one that computes it.

    Then ask the recall model what was told in dialogues, with and without inserting them in pieces.

    Args:
        preset: Shape of the model that is timed (random weights).
        inserts: Texts that the question recalls.
        insert_tokens: Length of each.
        question_tokens: Length of the question.
        rounds: Counted rounds of each side.
        dialogues: Of about 1,900 tokens each, with words that the recall model was not trained on.
        piece_tokens: Least length of their pieces, which are whole turns.
        as_json: Print one JSON object.
    """
    with RedisServer() as redis:
        engine = build_engine(WorkerConfig(model=f"preset:{preset}", redis_url=redis.url))
        try:
            timed = interleaved(
                _sides(engine, inserts, insert_tokens, question_tokens), rounds=rounds, quiet=as_json, title="inserts"
            )
        finally:
            engine.close()
    asked = _ask(dialogues, piece_tokens, quiet=as_json)
    typical, right = medians(timed), {side: statistics.mean(hits) for side, hits in asked.items()}
    faster = {tier: typical["computed_ms"] / typical[f"{tier}_ms"] for tier in ("redis", "host", "device")}
    return finish(
        "inserts",
        {
            **typical,
            **{f"faster_from_{tier}": ratio for tier, ratio in faster.items()},
            **{f"right_{side}": share for side, share in right.items()},
            "questions": len(asked["computed"]),
            "rounds": timed,
        },
        [
            at_least("times faster, from Redis", faster["redis"], 5),
            at_most("points of right answers lost", 100 * (right["computed"] - right["inserted"]), 2),
        ],
        as_json=as_json,
    )


def _sides(engine: Engine, inserts: int, insert_tokens: int, question_tokens: int) -> dict[str, Callable[[], float]]:
    """Milliseconds to the first token, from where the inserts' KV is."""
    draw = np.random.default_rng(0)

    def words(num: int) -> list[int]:
        drawn: list[int] = draw.integers(5, engine.vocab_size, num).tolist()
        return drawn

    texts = [words(insert_tokens) for _ in range(inserts)]
    said = [_say(engine, (), text, 1)[0] for text in texts]

    def first_token_ms(*, inserted: bool) -> float:
        tokens, bounds = words(_UNLIKE), list[int]()
        for text in texts:
            bounds += [len(tokens), len(tokens) + len(text)]
            tokens += [*text, 7]
        tokens += words(question_tokens)
        _, receipt = _say(engine, (), tokens, 1, bounds if inserted else ())
        assert len(receipt.insert_bounds) == (2 * inserts if inserted else 0), "it was not inserted"
        return receipt.ttft_ms

    def parked(*, drop_host: bool) -> float:
        for text, reply in zip(texts, said, strict=True):
            engine.park(_TENANT, (*text, *reply), drop_host=drop_host, ttl_s=_TTL_S).result(60)
        return first_token_ms(inserted=True)

    return {
        "computed_ms": lambda: first_token_ms(inserted=False),
        "redis_ms": lambda: parked(drop_host=True),
        "host_ms": lambda: parked(drop_host=False),
        "device_ms": lambda: first_token_ms(inserted=True),
    }


def _ask(dialogues: int, piece_tokens: int, *, quiet: bool) -> dict[str, list[bool]]:
    """Whether each question of held-out dialogues is answered word for word, with what was said before it computed as
    one prompt, and inserted in pieces."""
    tokenizer = AutoTokenizer.from_pretrained(locate("rekindle-recall"))
    right: dict[str, list[bool]] = {"computed": [], "inserted": []}
    engine = build_engine(WorkerConfig(model="rekindle-recall", redis_url="", cpu_threads=1))
    try:
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
            for talk in progress.track(held_out(dialogues, seed=7, max_tokens=_DIALOGUE_TOKENS), description="asking"):
                for turn, tokens, bounds in _questions(tokenizer, talk, piece_tokens):
                    for start, end in zip(bounds[0::2], bounds[1::2], strict=True):
                        _say(engine, (), tokens[start:end], 1)
                    for side, inserted in (("computed", ()), ("inserted", bounds)):
                        reply, receipt = _say(engine, (), tokens, _ANSWER_TOKENS, inserted, tokenizer.eos_token_id)
                        assert receipt.insert_bounds == tuple(inserted), "it was not inserted"
                        right[side].append(exact(tokenizer.decode(reply, skip_special_tokens=True), turn))
    finally:
        engine.close()
    return right


def _questions(tokenizer: Any, talk: Dialogue, piece_tokens: int) -> Iterator[tuple[Any, list[int], tuple[int, ...]]]:
    """Each question, all tokens up to its answer, and where the pieces of what was said before are among them."""
    tokens, bounds, begun = [tokenizer.bos_token_id], list[int](), 1
    for turn, prompt, reply in encode(tokenizer, talk):
        if turn.act is Act.ASK and bounds:
            yield turn, [*tokens, *prompt], tuple(bounds)
        tokens += [*prompt, *reply]
        if len(tokens) - begun >= piece_tokens:
            bounds += [begun, len(tokens)]
            begun = len(tokens)


_numbers = count()


def _say(
    engine: Engine,
    history: Sequence[int],
    tokens: Sequence[int],
    num_tokens: int,
    bounds: Sequence[int] = (),
    eos_token_id: int | None = None,
) -> tuple[tuple[int, ...], Receipt]:
    """A greedy turn's reply and receipt."""
    events: queue.Queue[Event] = queue.Queue()
    call = GenerateCall(
        request_id=f"inserts-{next(_numbers)}",
        tenant=_TENANT,
        history=tuple(history),
        input=tuple(tokens),
        sampling=Sampling(),
        max_new_tokens=num_tokens,
        eos_token_ids=frozenset() if eos_token_id is None else frozenset([eos_token_id]),
        insert_bounds=tuple(bounds),
    )
    engine.submit(call, events.put)
    reply: list[int] = []
    while True:
        event = events.get(timeout=300)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return tuple(reply), event.receipt
        assert isinstance(event, Token)
        reply.append(event.token_id)
