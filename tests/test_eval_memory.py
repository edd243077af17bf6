"""`rekindle eval memory`: sets with known evidence, and what is reported of how it is found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import Figures, evaluate, measure
from benchmarks.memory_sets import Conversation, generated, locomo
from cache_store.banks import Vector
from cache_store.errors import InvalidRequest
from tests.fake_embedding import vector_of

SAMPLE = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ann",
        "speaker_b": "Bob",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ann", "dia_id": "D1:1", "text": "I adopted a turtle called Speedy."},
            {"speaker": "Bob", "dia_id": "D1:2", "text": "How nice!", "blip_caption": "a red bicycle"},
        ],
        "session_2_date_time": "10:04 am on 1 June, 2023",
        "session_2": [
            {"speaker": "Bob", "dia_id": "D2:1", "text": "My marathon is in October."},
            {"speaker": "Ann", "dia_id": "D2:2", "text": "The turtle ate a strawberry."},
        ],
        "session_3_date_time": "never held",
    },
    "qa": [
        {
            "question": "Is the turtle that was adopted called Speedy?",
            "answer": "Speedy",
            "evidence": ["D1:1"],
            "category": 4,
        },
        {"question": "What about the turtle?", "answer": "x", "evidence": ["D1:01; D2:2", "D9:9"], "category": 1},
        {"question": "What did Bob share?", "answer": "a bicycle", "evidence": ["D:1:2"], "category": 3},
        {"question": "Who is nobody?", "evidence": [], "category": 4},
        {"question": "Which strawberry did Bob eat?", "adversarial_answer": "x", "evidence": ["D2:2"], "category": 5},
    ],
}


def embed(texts: Sequence[str], is_query: bool) -> list[Vector]:
    return [vector_of(text) for text in texts]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sample: dict[str, Any] = json.loads(json.dumps(SAMPLE))
    del sample["conversation"]["session_3_date_time"]
    path = tmp_path / "locomo10.json"
    path.write_text(json.dumps([sample]))
    return path


def test_locomos_questions_name_what_was_said(file: Path) -> None:
    [conversation] = locomo(file)
    assert [one.name for one in conversation.said] == ["D1:1", "D1:2", "D2:1", "D2:2"]
    assert conversation.said[1].text == "Bob: How nice! [shares a picture: a red bicycle]"
    assert conversation.said[2].at_ms - conversation.said[0].at_ms == (24 * 24 * 60 - 3 * 60 - 52) * 60_000
    assert [(one.category, sorted(one.evidence)) for one in conversation.questions] == [
        ("single-hop", ["D1:1"]),
        ("multi-hop", ["D1:1", "D2:2"]),
        ("open-domain", ["D1:2"]),
        ("adversarial", ["D2:2"]),
    ]


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    for content in ("{", "[1]", '[{"conversation": {}}]', '[{"conversation": {"session_1": [1]}, "qa": []}]'):
        path = tmp_path / "other.json"
        path.write_text(content)
        with pytest.raises(InvalidRequest, match="locomo"):
            locomo(path)


def test_recall_counts_shares_of_the_evidence_and_mrr_the_first_of_it() -> None:
    figures = Figures()
    figures.add(["a", "b", "c", "d", "e", "f"], frozenset({"b", "f"}))
    figures.add(["a"], frozenset({"z"}))
    assert figures.means() == {"recall@1": 0.0, "recall@5": 0.25, "recall@10": 0.5, "mrr": 0.25, "questions": 2}


def test_every_arm_answers_every_question_and_adversarial_ones_are_not_in_the_total(file: Path) -> None:
    figures = measure(locomo(file), embed, quiet=True)
    assert len(figures) == 6
    for by_kind in figures.values():
        assert by_kind["total"].questions == 3
        assert by_kind["adversarial"].questions == 1
        assert by_kind["total"].means()["recall@5"] == 1.0
    assert figures["BM25"]["single-hop"].means()["recall@1"] == 1.0


@pytest.fixture(scope="module")
def made() -> list[Conversation]:
    return generated(2, seed=3, max_tokens=2500)


def test_generated_conversations_are_the_same_for_a_seed(made: list[Conversation]) -> None:
    assert generated(2, seed=3, max_tokens=2500) == made
    assert generated(2, seed=4, max_tokens=2500) != made


def test_the_evidence_of_a_generated_question_was_told_before_and_not_corrected_since(
    made: list[Conversation],
) -> None:
    questions = [(one, question) for one in made for question in one.questions]
    assert {question.category for _, question in questions} == {"told", "corrected"}
    for conversation, question in questions:
        known = conversation.said[: question.num_said]
        [evidence] = question.evidence
        assert evidence in {said.name for said in known}
        assert evidence not in {said.corrects for said in known}
        assert all(said.at_ms <= question.at_ms for said in known)
        [told] = [said for said in known if said.name == evidence]
        assert bool(told.corrects) == (question.category == "corrected")


def test_who_says_what_is_corrected_finds_what_counts(made: list[Conversation]) -> None:
    figures = measure(made, embed, quiet=True)
    served, corrected = (figures[arm]["corrected"].means()["mrr"] for arm in ("as served", "as served, corrected"))
    assert corrected > served + 0.1
    assert figures["BM25"]["told"].means()["recall@10"] > 0.9


def test_the_report_names_the_set_and_every_arm(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(locomo_json=file, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)["figures"]
    assert (report["set"], report["entries"]) == ("locomo10.json", 4)
    assert report["arms"]["dense"]["total"]["questions"] == 3
    assert report["arms"]["dense"]["single-hop"]["recall@1"] == 1.0
    assert report["arms"]["as served"]["total"]["recall@5"] == 1.0
