"""The command line: which commands there are, and where their options come from. Quick to import: no gRPC, Ray, torch.

A flag beats the TOML file, the file beats the environment (REKINDLE_NAME), and that beats the default.
"""

import ast
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter as Argument
from inspect import Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter
from cyclopts.config import Env, Toml
from cyclopts.validators import Path as PathValidator

import benchmarks
from rekindle.settings import Settings, all_settings

if TYPE_CHECKING:
    from rekindle.sync_client import Client

_DEFAULT_CONFIG = Path("rekindle.toml")

_FLAGS = Parameter(
    negative="",
    consume_multiple=True,
    name_transform=lambda name: "json" if name == "as_json" else name.replace("_", "-"),
)
"""How the keyword parameters of what is measured or proved become flags."""

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


def main() -> None:
    import structlog

    # stdout is for what a command says (with --json one object); what is logged meanwhile goes beside it.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    make_app().meta()


def make_app() -> App:
    """The whole command line."""
    app = App(
        name="rekindle",
        help="Serve conversations with language models, and never forget one.",
        help_epilogue='Options can also stand in a TOML file, under their command ("[serve]", "[sessions.ls]"), or in '
        "the environment as REKINDLE_NAME. A flag beats the file, the file beats the environment.",
    )
    app.command(_serve_command(), name="serve")
    app.command(chat)
    app.command(demo)
    sessions = App(name="sessions", help="List, show, fork, park, warm and remove conversations.")
    for command, name in (
        (sessions_ls, "ls"),
        (sessions_show, "show"),
        (sessions_fork, "fork"),
        (sessions_park, "park"),
        (sessions_warm, "warm"),
        (sessions_rm, "rm"),
    ):
        sessions.command(command, name=name)
    app.command(sessions)
    app.command(stats)
    app.command(_bench_app())
    app.command(_eval_app())

    @app.meta.default
    def with_config(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None,
            Parameter(
                help="TOML file with options (./rekindle.toml, if there is one).",
                env_var="REKINDLE_CONFIG",
                validator=PathValidator(exists=True, dir_okay=False),
            ),
        ] = None,
    ) -> Any:
        app.config = [Toml(config or _DEFAULT_CONFIG), Env("REKINDLE_", command=False)]
        return app(tokens)

    return app


def _serve_command() -> Any:
    """`serve`, with a flag for each setting: the settings are the signature."""
    groups: dict[str, Group] = {}
    arguments = []
    for number, setting in enumerate(all_settings()):
        group = groups.setdefault(setting.group, Group(setting.group, sort_key=number))
        kind: Any = Annotated[setting.kind, Parameter(help=setting.help, group=group)]
        arguments.append(Argument(setting.name, Argument.KEYWORD_ONLY, default=setting.default, annotation=kind))

    def serve(**values: Any) -> None:
        try:
            settings = Settings.from_values(values)
        except ValueError as error:
            print(f"rekindle: {error}", file=sys.stderr)
            raise SystemExit(2) from error  # as for any other bad option
        from rekindle.serve import serve

        serve(settings)

    serve.__signature__ = Signature(arguments)  # type: ignore[attr-defined]
    serve.__doc__ = """Start the system: workers that run the model, and the front end that clients talk to.

    Conversations live in Redis. Their KV cache lives on the workers' devices while they are in use, then in host
    memory, then in Redis, and comes back when a conversation goes on. SIGTERM or Ctrl-C finishes the turns in
    progress, moves all caches to Redis and stops.

    To try it with nothing else installed: rekindle serve --embedded-redis
    """
    return serve


def chat(
    session_id: str = "",
    /,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    codec: str = "",
    connection: Connection = Connection(),  # frozen
) -> None:
    """Talk with the model. After each turn it says where the prompt's cache came from.

    Parameters
    ----------
    session_id
        The conversation to go on with, or to create under this name; without one, the server makes one up.
    max_new_tokens
        The longest reply, in tokens.
    temperature
        0 takes the likeliest token always; 1 follows the model's probabilities.
    seed
        Equal seeds give equal replies.
    codec
        How a new conversation's cache is kept: raw, lossless, int8, k8v4, int4 or ladder; by default as the server
        says.
    """
    from rich.console import Console

    from rekindle.chat import Chat

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with connection.open() as client:
        Chat(client, Console(), codec=codec, **sampling).run(session_id, lambda: input("> "))


def demo(*, as_json: AsJson = False) -> int:
    """Show the whole of it on this machine: a conversation outlives its worker, and goes on as if nothing had been."""
    from rekindle.demo import demo

    return demo(as_json=as_json)


def sessions_ls(*, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """List the conversations, newest first."""
    from rekindle.display import sessions_table

    with connection.open() as client:
        sessions = list(client.list_sessions())
    _show(sessions_table(sessions), sessions, as_json)


def sessions_show(
    session_id: str,
    /,
    *,
    text: bool = False,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Show a conversation: its turns and which tiers hold its cache.

    Parameters
    ----------
    text
        Its history as text, too.
    """
    from rekindle.display import session_table

    with connection.open() as client:
        session = client.get_session(session_id, with_text=text, with_residency=True)
    _show(session_table(session), session, as_json)
    if text and not as_json:
        print(session.text)


def sessions_fork(
    session_id: str,
    new_session_id: str = "",
    /,
    *,
    at_turn: int | None = None,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Copy a conversation; the cache is shared.

    Parameters
    ----------
    new_session_id
        The copy's name; without one, the server makes one up.
    at_turn
        The last turn that the copy has; 0 makes it empty.
    """
    from rekindle.display import session_table

    with connection.open() as client:
        session = client.fork_session(session_id, at_turn=at_turn, new_session_id=new_session_id)
    _show(session_table(session), session, as_json)


def sessions_park(
    session_id: str,
    /,
    *,
    drop_host: bool = False,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Move a conversation's cache to Redis, and off the device.

    Parameters
    ----------
    drop_host
        Off the worker's host memory, too.
    """
    with connection.open() as client:
        _show_message(client.park_session(session_id, drop_host=drop_host), as_json)


def sessions_warm(
    session_id: str,
    /,
    *,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Bring a conversation's cache back to a device, ahead of its next turn."""
    with connection.open() as client:
        _show_message(client.warm_session(session_id), as_json)


def sessions_rm(
    session_id: str,
    /,
    *,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Remove a conversation, and its cache from every tier."""
    with connection.open() as client:
        _show_message(client.delete_session(session_id), as_json)


def stats(*, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """Show how the cache does: prompt tokens by source, the workers' tiers, Redis."""
    from rich.console import Group as Stack

    from rekindle.display import stats_tables

    with connection.open() as client:
        answer = client.stats()
    _show(Stack(*stats_tables(answer)), answer, as_json)


def _bench_app() -> App:
    """One command for each module of benchmarks/: the keyword parameters of its `run` are the flags."""
    bench = App(
        name="bench",
        help="Measure. Every benchmark runs both sides in turn and prints medians, and which bars hold.",
        default_parameter=_FLAGS,
    )
    for path in sorted(Path(benchmarks.__path__[0]).glob("*.py")):
        code = ast.parse(path.read_text())  # not imported: most of them bring torch
        if any(isinstance(statement, ast.FunctionDef) and statement.name == "run" for statement in code.body):
            summary = (ast.get_docstring(code) or "").partition("\n")[0]
            bench.command(f"benchmarks.{path.stem}:run", name=path.stem, help=summary)
    return bench


def _eval_app() -> App:
    """What proves rather than times. Imported when called: it brings torch."""
    evaluations = App(
        name="eval", help="Prove. Every evaluation says which of its bars hold.", default_parameter=_FLAGS
    )
    evaluations.command(
        "benchmarks.fidelity:evaluate",
        name="fidelity",
        help="What a conversation loses when its cache is parked and comes back, codec by codec.",
    )
    return evaluations


def _show(table: Any, answer: Any, as_json: bool) -> None:
    """Print an answer (or a list of them) for people or for programs."""
    from rich.console import Console

    from rekindle.display import to_dict

    if as_json:
        print(json.dumps([to_dict(item) for item in answer] if isinstance(answer, list) else to_dict(answer)))
    else:
        Console().print(table)


def _show_message(answer: Any, as_json: bool) -> None:
    """Print an answer of few fields."""
    from rich.table import Table

    table = Table(show_header=False)
    for field in answer.DESCRIPTOR.fields:
        table.add_row(field.name.replace("_", " "), str(getattr(answer, field.name)))
    _show(table, answer, as_json)
