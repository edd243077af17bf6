"""`rekindle eval recall`: conversations whose facts lie as far back as is said, and what is reported of them."""

import json
import math
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from benchmarks.recall import evaluate
from benchmarks.recall_holding import Held
from benchmarks.recall_talks import LATER, SOON, facts, messages, pieces, place, place_pairs, talk
from models.dialogues import Act, rough_tokens

TOLD = facts("tests", singles=6, corrected=2)


def test_facts_are_about_different_subjects_and_the_corrected_ones_are_told_twice() -> None:
    assert [fact.is_corrected for fact in TOLD] == [False] * 6 + [True] * 2
    assert len({fact.subject for fact in TOLD}) == len(TOLD)
    for fact in TOLD:
        assert fact.question.answer is not None
        assert fact.question.answer in fact.told[-1].user
        assert fact.subject in fact.told[-1].reply


def test_facts_lie_at_least_as_far_back_as_is_said_and_no_window_further() -> None:
    placed = place(TOLD, (1, 4))
    one = talk(placed, windows=6, window_tokens=500, other_facts=0.5, seed="tests", measure=rough_tokens)
    for item in placed:
        at = one.turns.index(item.fact.told[-1])
        windows_back = sum(map(rough_tokens, one.turns[at:])) / 500
        assert item.windows <= windows_back < item.windows + 0.3


def test_a_correction_comes_after_what_it_corrects_and_nothing_else_tells_of_its_subject() -> None:
    placed = place(TOLD, (1, 2))
    one = talk(placed, windows=3, window_tokens=800, other_facts=1.0, seed="tests", measure=rough_tokens)
    for fact in TOLD:
        told = [turn for turn in one.turns if fact.subject in turn.reply]
        assert tuple(told) == fact.told
    assert any(turn.act is Act.TELL and turn not in [t for f in TOLD for t in f.told] for turn in one.turns)


def test_pieces_hold_all_turns_in_order_and_leave_the_last_reply_to_the_model() -> None:
    one = talk(place(TOLD, (0,)), windows=1, window_tokens=900, other_facts=0.0, seed="tests", measure=rough_tokens)
    parts = list(pieces(one.turns, 300, rough_tokens))
    assert tuple(turn for part in parts for turn in part) == one.turns
    assert all(sum(map(rough_tokens, part)) >= 300 for part in parts[:-1])
    said = messages(parts[0])
    assert [message["role"] for message in said] == ["user", "assistant"] * (len(parts[0]) - 1) + ["user"]
    assert said[-1]["content"] == parts[0][-1].user


def test_each_distance_is_paired_with_each_other_one() -> None:
    pairs = place_pairs(facts("tests", singles=24, corrected=0), (1, 4, 16, 64))
    distances = Counter(tuple(sorted(pair.windows)) for pair in pairs)
    assert distances == dict.fromkeys(combinations((1, 4, 16, 64), 2), 2)
    told = [one.fact for pair in pairs for one in (pair.first, pair.second)]
    assert len({fact.subject for fact in told}) == 24


def test_facts_of_one_distance_are_paired_with_each_other() -> None:
    assert {pair.windows for pair in place_pairs(TOLD[:6], (3,))} == {(3, 3)}


def test_a_pairs_messages_ask_both_questions_and_each_answer_once() -> None:
    [pair] = place_pairs(TOLD[:2], (1, 4))
    first, second = (fact.question for fact in TOLD[:2])
    asked = pair.questions
    assert [one.user for one in asked] == [f"{first.user} {second.user}", f"{second.user} {first.user}"]
    assert [one.reply for one in asked] == [second.reply, first.reply]


def test_what_was_right_before_a_correction_is_known_as_outdated() -> None:
    for fact in TOLD:
        if fact.is_corrected:
            before = fact.told[0].reply.removeprefix(f"Noted: {fact.subject}").removesuffix(".")
            assert before in fact.told[0].user
            assert fact.outdated == fact.question.reply.replace(f" {fact.question.answer}.", f" {before}.")
            assert fact.outdated != fact.question.reply
        else:
            assert fact.outdated is None


def test_a_correction_follows_soon_or_windows_later() -> None:
    placed = place(TOLD[6:], (1,), (SOON, LATER))
    one = talk(placed, windows=5, window_tokens=500, other_facts=0.0, seed="tests", measure=rough_tokens)
    for item, apart in zip(placed, (SOON, LATER), strict=True):
        first, last = (one.turns.index(turn) for turn in item.fact.told)
        between = sum(map(rough_tokens, one.turns[first:last])) / 500
        assert abs(between - apart) < 0.2


def test_accuracy_is_that_of_a_distance_or_of_corrected_facts() -> None:
    held = Held()
    held.right[1, False] += [True, True]
    held.right[4, True] += [False, True]
    held.outdated[4] += [True, False]
    assert (held.accuracy(), held.accuracy(4), held.accuracy(corrected=False)) == (0.75, 0.5, 1.0)
    assert held.outdated_share() == held.outdated_share(4) == 0.5
    assert math.isnan(held.outdated_share(1))


def test_pairs_are_counted_in_any_order() -> None:
    held = Held()
    held.pairs[1, 4] += [True]
    held.pairs[4, 1] += [False]
    held.pairs[1, 16] += [True]
    assert (held.pair_accuracy((1, 4)), held.pair_accuracy()) == (0.5, 2 / 3)


@pytest.mark.slow
def test_a_short_conversation_is_held_by_the_real_server_kept_in_codecs_and_judged() -> None:
    # In a process of its own: the command sets up the logs of the one that it runs in.
    options = {"window": 768, "windows": 1, "singles": 2, "corrected": 0, "pairs": 1}
    options |= {"turn-tokens": 400, "other-facts": 0, "window-s": 600}
    arguments = [*(f"--{name}={value}" for name, value in options.items()), "--codec", "lossless", "ladder"]
    command = [sys.executable, "-m", "rekindle", "eval", "recall", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    figures, holds = report["figures"], {bar["name"]: bar["holds"] for bar in report["bars"]}
    assert figures["inside the window"] >= 0.5
    assert figures["inside the window, pairs"] == 1.0
    assert figures["window, 1 windows back"] == figures["window, pairs"] == 0.0
    assert holds.keys() >= {"RECALL, 1 windows back", "RECALL, pairs", "WINDOW"}
    assert holds["lossless: replies as if never parked"]
    assert figures["lossless, MiB of KV from lossless"] > 0
    assert "ladder, 1 windows back (int8)" in figures
    assert figures["ladder, MiB of KV from int8"] > figures["ladder, MiB of KV from lossless"] > 0


def test_windows_of_no_length_are_refused() -> None:
    with pytest.raises(SystemExit, match="windows >= 1"):
        evaluate(windows=(0,))


def test_a_codec_that_there_is_not_is_refused() -> None:
    with pytest.raises(SystemExit, match="no codec 'zip'"):
        evaluate(codec=("raw", "zip"))
