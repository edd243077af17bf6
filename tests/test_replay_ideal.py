"""What caches would hit of a trace: by Belady and by LRU, against plainer simulations and all there is."""

from functools import cache
from random import Random

import pytest

from benchmarks.replay_ideal import Access, access, belady_hits, distinct_blocks, ideal, lru_hits
from cache_store.ids import BlockHash


def names(text: str) -> list[BlockHash]:
    return [BlockHash(letter.encode()) for letter in text]


def reads(*texts: str, num_own: int = 0) -> list[Access]:
    return [Access(names(text), last_offers=4, num_own=num_own) for text in texts]


def most_hits(order: str, capacity: int) -> int:
    """By trying everything that a cache could keep after each access."""

    @cache
    def best(at: int, kept: frozenset[str]) -> int:
        if at == len(order):
            return 0
        block = order[at]
        options = {kept} | {kept - {other} | {block} for other in kept}
        if len(kept) < capacity:
            options = {kept | {block}}
        return (block in kept) + max(best(at + 1, option) for option in options)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(30))
def test_beladys_hits_are_the_most_there_can_be(seed: int) -> None:
    random = Random(seed)
    texts = ["".join(random.sample("abcdefg", random.randint(1, 4))) for _ in range(8)]
    for capacity in (1, 2, 3, 5):
        assert belady_hits(reads(*texts), capacity) == most_hits("".join(texts), capacity)


def test_belady_keeps_what_lru_loses() -> None:
    cycling = reads(*"abcabcabc")
    assert sum(map(sum, lru_hits(cycling, 2))) == 0
    assert belady_hits(cycling, 2) == 4
    assert belady_hits(cycling, 0) == 0


def test_replies_take_room_in_an_lru_cache_and_leaves_go_first() -> None:
    assert lru_hits(reads("abc", "abc"), 3)[1] == [True, True, True]
    assert lru_hits(reads("abc", "abc", num_own=1), 3)[1] == [True, True, True]  # the reply's block goes before them
    assert lru_hits(reads("abc", "de", "abc", num_own=1), 4)[2] == [True, False, False]


def test_a_prompts_last_token_is_never_had_and_its_reply_has_blocks_of_its_own() -> None:
    assert access(range(9), 1, 4)[1:] == (4, 1)  # the ninth token lies in a block that the prompt does not fill
    assert access(range(8), 1, 4)[1:] == (3, 0)
    assert access(range(8), 5, 4)[1:] == (3, 1)
    assert access(range(8), 6, 4)[1:] == (3, 2)
    assert access(range(3), 2, 4)[::2] == ([], 1)
    assert access(range(8), 1, 4).names == access(range(9), 1, 4).names


def test_tokens_are_counted_as_a_receipt_counts_them() -> None:
    twice = [access(range(8), 2, 4), access(range(8), 2, 4), access(range(20, 27), 2, 4), access(range(3), 2, 4)]
    assert distinct_blocks(twice) == 3
    found = ideal(twice, prompt_tokens=26, block_tokens=4, capacity_blocks=10)
    assert (found.infinite, found.best, found.lru) == (7, 7, 7)
    found = ideal(twice, prompt_tokens=26, block_tokens=4, capacity_blocks=1)
    assert (found.infinite, found.best, found.lru) == (7, 4, 4)
    found = ideal(twice, prompt_tokens=26, block_tokens=4, capacity_blocks=0)
    assert (found.infinite, found.best, found.lru) == (7, 0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_no_cache_beats_a_larger_one_nor_lru_the_best(seed: int) -> None:
    random = Random(seed)
    prompts = [[random.randrange(2) for _ in range(random.randint(1, 40))] for _ in range(60)]
    accesses = [access(prompt, 3, 4) for prompt in prompts]
    found = [
        ideal(accesses, prompt_tokens=sum(map(len, prompts)), block_tokens=4, capacity_blocks=capacity)
        for capacity in (1, 4, 16, 64, 1000)
    ]
    assert all(one.lru <= one.best <= one.infinite < one.prompt_tokens for one in found)
    assert [one.best for one in found] == sorted(one.best for one in found)
    assert found[-1].lru == found[-1].best == found[-1].infinite > 0
