"""What runs in a step, which blocks a prompt can use, and why a token was computed."""

from hypothesis import given
from hypothesis import strategies as st

from cache_store.ids import chain, root_hash
from worker.calls import MissReason
from worker.engine.plan import Span, complement, plan_step, subtract
from worker.engine.prefix import full_names, wanted_by_history, wanted_by_prompt
from worker.engine.receipts import why_missed
from worker.tiers.moves import Tier

ROOT = root_hash(b"model", "tenant")


def test_decoding_goes_on_while_prompts_share_what_is_left() -> None:
    planned = plan_step(3, [[Span(0, 10)], [Span(4, 6), Span(8, 20)], [Span(0, 5)]], 17)
    assert planned == [[Span(0, 10)], [Span(4, 6), Span(8, 10)], []]


def test_a_step_full_of_decoding_runs_no_prompt() -> None:
    assert plan_step(4, [[Span(0, 9)]], 4) == [[]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8), st.integers(1, 30))
def test_planned_spans_and_what_remains_are_the_gaps(sizes: list[tuple[int, int]], budget: int) -> None:
    gaps, at = [], 0
    for hole, length in sizes:
        gaps.append(Span(at + hole, at + hole + length))
        at += hole + length
    (spans,) = plan_step(0, [gaps], budget)
    rest = subtract(gaps, spans)
    assert sum(span.tokens for span in spans) <= budget
    assert {p for g in gaps for p in range(*g)} == {p for s in [*spans, *rest] for p in range(*s)}
    assert complement(complement(gaps, at + 1), at + 1) == gaps


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    tokens = list(range(32))
    wanted = wanted_by_prompt(ROOT, full_names(ROOT, tokens, 16), tokens, 0, 16)
    assert [(want.index, want.offers) for want in wanted] == [(0, 16), (1, 15)]


def test_a_turn_looks_for_the_unfull_block_that_its_history_ended_with() -> None:
    history = list(range(40))
    tokens = [*history, *range(100, 130)]
    wanted = wanted_by_prompt(ROOT, full_names(ROOT, tokens, 16), tokens, len(history), 16)
    tail = wanted[2]
    assert (tail.index, tail.content_tokens, tail.offers) == (2, 7, 7)
    assert tail.name == chain(wanted[1].name, history[32:39])
    assert wanted[:3] == wanted_by_history(ROOT, history, 16)
    assert len(wanted) == 4


def test_names_follow_from_tokens_before_them_from_the_model_and_from_the_tenant() -> None:
    tokens = list(range(48))
    names = full_names(ROOT, tokens, 16)
    assert names == full_names(ROOT, tokens, 16)
    assert names[0] != names[1]
    assert full_names(ROOT, [1, *tokens[1:]], 16)[2] != names[2]
    assert full_names(root_hash(b"model", "another"), tokens, 16)[0] != names[0]
    assert full_names(root_hash(b"another", "tenant"), tokens, 16)[0] != names[0]
    assert chain(names[0], tokens[:8]) != chain(names[0], tokens[:9])


def test_where_model_and_tenant_meet_is_part_of_the_name() -> None:
    assert root_hash(b"ab", "c") != root_hash(b"a", "bc")


def test_every_computed_token_has_a_reason() -> None:
    assert why_missed(MissReason.ABSENT, 5, 0) is MissReason.NEW
    assert why_missed(Tier.DEVICE, 15, 0) is MissReason.TAIL
    assert why_missed(MissReason.ABSENT, 5, 10) is MissReason.ABSENT
    assert why_missed(MissReason.CORRUPT, 5, 10) is MissReason.CORRUPT
    assert why_missed(MissReason.ABSENT, 9, 10) is MissReason.TAIL
    assert why_missed(MissReason.UNAVAILABLE, 10, 10) is MissReason.NEW


def test_a_history_that_ends_with_a_block_has_that_block_but_for_its_last_token() -> None:
    wanted = wanted_by_history(ROOT, list(range(32)), 16)
    assert [(want.index, want.content_tokens) for want in wanted] == [(0, 16), (1, 15)]
    assert wanted_by_history(ROOT, list(range(33)), 16) == [
        *wanted[:1],
        *wanted_by_prompt(ROOT, full_names(ROOT, list(range(33)), 16), list(range(33)), 33, 16)[1:],
    ]
