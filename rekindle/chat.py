"""A conversation in the terminal: replies as they are generated, and after each turn where its prompt came from."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from rekindle.display import receipt_line, size
from rekindle.errors import NotFound, RekindleError
from rekindle.sync_client import Client

_HELP = """\
/fork [TURN]   go on in a copy of this conversation, up to and with TURN (all of it)
/park          move this conversation's cache to Redis, away from the worker
/new           start another conversation
/help          show this
/quit          leave (so does Ctrl-D); Ctrl-C stops a reply"""


class Chat:
    """One user, one session at a time. Sessions are created with `settings`; `sampling` goes along with every turn."""

    def __init__(
        self, client: Client, console: Console, settings: Mapping[str, Any] | None = None, **sampling: Any
    ) -> None:
        """`settings` are what `Client.create_session` takes."""
        self._client, self._console, self._settings, self._sampling = client, console, settings or {}, sampling
        self._commands: dict[str, Callable[[str], None]] = {
            "/fork": self._fork,
            "/park": self._park,
            "/new": self._new,
            "/help": lambda _: self._console.print(_HELP, markup=False),
        }
        self.session_id = ""

    def run(self, session_id: str, read_line: Callable[[], str]) -> None:
        """Talk until /quit or the end of the input. A session that is not there yet is created."""
        try:
            self._show_session(self._reopened(session_id) if session_id else self._create())
        except NotFound:
            self._show_session(self._create(session_id))
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line:
                self._obey(line)

    def _obey(self, line: str) -> None:
        """Do what one line says. An error ends the line, not the conversation."""
        try:
            if not line.startswith("/"):
                self._say(line)
                return
            name, _, argument = line.partition(" ")
            command = self._commands.get(name)
            if command is None:
                self._console.print(f"[red]{escape(name)}: there is no such command[/red]")
                command = self._commands["/help"]
            command(argument.strip())
        except RekindleError as error:
            self._console.print(f"[red]{escape(str(error))}[/red]")

    def _say(self, text: str) -> None:
        messages = [{"role": "user", "content": text}]
        with self._client.generate(messages, session_id=self.session_id, **self._sampling) as generation:
            try:
                for delta in generation:
                    self._console.out(delta.text, end="", highlight=False)
            except KeyboardInterrupt:
                self._console.print("\n[dim]stopped; a turn that had not ended is forgotten[/dim]")
                return
        assert generation.finished is not None
        self._console.print(f"\n[dim]{escape(receipt_line(generation.finished))}[/dim]", highlight=False)

    def _fork(self, turn: str) -> None:
        if turn and not turn.isdecimal():
            self._console.print(f"[red]/fork: {escape(turn)} is not the number of a turn[/red]")
            return
        self._show_session(self._client.fork_session(self.session_id, at_turn=int(turn) if turn else None))

    def _park(self, _: str) -> None:
        parked = self._client.park_session(self.session_id, drop_host=True)
        dropped = f"{parked.device_blocks_dropped} device and {parked.host_blocks_dropped} host blocks dropped"
        stored = f"{size(parked.bytes_stored)} stored now"
        self._console.print(f"[dim]parked: {parked.redis_tokens} tokens in Redis, {stored}, {dropped}[/dim]")

    def _new(self, _: str) -> None:
        self._show_session(self._create())

    def _reopened(self, session_id: str) -> Any:
        return self._client.get_session(session_id, user_is_typing=True)  # whoever comes back will say something

    def _create(self, session_id: str = "") -> Any:
        return self._client.create_session(session_id, **self._settings)

    def _show_session(self, session: Any) -> None:
        self.session_id = session.session_id
        turns = f"{len(session.turns)} turns, {session.num_tokens} tokens"
        self._console.print(f"[dim]session {escape(self.session_id)} ({turns}); /help shows the commands[/dim]")
