"""`rekindle eval recall`: conversations whose facts lie as far back as is said, and what is reported of them."""

import json
import subprocess
import sys

import pytest

from benchmarks.recall import Held, evaluate
from benchmarks.recall_talks import facts, messages, pieces, place, talk
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


def test_accuracy_is_that_of_a_distance_or_of_corrected_facts() -> None:
    held = Held()
    held.right[1, False] += [True, True]
    held.right[4, True] += [False, True]
    assert (held.accuracy(), held.accuracy(4), held.accuracy(corrected=False)) == (0.75, 0.5, 1.0)


def test_a_short_conversation_is_held_by_the_real_server_and_judged() -> None:
    # In a process of its own: the command sets up the logs of the one that it runs in.
    options = {"window": 768, "windows": 1, "singles": 2, "corrected": 0, "turn-tokens": 400, "other-facts": 0.0}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "rekindle", "eval", "recall", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["figures"]["inside the window"] >= 0.5
    assert report["figures"]["window, 1 windows back"] == 0.0
    assert {bar["name"] for bar in report["bars"]} >= {"RECALL, 1 windows back", "WINDOW"}


def test_windows_of_no_length_are_refused() -> None:
    with pytest.raises(SystemExit, match="windows >= 1"):
        evaluate(windows=(0,))
