"""`rekindle memory`: banks of knowledge. Quick to import: no gRPC."""

from typing import Any

from cyclopts import App

from rekindle.cli_connection import AsJson, Connection, print_answer, print_message
from rekindle.cli_memory_files import Metadata, export, import_, put


def memory_app() -> App:
    app = App(name="memory", help="Keep banks of knowledge, which conversations read from and write to.")
    for command in (create, show, remember, put, recall, forget, export, reembed, delete):
        app.command(command)
    app.command(list_, name="list")
    app.command(import_, name="import")
    return app


def create(
    bank: str,
    /,
    *,
    description: str = "",
    chunk_tokens: int | None = None,
    overlap_tokens: int | None = None,
    relevance_weight: float | None = None,
    recency_weight: float | None = None,
    importance_weight: float | None = None,
    diversity: float | None = None,
    read_tokens: int | None = None,
    read_entries: int | None = None,
    delete_after_s: int | None = None,
    write_facts: int | None = None,
    write_summary_tokens: int | None = None,
    kv_ttl_s: int | None = None,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Make a bank.

    Parameters
    ----------
    chunk_tokens
        Of documents, in the embedding model's tokens (128).
    overlap_tokens
        How many of them a chunk repeats of the one before (16).
    relevance_weight
        What being about the query weighs in a score (1).
    recency_weight
        What having been said or recalled lately weighs in a score (0.1).
    importance_weight
        What an entry's importance weighs in a score (0.25).
    diversity
        1 looks at the score alone, 0 at the difference from what is chosen already (0.9).
    read_tokens
        What is put in front of a turn at most, in the served model's tokens (512).
    read_entries
        The same, in entries (8).
    delete_after_s
        Entries that were not recalled for so long are deleted (0: never).
    write_facts
        How many facts the served model writes down after a turn of a conversation that writes here, at most (0).
    write_summary_tokens
        The length of the summary that it writes of the turn, in its tokens (0: it writes none).
    kv_ttl_s
        For how many seconds the KV of entries is kept, to be inserted into the turns that read them (0: it is not).
    """
    settings = {
        "chunk_tokens": chunk_tokens,
        "overlap_tokens": overlap_tokens,
        "relevance_weight": relevance_weight,
        "recency_weight": recency_weight,
        "importance_weight": importance_weight,
        "diversity": diversity,
        "read_tokens": read_tokens,
        "read_entries": read_entries,
        "delete_after_s": delete_after_s,
        "write_facts": write_facts,
        "write_summary_tokens": write_summary_tokens,
        "kv_ttl_s": kv_ttl_s,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    with connection.open() as client:
        _print_bank(client.memory.create_bank(bank, description=description, **given), as_json)


def show(bank: str, /, *, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """Show a bank: what it has, and its settings."""
    with connection.open() as client:
        _print_bank(client.memory.get_bank(bank), as_json)


def list_(*, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """List the banks, by name."""
    from rekindle.display_memory import banks_table

    with connection.open() as client:
        banks = list(client.memory.list_banks())
    print_answer(banks_table(banks), banks, as_json)


def delete(bank: str, /, *, connection: Connection = Connection()) -> None:
    """Delete a bank with all that is in it."""
    with connection.open() as client:
        print(f"{client.memory.delete_bank(bank)} entries deleted")


def remember(
    bank: str,
    text: str,
    /,
    *,
    metadata: Metadata = None,
    importance: float | None = None,
    supersedes: tuple[str, ...] = (),
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Add one entry. One that is there already stays as it is.

    Parameters
    ----------
    importance
        0 to 1 (0.5).
    supersedes
        Ids of entries that this one corrects.
    """
    with connection.open() as client:
        entry = client.memory.remember(bank, text, metadata=metadata, importance=importance, supersedes=supersedes)
        print_message(entry, as_json)


def recall(
    bank: str,
    query: str,
    /,
    *,
    k: int = 8,
    metadata: Metadata = None,
    document_id: str = "",
    session_id: str = "",
    with_superseded: bool = False,
    peek: bool = False,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Show the entries that matter most to a query, best first.

    Parameters
    ----------
    k
        How many, at most.
    document_id
        Of this document only.
    session_id
        Of this conversation only.
    with_superseded
        Also what later entries have corrected.
    peek
        Look, and leave no trace: what is shown is not remembered any better.
    """
    from rekindle.display_memory import recalled_table

    with connection.open() as client:
        where = _filter(metadata, document_id, session_id)
        recalled = client.memory.recall(bank, query, k=k, where=where, with_superseded=with_superseded, peek=peek)
    print_answer(recalled_table(recalled), list(recalled), as_json)


def forget(
    bank: str,
    /,
    *ids: str,
    metadata: Metadata = None,
    document_id: str = "",
    session_id: str = "",
    unused_for_s: int = 0,
    connection: Connection = Connection(),
) -> None:
    """Delete entries for good: those of these ids, those that the options name together, and those unused for so long.

    Parameters
    ----------
    document_id
        Of this document.
    session_id
        Of this conversation.
    unused_for_s
        Neither recalled nor created for so many seconds.
    """
    with connection.open() as client:
        where = _filter(metadata, document_id, session_id)
        print(f"{client.memory.forget(bank, ids=ids, where=where, unused_for_s=unused_for_s)} entries deleted")


def reembed(bank: str, /, *, connection: Connection = Connection()) -> None:
    """Make all vectors of a bank anew, with the embedding model that the workers have now."""
    from rekindle.display_memory import progress_bar

    entries = 0
    with connection.open() as client, progress_bar("entries", 0) as advance:
        for progress in client.memory.reembed(bank):
            entries = progress.entries_in_all
            advance(progress.entries_done, entries)
    print(f"{entries} entries have new vectors")


def _print_bank(bank: Any, as_json: bool) -> None:
    from rekindle.display_memory import bank_table

    print_answer(bank_table(bank), bank, as_json)


def _filter(metadata: dict[str, str] | None, document_id: str, session_id: str) -> Any:
    """None where nothing is asked for."""
    from protos import rekindle_memory_pb2 as mpb

    if not (metadata or document_id or session_id):
        return None
    return mpb.EntryFilter(metadata=metadata, document_id=document_id, session_id=session_id)
