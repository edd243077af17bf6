"""`rekindle sessions`: what can be done with conversations besides talking. Quick to import: no gRPC."""

from cyclopts import App

from rekindle.cli_connection import (
    AsJson,
    Banks,
    Connection,
    ContextPolicy,
    attachments,
    print_answer,
    print_message,
)


def sessions_app() -> App:
    app = App(name="sessions", help="Create, list, show, fork, park, warm and remove conversations.")
    for command in (create, ls, show, attach, fork, park, warm, rm):
        app.command(command)
    return app


def create(
    session_id: str = "",
    /,
    *,
    ttl_s: int = 0,
    pinned: bool = False,
    codec: str = "",
    context_policy: ContextPolicy = "error",
    banks: Banks = (),
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Create a conversation. Without a name, the server makes one up.

    Parameters
    ----------
    ttl_s
        Seconds without use after which it goes; 0: as the server says.
    pinned
        Keep it, and its cache in Redis, for ever.
    codec
        How its cache is kept: raw, lossless, int8, k8v4, int4 or ladder; by default as the server says.
    """
    from rekindle.display import session_table

    with connection.open() as client:
        session = client.create_session(
            session_id,
            ttl_s=ttl_s,
            pinned=pinned,
            codec=codec,
            context_policy=context_policy,
            banks=attachments(banks),
        )
    print_answer(session_table(session), session, as_json)


def attach(
    session_id: str,
    /,
    *,
    banks: Banks = (),
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Attach these banks to a conversation, instead of those that it has; none takes all away."""
    from rekindle.display import session_table

    with connection.open() as client:
        session = client.update_session(session_id, banks=attachments(banks))
    print_answer(session_table(session), session, as_json)


def ls(*, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """List the conversations, newest first."""
    from rekindle.display import sessions_table

    with connection.open() as client:
        sessions = list(client.list_sessions())
    print_answer(sessions_table(sessions), sessions, as_json)


def show(
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
    print_answer(session_table(session), session, as_json)
    if text and not as_json:
        print(session.text)


def fork(
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
    print_answer(session_table(session), session, as_json)


def park(
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
        print_message(client.park_session(session_id, drop_host=drop_host), as_json)


def warm(
    session_id: str,
    /,
    *,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Bring a conversation's cache back to a device, ahead of its next turn."""
    with connection.open() as client:
        print_message(client.warm_session(session_id), as_json)


def rm(
    session_id: str,
    /,
    *,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Remove a conversation, and its cache from every tier."""
    with connection.open() as client:
        print_message(client.delete_session(session_id), as_json)
