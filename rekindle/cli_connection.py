"""What the commands that ask a server share: where it is, and how its answers are printed. Quick to import: no gRPC."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from rekindle.sync_client import Client

AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON object.")]


Banks = Annotated[
    tuple[str, ...],
    Parameter(
        "--bank",
        negative="",
        help="A bank that its turns read from and write to; NAME:read or NAME:write for one "
        "of the two. Can be given again.",
    ),
]
ContextPolicy = Annotated[
    Literal["error", "window", "recall"],
    Parameter(
        help="What becomes of it beyond the model's window: error, window (the latest is attended to) or recall "
        "(and what of the rest matters)."
    ),
]
_ACCESSES = ("read", "write")


def attachments(banks: tuple[str, ...]) -> dict[str, str]:
    """Access by bank, of NAME, NAME:read and NAME:write."""
    split = (bank.rpartition(":") for bank in banks)
    return {
        name if access in _ACCESSES else f"{name}{colon}{access}": access if access in _ACCESSES else "read_write"
        for name, colon, access in split
    }


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the server is, for every command that asks one."""

    target: str = "127.0.0.1:50051"
    """HOST:PORT of the server."""

    api_key: str = field(default="", repr=False)
    """An API key, or a JWT. REKINDLE_API_KEY keeps it out of the list of processes."""

    tls: bool = False
    """Reach the server by TLS. The options below say so too."""

    tls_ca: str = ""
    """PEM file with the authorities that the server's certificate must come from; empty: public ones."""

    tls_cert: str = ""
    """PEM file with the certificate to show a server that asks for one."""

    tls_key: str = ""
    """PEM file with the certificate's private key."""

    timeout_s: float = 30.0
    """How long a call may take; turns, parking and warming may take longer."""

    @contextmanager
    def open(self) -> Iterator["Client"]:
        """Connect, and end the command with one line when a call fails."""
        from protos.tls import Tls
        from rekindle.errors import RekindleError
        from rekindle.sync_client import Client

        try:
            by_tls = self.tls or self.tls_ca or self.tls_cert or self.tls_key
            tls = Tls(self.tls_ca, self.tls_cert, self.tls_key) if by_tls else None
            client = Client(self.target, timeout_s=self.timeout_s, api_key=self.api_key, tls=tls)
        except (OSError, ValueError) as error:
            raise SystemExit(f"rekindle: {error}") from error
        with client:
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
    for name in (part.name for part in answer.DESCRIPTOR.fields):
        table.add_row(name.replace("_", " "), str(getattr(answer, name)))
    print_answer(table, answer, as_json)
