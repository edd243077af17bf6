"""Where tokens stand beyond the window, what blocks are called there, and in which pieces a turn is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import InvalidRequest
from cache_store.ids import root_hash
from worker.attention.placing import Placer
from worker.calls import Context, ContextPolicy
from worker.engine.epochs import Beyond, Epochs, recall_epochs, window_epochs
from worker.engine.prefix import full_names
from worker.engine.stages import Stage, next_stage
from worker.tiers.codecs.rope import Rope

RECALL = Epochs(
    block_tokens=16,
    sink_tokens=64,
    recall_tokens=64,
    epoch_tokens=96,
    unit_tokens=16,
    asking_tokens=32,
    hearing_tokens=48,
)
WINDOW = replace(RECALL, recall_tokens=0)
ROOT = root_hash(b"model", "tenant")

turns = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 120)), min_size=1, max_size=8)


def bounds_of(turns: list[tuple[int, int]]) -> tuple[int, ...]:
    bounds, at = [], 0
    for num_input, num_reply in turns:
        bounds += [at, at + num_input]
        at += num_input + num_reply
    return tuple(bounds)


def stages_of(beyond: Beyond, start: int, end: int) -> list[tuple[int, Stage]]:
    stages = []
    while start < end:
        stage = next_stage(beyond, start, end)
        assert stage.end > start
        stages.append((start, stage))
        start = stage.end
    return stages


@pytest.mark.parametrize("epochs", [RECALL, WINDOW])
@given(st.integers(0, 5000))
def test_no_token_stands_beyond_the_reach_and_each_behind_what_it_sees(epochs: Epochs, position: int) -> None:
    epoch = epochs.epoch_of(position)
    assert epochs.start_of(epoch) <= position < epochs.end_of(epoch)
    assert 0 <= epochs.place_of(position) < epochs.reach
    if epoch:
        assert epochs.place_of(position) >= epochs.first_place
        carried, gone = epochs.carried(epoch), epochs.gone(epoch)
        assert carried.end == epochs.start_of(epoch)
        assert (gone.start, gone.end) == (epochs.sink_tokens, carried.start)
        assert gone.tokens >= epochs.recall_tokens
        places = [epochs.place_of(seen) - epochs.epoch_tokens for seen in range(*carried)]
        assert places == list(range(epochs.first_place - epochs.epoch_tokens, epochs.first_place))


@given(turns, st.data())
def test_a_turn_is_computed_in_the_same_pieces_wherever_one_begins(
    turns: list[tuple[int, int]], data: st.DataObject
) -> None:
    beyond, end = Beyond(RECALL, bounds_of(turns)), sum(map(sum, turns))
    whole = stages_of(beyond, 0, end)
    for start, stage in whole:
        assert RECALL.epoch_of(start) == RECALL.epoch_of(stage.end - 1)
        assert start < RECALL.reach or beyond.turn_at(start) == beyond.turn_at(stage.end - 1)
        assert not stage.asks or start >= RECALL.reach
    run = data.draw(st.sampled_from([turn.run for turn in beyond.turns if turn.run < end]))
    begun_there = stages_of(beyond, run, end)
    first = max(run, RECALL.reach)
    assert [piece for piece in begun_there if piece[0] >= first] == [piece for piece in whole if piece[0] >= first]


@given(turns)
def test_what_is_recalled_depends_on_its_own_turn_alone(turns: list[tuple[int, int]]) -> None:
    beyond, end = Beyond(RECALL, bounds_of(turns)), sum(map(sum, turns))
    seen: set[int] = set()
    for start, stage in stages_of(beyond, 0, end):
        if start < RECALL.reach:
            continue
        run = beyond.turn_at(start).run
        assert stage.forgets == (run not in seen)
        seen.add(run)


def test_a_question_is_run_twice_and_each_token_of_a_reply_where_it_asks() -> None:
    beyond = Beyond(RECALL, (0, 400, 420, 470))
    stages = stages_of(beyond, 419, 474)
    assert stages[:2] == [(419, Stage(438, forgets=True)), (438, Stage(470, asks=True))]  # shorter than 48: not heard
    assert stages[2:] == [(at, Stage(at + 1, asks=True, is_reply=True)) for at in range(470, 474)]


def test_a_long_input_recalls_as_it_goes() -> None:
    beyond = Beyond(RECALL, (0, 400, 430, 700))  # epochs begin at 416, 512, 608
    stages = [(start, stage.end, stage.hears) for start, stage in stages_of(beyond, 429, 700)]
    assert stages == [
        (429, 477, True),
        (477, 512, False),
        (512, 560, True),
        (560, 608, True),
        (608, 656, True),
        (656, 668, False),
        (668, 700, False),
    ]


def test_names_are_those_of_any_conversation_up_to_the_reach() -> None:
    tokens = list(range(800))
    plain = full_names(ROOT, tokens, 16)
    window, recall = (full_names(ROOT, tokens, 16, Beyond(epochs, (0, 700))) for epochs in (WINDOW, RECALL))
    assert window[: WINDOW.reach // 16] == plain[: WINDOW.reach // 16]
    assert recall[: RECALL.reach // 16] == plain[: RECALL.reach // 16]
    assert not set(window[WINDOW.reach // 16 :]) & set(plain)
    assert not set(recall[RECALL.reach // 16 :]) & {*plain, *window}


def test_names_depend_on_where_turns_begin_where_kv_does() -> None:
    tokens = list(range(800))

    def names(epochs: Epochs, *bounds: int) -> list[bytes]:
        return list(full_names(ROOT, tokens, 16, Beyond(epochs, bounds)))

    assert names(WINDOW, 0, 500) == names(WINDOW, 0, 600)
    one, other = names(RECALL, 0, 500), names(RECALL, 0, 600)
    assert one[:29] == other[:29]  # a question's last 32 tokens are computed with what all of them asked for
    assert not set(one[29:]) & set(other)
    assert names(RECALL, 0, 600, 700, 710)[:43] == other[:43]  # what comes later changes nothing before it
    assert names(RECALL, 0, 200)[20:] == names(RECALL, 0, 300)[20:]  # nor does what was within the window


def test_a_full_block_keeps_its_name_when_the_next_turn_begins_right_behind_it() -> None:
    tokens = list(range(480))
    before, after = Beyond(RECALL, (0, 400)), Beyond(RECALL, (0, 400, 481, 490))
    assert full_names(ROOT, tokens, 16, before) == full_names(ROOT, tokens, 16, after)


def test_a_block_of_an_asking_group_is_named_by_all_of_it_and_none_before_it_is() -> None:
    tokens = list(range(520))  # reach 320, epochs of 96; the group is the last 32 tokens of the input: 468 to 500
    beyond = Beyond(RECALL, (0, 300, 330, 500))
    names = full_names(ROOT, tokens, 16, beyond)
    other_end = full_names(ROOT, [*tokens[:499], 7, *tokens[500:]], 16, beyond)
    assert other_end[:29] == names[:29]
    assert not set(other_end[29:]) & set(names)
    longer = full_names(ROOT, tokens, 16, Beyond(RECALL, (0, 300, 330, 501)))
    assert longer[:29] == names[:29]
    assert not set(longer[29:]) & set(names)
    behind = full_names(ROOT, [*tokens[:500], 7, *tokens[501:]], 16, beyond)
    assert behind[:31] == names[:31]  # what a reply says is behind all that its question saw


def test_names_say_whether_the_window_ends_in_a_question_or_in_a_reply() -> None:
    tokens = list(range(360))
    asked, said = (full_names(ROOT, tokens, 16, Beyond(RECALL, (0, reply))) for reply in (360, 319))
    assert asked[:20] == said[:20]
    assert not set(asked[20:]) & set(said)
    sooner = full_names(ROOT, tokens, 16, Beyond(RECALL, (0, 5, 100, 200)))
    assert sooner == said  # where in the window it began says nothing


def test_names_depend_on_the_numbers_by_which_is_chosen() -> None:
    tokens = list(range(360))
    one, other = (
        full_names(ROOT, tokens, 16, Beyond(replace(RECALL, chosen_by=(share, 12)), (0, 319))) for share in (0.02, 0.03)
    )
    assert one[:20] == other[:20]
    assert not set(one[20:]) & set(other)


@given(turns, st.integers(0, 1500))
def test_names_are_shared_exactly_where_all_that_was_seen_is_the_same(turns: list[tuple[int, int]], at: int) -> None:
    beyond, end = Beyond(RECALL, bounds_of(turns)), sum(map(sum, turns))
    at = min(at, end - 1)
    tokens = list(range(end))
    names = full_names(ROOT, tokens, 16, beyond)
    others = full_names(ROOT, [*tokens[:at], end, *tokens[at + 1 :]], 16, beyond)
    start, stage = next(piece for piece in stages_of(beyond, 0, end) if at < piece[1].end)
    num_alike = (start if stage.asks else at) // 16
    assert names[:num_alike] == others[:num_alike]
    assert not set(names[num_alike:]) & set(others)


def test_epochs_take_what_positions_there_are() -> None:
    recall = recall_epochs(2048, 256, 512, unit=16, asking=64, hearing=256)
    assert recall is not None
    assert (recall.sink_tokens, recall.recall_tokens, recall.epoch_tokens) == (256, 512, 512)
    assert recall.reach <= 2048
    assert window_epochs(100, 16) == Epochs(block_tokens=16, sink_tokens=64, recall_tokens=0, epoch_tokens=16)
    assert window_epochs(90, 16) is None
    assert recall_epochs(200, 16, 100, unit=16, asking=64, hearing=256) is None


@pytest.mark.parametrize("bounds", [(0,), (1, 5), (0, 5, 4, 8), (0, 50), ()])
def test_bounds_that_are_none_of_the_history_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="turn_bounds"):
        Context(ContextPolicy.RECALL, bounds).check(20)
    Context(ContextPolicy.WINDOW, bounds).check(20)


@given(st.lists(st.integers(0, 4000), min_size=4, max_size=4), st.integers(-3000, 3000))
def test_keys_placed_elsewhere_are_those_that_the_model_would_have_made_there(places: list[int], by: int) -> None:
    rope = Rope(1.0 / 10000.0 ** (np.arange(0, 8, 2) / 8))
    generator = torch.Generator().manual_seed(1)
    free = torch.randn(2, 3, 4, 8, generator=generator)  # layers, heads, tokens, head_dim
    pool = torch.zeros(2, 2, 3, 16, 8)
    turned = free.clone()
    rope.turns(np.array(places), turned.device).apply(turned)
    pool[:, 0, :, 4:8], pool[:, 1, :, 4:8] = turned, free
    placer = Placer(pool, rope)
    placer.place(np.arange(4, 8), np.array([9, 1, 15, 2]), by)
    wanted = free.clone()
    rope.turns(np.array(places) + by, wanted.device).apply(wanted)
    torch.testing.assert_close(pool[:, 0][:, :, [9, 1, 15, 2]], wanted, atol=2e-6, rtol=0)
    assert torch.equal(pool[:, 1][:, :, [9, 1, 15, 2]], free)
    torch.testing.assert_close(placer.unturned(np.arange(4, 8), np.array(places)), free, atol=2e-6, rtol=0)
