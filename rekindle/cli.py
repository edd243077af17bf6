"""The command line: which commands there are, and where their options come from. Quick to import: no gRPC, Ray, torch.

A flag beats the TOML file, the file beats the environment (REKINDLE_NAME), and that beats the default.
"""

import signal
import sys
from inspect import Parameter as Argument
from inspect import Signature
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from cyclopts.config import Env, Toml
from cyclopts.validators import Path as PathValidator

from rekindle.cli_connection import AsJson, Banks, Connection, ContextPolicy, attachments, print_answer
from rekindle.cli_keys import keys_app
from rekindle.cli_measure import bench_app, eval_app
from rekindle.cli_memory import memory_app
from rekindle.cli_sessions import sessions_app
from rekindle.cli_tenants import tenants_app
from rekindle.settings import Settings, all_settings

_DEFAULT_CONFIG = Path("rekindle.toml")


def main() -> None:
    import structlog

    signal.signal(signal.SIGTERM, _exit)  # `serve`, `demo` and `eval` listen themselves while they run
    # stdout is for what a command says (with --json one object); what is logged meanwhile goes beside it.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    make_app().meta()


def _exit(number: int, _: FrameType | None) -> None:
    """End on a signal as on an error: what this process has started is ended with it."""
    signal.signal(number, lambda *_: None)  # once: the cleaning up is left alone
    raise SystemExit(128 + number)


def make_app() -> App:
    """The whole command line."""
    app = App(
        name="rekindle",
        help="Serve conversations with language models, and never forget one.",
        help_epilogue='Options can also stand in a TOML file, under their command ("[serve]", "[sessions.ls]"), or in '
        "the environment as REKINDLE_NAME. A flag beats the file, the file beats the environment.",
    )
    app.command(_serve_command(), name="serve")
    app.command(scale)
    app.command(chat)
    app.command(demo)
    app.command(sessions_app())
    app.command(memory_app())
    app.command(keys_app())
    app.command(tenants_app())
    app.command(stats)
    app.command(bench_app())
    app.command(eval_app())

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


def scale(
    workers: int,
    /,
    *,
    ray_address: str = "auto",
    timeout_s: float = 600.0,
) -> None:
    """Have a running `rekindle serve` start workers, or drain those it started last, until there are so many.

    Who is drained finishes its turns or hands them over, stores what it holds, and goes.

    Parameters
    ----------
    ray_address
        The Ray that the workers run on, as in `rekindle serve`; auto finds one on this machine.
    timeout_s
        How long to wait for it. What was asked for stays asked for.
    """
    from rekindle.scale import scale

    scale(workers, ray_address=ray_address, timeout_s=timeout_s)


def chat(
    session_id: str = "",
    /,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    codec: str = "",
    context_policy: ContextPolicy = "error",
    banks: Banks = (),
    connection: Connection = Connection(),
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
        says. (Context policy and banks are a new conversation's, too.)
    """
    from rich.console import Console

    from rekindle.chat import Chat

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with connection.open() as client:
        settings = {"codec": codec, "context_policy": context_policy, "banks": attachments(banks)}
        Chat(client, Console(), settings, **sampling).run(session_id, lambda: input("> "))


def demo(*, as_json: AsJson = False) -> int:
    """Show the whole of it on this machine: a conversation outlives its worker, and goes on as if nothing had been."""
    from rekindle.demo import demo

    return demo(as_json=as_json)


def stats(*, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """Show how the cache does: prompt tokens by source, the workers' tiers, Redis."""
    from rich.console import Group as Stack

    from rekindle.display import stats_tables

    with connection.open() as client:
        answer = client.stats()
    print_answer(Stack(*stats_tables(answer)), answer, as_json)
