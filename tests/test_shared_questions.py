"""A question that is asked several times at once is embedded once, whoever gives up waiting."""

import asyncio
from collections.abc import Sequence
from typing import Any

from server.banks.shared_questions import SharedQuestions
from server.embedding import Embedded
from server.errors import NoWorker
from tests.fake_embedding import FakeEmbedding


class SlowEmbedding(FakeEmbedding):
    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.given_up = 0

    async def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return await super().embed(texts, **options)


def asking(shared: SharedQuestions, *texts: str, **options: Any) -> "asyncio.Task[Embedded]":
    return asyncio.create_task(shared.embed(texts, is_query=True, **options))


async def test_equal_questions_are_embedded_once_and_others_each() -> None:
    slow = SlowEmbedding()
    shared = SharedQuestions(slow)
    tasks = [asking(shared, "who"), asking(shared, "who"), asking(shared, "where"), asking(shared, "who", prefer="x")]
    await asyncio.sleep(0)
    slow.go.set()
    first, second, other, _ = await asyncio.gather(*tasks)
    assert first is second
    assert other is not first
    assert sorted(slow.texts) == ["where", "who", "who"]
    await asking(shared, "who")
    assert len(slow.texts) == 4, "it is no cache"


async def test_who_gives_up_leaves_the_answer_to_the_others_and_the_last_one_ends_it() -> None:
    slow = SlowEmbedding()
    shared = SharedQuestions(slow)
    first, second = asking(shared, "who"), asking(shared, "who")
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert slow.given_up == 0
    slow.go.set()
    assert (await second).texts
    slow.go.clear()
    third = asking(shared, "who")
    await asyncio.sleep(0.01)
    third.cancel()
    await asyncio.sleep(0.01)
    assert slow.given_up == 1


async def test_all_hear_of_a_failure_and_texts_are_passed_on() -> None:
    slow = SlowEmbedding()
    slow.go.set()
    shared = SharedQuestions(slow)
    slow.error = NoWorker("none")
    answers = await asyncio.gather(asking(shared, "who"), asking(shared, "who"), return_exceptions=True)
    assert [type(answer) for answer in answers] == [NoWorker, NoWorker]
    slow.error = None
    assert len((await shared.embed(["one two three"], chunk_tokens=1)).texts[0]) == 3
