"""The dialogues that the recall model is trained on and judged by: each reply follows from what was said before."""

from random import Random

import pytest

from models.dialogues import Act, Dialogue, Style, dialogue, exact, held_out, rough_tokens
from models.phrases import KINDS, split
from models.words import Words, is_held_out

STYLES = [Style(held_out_words=words, held_out_phrases=phrases) for words in (False, True) for phrases in (False, True)]


def dialogues(style: Style, *, count: int = 30, length: int = 1500) -> list[Dialogue]:
    return [dialogue(Random(f"test/{number}"), style, length, rough_tokens) for number in range(count)]


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_is_what_was_last_said_of_its_subject(style: Style) -> None:
    answers = corrected = 0
    for talk in dialogues(style):
        for number, turn in enumerate(talk.turns):
            if turn.act is not Act.ASK:
                continue
            assert turn.answer is not None
            assert turn.said_turn is not None
            sentence = turn.reply.removeprefix("Let me see: ")
            about = sentence.removesuffix(f"{turn.answer}.")
            told = [
                earlier.reply.split(": ", 1)[1]
                for earlier in talk.turns[:number]
                if earlier.act in (Act.TELL, Act.CORRECT) and f": {about}" in earlier.reply
            ]
            assert told[-1] == sentence
            assert turn.corrected == (len(told) > 1)
            assert sentence in talk.turns[turn.said_turn].reply
            answers += 1
            corrected += turn.corrected
    assert answers > 100
    assert corrected > 10


@pytest.mark.parametrize("style", STYLES)
def test_nothing_was_said_about_what_the_assistant_does_not_know(style: Style) -> None:
    unknown = 0
    for talk in dialogues(style):
        for number, turn in enumerate(talk.turns):
            if turn.act is Act.ASK_UNKNOWN:
                subject = turn.reply.removeprefix("Let me see: ").split("?")[0]
                assert not any(f": {subject} " in earlier.reply for earlier in talk.turns[:number])
                unknown += 1
    assert unknown > 20


def test_training_never_says_a_held_out_word_and_held_out_dialogues_say_no_other() -> None:
    for held in (False, True):
        words = Words(Random(1), held_out=held)
        drawn = [draw() for draw in (words.name, words.pet, words.place, words.code) for _ in range(200)]
        assert {is_held_out(word) for word in drawn} == {held}


def test_words_of_pieces_begin_with_any_letter_and_are_of_training_too() -> None:
    words = Words(Random(1), held_out=False, pieces=("qx", "zw"))
    drawn = [words.name() for _ in range(2000)]
    strung = {word for word in drawn if word[1:].replace("qx", "").replace("zw", "") == ""}
    assert len({word[0] for word in strung}) == 26
    assert not any(is_held_out(word) for word in drawn)


def test_reaching_questions_are_about_what_was_told_longer_ago() -> None:
    def mean_turns_back(style: Style) -> float:
        back = [
            number - turn.said_turn
            for talk in dialogues(style)
            for number, turn in enumerate(talk.turns)
            if turn.said_turn is not None
        ]
        return sum(back) / len(back)

    assert mean_turns_back(Style(reaching=True)) > 1.1 * mean_turns_back(Style())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_held_out_phrases_are_apart_from_those_of_training(kind: object) -> None:
    for phrases in (kind.tells, kind.asks, kind.clauses):  # type: ignore[attr-defined]
        seen, held = split(phrases, held_out=False), split(phrases, held_out=True)
        assert seen
        assert held
        assert not set(seen) & set(held)


def test_a_seed_gives_the_same_dialogues_for_ever() -> None:
    assert held_out(3, seed=7, max_tokens=400) == held_out(3, seed=7, max_tokens=400)
    assert held_out(3, seed=7, max_tokens=400) != held_out(3, seed=8, max_tokens=400)


def test_a_dialogue_fits_its_length_and_ends_with_a_question() -> None:
    talks = dialogues(Style(), length=600)
    assert sum(rough_tokens(turn) for talk in talks for turn in talk.turns) > 500 * len(talks)
    for talk in talks:
        assert 0 < sum(rough_tokens(turn) for turn in talk.turns) <= 600
        assert talk.turns[-1].act in (Act.ASK, Act.ASK_UNKNOWN)


def test_a_reply_is_exact_word_for_word_or_not_at_all() -> None:
    (talk,) = held_out(1, seed=1, max_tokens=300)
    turn = talk.turns[-1]
    assert exact(f" {turn.reply}\n", turn)
    assert not exact(turn.reply.lower(), turn)
    assert not exact(turn.reply + " Yes.", turn)
