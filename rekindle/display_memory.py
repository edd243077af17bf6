"""Banks and entries as people read them: rich tables, and how far a long call is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from protos import rekindle_memory_pb2 as mpb
from rekindle.display import when

_SHOWN_CHARACTERS = 200


def banks_table(banks: Iterable[mpb.Bank]) -> Table:
    table = Table("bank", "entries", "documents", "created", "description")
    for bank in banks:
        created = when(bank.created_ms)
        table.add_row(bank.name, str(bank.entries), str(bank.documents), created, escape(bank.description))
    return table


def bank_table(bank: mpb.Bank) -> Table:
    """One bank: what it has, and its settings."""
    table = Table(show_header=False, title=f"bank {bank.name}")
    if bank.description:
        table.add_row("description", escape(bank.description))
    table.add_row("entries", str(bank.entries))
    table.add_row("documents", str(bank.documents))
    table.add_row("created", when(bank.created_ms))
    table.add_row("embedding model", f"{bank.embedder} ({bank.embedding_dim} numbers)" if bank.embedder else "none yet")
    for field, value in bank.settings.ListFields():
        table.add_row(field.name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
    return table


def recalled_table(recalled: Sequence[mpb.RecalledEntry]) -> Table:
    table = Table("score", "text", "from", "id")
    for one in recalled:
        entry, text = one.entry, one.entry.text
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
        table.add_row(f"{one.score:.3f}", escape(shown), _from(entry), entry.id)
    return table


def _from(entry: mpb.MemoryEntry) -> str:
    if entry.document_id:
        return f"{entry.document_id}, chunk {entry.chunk}"
    return f"{entry.session_id}, turn {entry.turn}" if entry.session_id else when(entry.created_ms)


@contextmanager
def progress_bar(unit: str, total: int) -> Iterator[Callable[..., None]]:
    """Show how far it is on stderr, if that is a terminal; the bar goes when it is over. Yields what is told how much
    is done (and, where that is not known from the start, of how much)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(unit, total=total or None)

        def advance(done: int, in_all: int | None = None) -> None:
            progress.update(task, completed=done, total=in_all)

        yield advance
