"""What the commands that ask a server share: where it is, and how its answers are printed. Quick to import: no gRPC."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rekindle.sync_client import Client

AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON object.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the server is, for every command that asks one."""

    target: str = "127.0.0.1:50051"
    """HOST:PORT of the server."""

    timeout_s: float = 30.0
    """How long a call may take; turns, parking and warming may take longer."""

    @contextmanager
    def open(self) -> Iterator["Client"]:
        """Connect, and end the command with one line when a call fails."""
        from rekindle.errors import RekindleError
        from rekindle.sync_client import Client

        with Client(self.target, timeout_s=self.timeout_s) as client:
            try:
                yield client
            except RekindleError as error:
                raise SystemExit(f"rekindle: {error}") from error


def print_answer(table: Any, answer: Any, as_json: bool) -> None:
    """Print an answer (or a list of them) for people or for programs."""
    from rich.console import Console

    from rekindle.display import to_dict

    if as_json:
        print(json.dumps([to_dict(item) for item in answer] if isinstance(answer, list) else to_dict(answer)))
    else:
        Console().print(table)


def print_message(answer: Any, as_json: bool) -> None:
    """Print an answer of few fields."""
    from rich.table import Table

    table = Table(show_header=False)
    for field in answer.DESCRIPTOR.fields:
        table.add_row(field.name.replace("_", " "), str(getattr(answer, field.name)))
    print_answer(table, answer, as_json)
