"""Names of sessions' blocks that front ends keep."""

from cache_store.ids import full_block_hashes, root_hash
from server.block_names import BlockNames

ROOT = root_hash(b"model", "tenant")
TOKENS = list(range(100))


def right(num_tokens: int) -> list[bytes]:
    return list(full_block_hashes(ROOT, TOKENS[:num_tokens], 16))


def test_a_history_that_grew_or_was_cut_has_the_names_of_its_full_blocks() -> None:
    names = BlockNames(16)
    for num_tokens in (40, 100, 15, 64):
        assert names.of(TOKENS[:num_tokens], ROOT, "session") == right(num_tokens)
    assert len(names) == 4


def test_names_are_kept_of_the_sessions_that_came_last_and_never_more_than_may_be() -> None:
    names = BlockNames(16, most_names=10)
    for session in ("a", "b", "a", "c"):  # four each: there is room for two
        assert names.of(TOKENS[:64], ROOT, session) == right(64)
    assert len(names) == 8
    assert names.of(TOKENS, ROOT, None) == right(100)
    assert len(names) == 8
    assert names.of(TOKENS[::-1][:64], ROOT, "a") == right(64)  # kept: not made again
    assert names.of(TOKENS[:64], ROOT, "b") == right(64)
    assert len(names) == 8


def test_a_session_with_more_blocks_than_may_be_kept_is_named_all_the_same() -> None:
    names = BlockNames(16, most_names=3)
    assert names.of(TOKENS, ROOT, "long") == right(100)
    assert len(names) == 0
