"""`rekindle memory`, and conversations with banks, as they are typed, against a real front end."""

from pathlib import Path

import pytest

from rekindle.cli_connection import attachments
from rekindle.sync_client import Client
from tests.test_cli import Run, address, answer_of, chat, front, in_an_empty_folder, rekindle

__all__ = ["address", "front", "in_an_empty_folder", "rekindle"]  # fixtures


def test_a_bank_is_filled_asked_and_emptied(rekindle: Run, address: str) -> None:
    made = answer_of(rekindle("memory", "create", "notes", "--read-tokens", "64", "--json"))
    assert (made["name"], made["settings"]["read_tokens"], made["settings"]["read_entries"]) == ("notes", 64, 8)
    entry = answer_of(
        rekindle("memory", "remember", "notes", "Rex is the dog of Ana.", "--metadata.of", "dogs", "--json")
    )
    assert entry["metadata"] == {"of": "dogs"}
    rekindle("memory", "remember", "notes", "Rex is the dog of Bob.", "--supersedes", entry["id"])
    said = rekindle("memory", "recall", "notes", "whose dog is Rex")
    assert "Bob" in said
    assert "Ana" not in said
    found = answer_of(
        rekindle("memory", "recall", "notes", "Rex", "--with-superseded", "--metadata.of", "dogs", "--json")
    )
    assert [one["entry"]["id"] for one in found] == [entry["id"]]
    assert "notes" in rekindle("memory", "list")
    assert answer_of(rekindle("memory", "list", "--json"))[0]["entries"] == 2
    shown = rekindle("memory", "show", "notes")
    assert "fa4e (64 numbers)" in shown
    assert "read tokens" in shown
    assert "1 entries deleted" in rekindle("memory", "forget", "notes", entry["id"])
    assert "1 entries deleted" in rekindle("memory", "delete", "notes")
    assert "NOT_FOUND" in rekindle("memory", "show", "notes", status=1)


def test_files_are_put_into_a_bank_under_their_paths(rekindle: Run, address: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "été 1.txt").write_text("The workshop is open from nine to five.")
    (tmp_path / "b.txt").write_text("Wear goggles at the lathe.")
    rekindle("memory", "create", "library")
    files = ("docs/été 1.txt", "b.txt")
    assert "2 documents: 2 new chunks" in rekindle("memory", "put", "library", *files)
    assert "2 documents: 0 new chunks" in rekindle("memory", "put", "library", *files)
    (found,) = answer_of(rekindle("memory", "recall", "library", "goggles at the lathe", "--k", "1", "--json"))
    assert found["entry"]["document_id"] == "b.txt"
    assert "docs:_t__1.txt" in rekindle("memory", "recall", "library", "open from nine")
    assert "1 entries deleted" in rekindle("memory", "forget", "library", "--document-id", "b.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "binary is not UTF-8" in rekindle("memory", "put", "library", "binary", status=1)
    assert "at least one file" in rekindle("memory", "put", "library", status=1)
    rekindle("memory", "put", "library", "nowhere.txt", status=2)
    rekindle("memory", "delete", "library")


def test_a_bank_goes_to_a_file_and_comes_back(rekindle: Run, address: str, tmp_path: Path) -> None:
    for bank in ("notes", "copy"):
        rekindle("memory", "create", bank)
    for number in range(3):
        rekindle("memory", "remember", "notes", f"Fact {number}, é.")
    printed = rekindle("memory", "export", "notes")
    rekindle("memory", "export", "notes", "--to", "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == printed
    assert answer_of(rekindle("memory", "import", "copy", "notes.jsonl", "--json")) == {"entries": 3, "new_entries": 3}
    assert "3 entries have new vectors" in rekindle("memory", "reembed", "copy")
    for bank in ("notes", "copy"):
        rekindle("memory", "delete", bank)


def test_conversations_are_created_with_banks_and_get_others(rekindle: Run, address: str) -> None:
    for bank in ("notes", "log"):
        rekindle("memory", "create", bank)
    options = ("--bank", "notes:read", "--bank", "log", "--context-policy", "recall")
    made = answer_of(rekindle("sessions", "create", "banked", *options, "--json"))
    assert [(one["bank"], one["access"]) for one in made["banks"]] == [
        ("notes", "BANK_ACCESS_READ"),
        ("log", "BANK_ACCESS_READ_WRITE"),
    ]
    assert made["context_policy"] == "CONTEXT_POLICY_RECALL"
    shown = rekindle("sessions", "show", "banked")
    assert "bank log" in shown
    assert "read and write" in shown
    changed = answer_of(rekindle("sessions", "attach", "banked", "--bank", "log:write", "--json"))
    assert [one["bank"] for one in changed["banks"]] == ["log"]
    assert answer_of(rekindle("sessions", "attach", "banked", "--json"))["banks"] == []
    assert "no bank nowhere" in rekindle("chat", "--bank", "nowhere", status=1)
    for bank in ("notes", "log"):
        rekindle("memory", "delete", bank)


def test_the_receipt_on_one_line_says_what_was_read(address: str) -> None:
    with Client(address) as client:
        client.memory.create_bank("notes")
        client.memory.remember("notes", "Rex is the dog of Ana.")
        client.create_session("told", banks={"notes": "read"})
    said, _ = chat(address, "Whose dog is Rex?", session_id="told")
    assert "1 memories from notes" in said


@pytest.mark.parametrize(
    ("typed", "attached"),
    [
        ("notes", {"notes": "read_write"}),
        ("notes:read", {"notes": "read"}),
        ("a:b:write", {"a:b": "write"}),
        ("a:b", {"a:b": "read_write"}),
    ],
)
def test_a_bank_is_typed_with_its_access(typed: str, attached: dict[str, str]) -> None:
    assert attachments((typed,)) == attached
